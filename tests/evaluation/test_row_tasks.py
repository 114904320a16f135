"""Reward models on pairs and on marked solutions: scores and F1 by hand, real models against their own scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.evaluation import FirstErrorTask, PreferenceTask, Suite, TaskResult, evaluate, run_task
from rlhf_lightning.evaluation.sections import section_scores
from rlhf_lightning.metrics.intervals import wilson_interval
from rlhf_lightning.models import ProcessRewardModel, RewardModel

from ..helpers import save_tiny_model


def scores_of(prompts: Sequence[Any], completions: Sequence[str]) -> list[float | None]:
    """A reward model that reads its reward from the completion."""
    return [None if text == "?" else float(text) for text in completions]


def pair(subset: str, chosen: str, rejected: Any, prompt: Any = "1+1=") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}


PAIRS = [
    pair("easy", "2", "1"),
    pair("easy", "2", "3"),
    pair("hard", "1", "0.5"),
    pair("math", "0", "1"),
    pair("math", "0", "1.0"),
    pair("math", "4", "0"),
    pair("python", "3", "2"),
    pair("rust", "1", "1.0"),
]
SECTIONS = {"chat": ["easy", "hard"], "reasoning": ["math", "python", "rust"], "safety": ["none"]}


class Steps:
    """A process reward model that reads the probabilities from the steps; it cannot read an x."""

    def score_steps(self, prompts: Sequence[Any], solutions: Sequence[list[str]]) -> list[list[float]]:
        if any("x" in solution for solution in solutions):
            raise ValueError("too long")
        return [[float(step) for step in steps] for steps in solutions]


def solution(label: int, *steps: str, section: str = "a") -> dict[str, Any]:
    return {"problem": "1+1=", "steps": list(steps), "label": label, "from": section}


SOLUTIONS = [
    solution(1, "0.9", "0.2", "0.1"),
    solution(0, "0.9", "0.2"),
    solution(-1, "0.9", "0.8"),
    solution(2, "0.9", "0.9", "0.4", section="b"),
    solution(-1, "0.9", "0.4", section="b"),
    solution(-1, "0.6", section="b"),
]


def test_sections_weigh_their_subsets() -> None:
    task = PreferenceTask(name="pairs", rows=PAIRS, section="subset", sections=SECTIONS, counts={"math": 2})
    found = run_task(task, scores_of)
    assert list(found.scores.values()) == [1, 0, 1, 0, 0, 1, 1, 0]
    metrics = found.metrics
    assert metrics["accuracy"] == 0.5
    assert metrics["accuracy_low"] == wilson_interval(4, 8).low
    # Mathematics has the weight of both programming languages.
    assert metrics["section/chat"] == pytest.approx(2 / 3)
    assert metrics["section/reasoning"] == pytest.approx((2 * (1 / 3) + 1 + 0) / 4)
    assert metrics["score"] == pytest.approx((2 / 3 + 5 / 12) / 2)
    assert "section/safety" not in metrics
    margins = torch.tensor([1, -1, 0.5, -1, -1, 4, 1, 0.0])
    assert metrics["margin"] == pytest.approx(float(margins.mean()))
    assert metrics["margin_std"] == pytest.approx(float(margins.std(correction=0)))


def test_sections_of_the_same_names_of_rows_count_all() -> None:
    """Ids of rows are numbers of a list, or of a split: those of one section must not replace those of another."""
    right, wrong = [pair("", "2", "1")] * 3, [pair("", "0", "1")] * 3
    found = run_task(PreferenceTask(name="pairs", rows={"a": right, "b": wrong}), scores_of)
    assert list(found.scores.values()) == [1, 1, 1, 0, 0, 0]
    assert (found.metrics["accuracy"], found.metrics["prompts"], found.metrics["without_verdict"]) == (0.5, 6, 0)
    steps = FirstErrorTask(name="steps", rows={"a": SOLUTIONS[:1], "b": SOLUTIONS[1:2]})
    assert [prompt.row_id for prompt in steps.run(Steps())] == ["memory:1", "memory:1#2"]

    with pytest.raises(ValueError, match="2 rows of task 'pairs' have the id 'memory:1', and results are compared"):
        TaskResult("m", found.task, (*found.prompts, found.prompts[0]), 0.0)


def test_reasoning_counts_as_in_the_paper() -> None:
    # 447 mathematical pairs count as 984, which is as many as six times 164 of code.
    rows = [("math-prm", float(n < 400)) for n in range(447)]
    languages = ("cpp", "go", "java", "js", "python", "rust")
    rows += [(f"hep-{name}", float(n < 100)) for name in languages for n in range(164)]
    sections = {"Reasoning": ["math-prm", *(f"hep-{name}" for name in languages)]}
    assert section_scores(rows, sections, {"math-prm": 984}) == {
        "Reasoning": pytest.approx((400 / 447 + 100 / 164) / 2)
    }


def test_the_chosen_one_of_several_and_answers_to_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1+1="}]
    rows = [
        pair("a", "3", ["1", "2", "0"]),
        pair("a", "3", ["1", "3.5", "0"]),
        {name: [*chat, {"role": "assistant", "content": text}] for name, text in (("chosen", "2"), ("rejected", "1"))},
        pair("a", "?", "1"),
    ]
    seen: list[Any] = []

    def scorer(prompts: Sequence[Any], completions: Sequence[str]) -> list[float | None]:
        seen.extend(prompts)
        return scores_of(prompts, completions)

    found = run_task(PreferenceTask(name="pairs", rows=rows, chat=True), scorer)
    assert list(found.scores.values()) == [1.0, 0.0, 1.0]
    assert found.metrics["without_verdict"] == 1
    assert all(prompt == chat for prompt in seen)
    assert [len(prompt.samples) for prompt in found.prompts] == [4, 4, 2, 2]
    assert TaskResult.read(json.loads(json.dumps(found.as_dict()))) == found


def test_first_errors_by_section() -> None:
    rows = {name: [row for row in SOLUTIONS if row["from"] == name] for name in ("a", "b")}
    for task in (
        FirstErrorTask(name="steps", rows=rows),
        FirstErrorTask(name="steps", rows=SOLUTIONS, section="from"),
    ):
        found = run_task(task, Steps())
        assert [prompt.section for prompt in found.prompts] == ["a", "a", "a", "b", "b", "b"]
        metrics = found.metrics
        # a: one of two errors found, the sound one let pass; b: the error found, one of two let pass.
        assert metrics["section/a"] == pytest.approx(2 * 0.5 * 1 / 1.5)
        assert metrics["section/b"] == pytest.approx(2 * 1 * 0.5 / 1.5)
        assert metrics["score"] == pytest.approx(2 / 3)
        assert (metrics["with_error"], metrics["without_error"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
        assert metrics["f1"] == pytest.approx(2 / 3)
        assert metrics["accuracy"] == pytest.approx(4 / 6)
    strict = run_task(FirstErrorTask(name="steps", rows=SOLUTIONS, threshold=0.85), Steps())
    assert (strict.metrics["without_error"], strict.metrics["score"]) == (0.0, 0.0)


def test_solutions_that_cannot_be_read_have_no_verdict() -> None:
    found = run_task(FirstErrorTask(name="steps", rows=[*SOLUTIONS, solution(0, "x")]), Steps())
    assert (found.metrics["prompts"], found.metrics["without_verdict"]) == (6, 1)
    with pytest.raises(ValueError, match="'model' scores no row of task 'steps'"):
        run_task(FirstErrorTask(name="steps", rows=[solution(0, "x")]), Steps())


def moved(module: Any, folder: Path, seed: int) -> str:
    """Writes a model with other weights than those drawn."""
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(str(folder))
    return str(folder)


def test_reward_models_are_evaluated_and_compared(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    folders = [moved(RewardModule(str(base)), tmp_path / name / "model", n) for n, name in enumerate(("one", "two"))]
    rows = [pair("ab"[n % 2], f"{n}+{n}", f"{n}-{n}", prompt=f"{n}?") for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = tmp_path / "suite.yaml"
    rows_at = tmp_path / "pairs.jsonl"
    suite.write_text(f"tasks:\n  - {{kind: preferences, name: pairs, rows: {rows_at}, section: subset}}\n")
    report = evaluate(folders, suite, output=tmp_path / "out")
    for folder, found in zip(folders, report.results, strict=True):
        model = RewardModel.from_pretrained(folder)
        better, worse = (
            model.score([row["prompt"] for row in rows], [row[k] for row in rows]) for k in ("chosen", "rejected")
        )
        right = [a > b for a, b in zip(better, worse, strict=True)]
        assert list(found.scores.values()) == [float(r) for r in right]
        assert found.metrics["section/b"] == sum(right[1::2]) / 5
    assert report.comparisons[0].mcnemar is not None
    assert evaluate(folders, suite, output=tmp_path / "out").results == report.results  # from what was kept
    page = (tmp_path / "out" / "report.html").read_text()
    assert "chosen +" in page or "chosen -" in page
    assert all(f"<tr><td>{name}</td>" in page for name in ("a", "b", "score"))
    assert "| pairs | one | " in report.table()


def test_process_reward_models_are_evaluated(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    folder = moved(ProcessRewardModule(str(base)), tmp_path / "model", 3)
    rows = [{"problem": f"{n}?", "steps": [f"{n}+1", f"{n}+2"], "label": n % 3 - 1} for n in range(6)]
    task = FirstErrorTask(name="steps", rows=rows)
    report = evaluate([folder], Suite(name="s", tasks=(task,)))
    expected = ProcessRewardModel.from_pretrained(folder).score_steps(
        [row["problem"] for row in rows], [row["steps"] for row in rows]
    )
    given = [[sample.reward for sample in prompt.samples] for prompt in report.results[0].prompts]
    assert given == [pytest.approx(scores) for scores in expected]


@pytest.mark.parametrize(
    ("task", "word"),
    [
        (PreferenceTask(name="a", rows=PAIRS, section="sub"), "memory:1 has no 'sub', its section in 'a'"),
        (PreferenceTask(name="a", rows=PAIRS, section="subset", sections={"x": ["easy"]}), "memory:3 is of subset 'h"),
        (PreferenceTask(name="a", rows=[pair("a", "1", ["2", "3"]) | {"chosen": ["1", "2"]}]), "chosen is"),
        (PreferenceTask(name="a", rows=[pair("a", "1", "1")]), "memory:1: chosen and rejected are equal"),
        (FirstErrorTask(name="a", rows=[solution(1, "0.1")]), "memory:1: label is 1; write the number .* from 0 to 0"),
        (FirstErrorTask(name="a", rows=[solution(0)]), "memory:1: steps is"),
        (FirstErrorTask(name="a", rows=[{"steps": ["1"], "label": 0}]), "memory:1: problem is None"),
    ],
)
def test_rows_that_are_refused(task: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        run_task(task, scores_of if isinstance(task, PreferenceTask) else Steps())


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ({"kind": "preference", "name": "a", "rows": "x"}, "did you mean 'preferences'"),
        ({"kind": "preferences", "name": "a", "row": "x"}, "did you mean 'rows'"),
        ({"kind": "preferences", "name": "a"}, "task 'a' has no rows"),
        ({"kind": "first_errors", "name": "a", "rows": "x", "threshold": 1.5}, "threshold is 1.5"),
        ({"kind": "first_errors", "name": "a/b", "rows": "x"}, "without '/'"),
        ({"kind": "preferences", "name": "a", "rows": "x", "limit": 0}, "limit is 0"),
    ],
)
def test_tasks_that_are_refused(written: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Suite.read({"tasks": [written]})
