"""Shipped suites: all can be read; the generated ones are answered rightly by those who know the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.evaluation import Suite, Task, read_history, run_task

from ..data.test_tasks_instructions import answer
from .scripted import ScriptedEngine

FOLDER = Path(__file__).parents[2] / "configs" / "suites"
SUITES = sorted(FOLDER.glob("*.yaml"))


class Knowing(dict[str, list[str]]):
    """Answers by a function of the prompt."""

    def __init__(self, known: Callable[[str], str]) -> None:
        self.known = known

    def __missing__(self, prompt: str) -> list[str]:
        return [self.known(prompt)]


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_suites_are_read_and_say_how_to_run_them(file: Path) -> None:
    suite = Suite.read(f"configs/suites/{file.name}")
    assert suite.tasks
    name = file.name if file.stem == "own" else f"configs/suites/{file.name}"
    assert f"--suite {name} --output report" in file.read_text()


def run(suite: str, task: str, known: Callable[[str], str]) -> dict[str, float]:
    found = {of.name: of for of in Suite.read(f"configs/suites/{suite}.yaml").tasks}[task]
    assert isinstance(found, Task)
    engine = ScriptedEngine(Knowing(known))
    engine.tokenizer = AutoTokenizer.from_pretrained(FOLDER.parent / "models" / "nano")  # all characters
    return run_task(replace(found, limit=40), engine).metrics


@pytest.mark.parametrize("task", ["eight letters", "thirty-two digits", "sixty-four words"])
def test_copying(task: str) -> None:
    assert run("copying", task, lambda prompt: prompt.removeprefix("Copy: ").removesuffix("="))["accuracy"] == 1
    assert run("copying", task, lambda prompt: prompt)["accuracy"] == 0


@pytest.mark.parametrize("task", ["one constraint", "three constraints", "share of three"])
def test_instructions(task: str) -> None:
    (source,) = [of.prompts for of in Suite.read("configs/suites/instructions.yaml").tasks if of.name == task]
    given = {row["prompt"]: {k: v for c in row["constraints"] for k, v in c.items()} for row in open_task(source)}
    right = run("instructions", task, lambda prompt: answer(given[prompt]))
    assert (right["accuracy"], right["reward"]) == (1, 1)
    wrong = run("instructions", task, lambda prompt: 'A stray "')
    assert wrong["accuracy"] < 0.7
    if task == "one constraint":
        sections = {name: value for name, value in wrong.items() if name.startswith("section/")}
        assert set(sections.values()) == {0.0, 1.0}
        assert sections["section/words_at_most"] == 1


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("marked answer", "1+2=3\n#3", "3"),
        ("thoughts and answer", "<think>hm</think>3", "hm 3"),
        ("JSON", "", "{}"),
        ("layout", "", ""),
    ],
)
def test_formats(task: str, right: str, wrong: str) -> None:
    (source,) = [of.prompts for of in Suite.read("configs/suites/format.yaml").tasks if of.name == task]
    rows = {row["prompt"]: row for row in open_task(source)}

    def known(prompt: str) -> str:
        return right or answer({k: v for c in rows[prompt]["constraints"] for k, v in c.items()})

    assert run("format", task, known)["accuracy"] == 1
    assert run("format", task, lambda prompt: wrong)["accuracy"] == 0


def test_rows_of_ones_own_with_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "topic": "even" if n % 2 == 0 else "odd"} for n in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (task,) = Suite.read(FOLDER / "own.yaml").tasks
    assert isinstance(task, Task)
    found = run_task(replace(task, section="topic"), ScriptedEngine(Knowing(lambda p: f"#{min(int(p[0]) + 1, 4)}")))
    assert found.metrics["section/even"] == pytest.approx(2 / 3)
    assert found.metrics["section/odd"] == 1
    assert found.metrics["score"] == pytest.approx(5 / 6)
    with pytest.raises(
        ValueError, match="the section of task 'rows' is the column 'kind': its prompts have answer, topic"
    ):
        run_task(replace(task, section="kind"), ScriptedEngine({}))


def test_a_history_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no history\.jsonl"):
        read_history(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:1 is no result of an evaluation"):
        read_history(tmp_path)
