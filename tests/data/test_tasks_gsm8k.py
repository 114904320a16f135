from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.rewards.exact_answer import exact_answer

SIBLING = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
FOLDER = Path(os.environ.get("GSM8K_DIR", SIBLING))
real = pytest.mark.skipif(
    not (FOLDER / "train.jsonl").is_file(), reason="GSM8K is not here: set GSM8K_DIR to the folder with train.jsonl"
)
MODELS = ("small", "large")


def gsm8k(contract: str, **keys: object) -> list[dict]:
    pairs = {"path": FOLDER, **keys}
    return open_task(f"gsm8k:{contract}?" + "&".join(f"{key}={value}" for key, value in pairs.items()))


def records(name: str) -> list[dict]:
    with (FOLDER / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def folder(tmp_path):
    """Twenty-six problems in the files' format; the folder's name has what a URL would change."""
    folder = tmp_path / "c++ & 50% data"
    folder.mkdir()
    questions = [f"What is {n}\u2028+ 1000?" for n in range(26)]
    answers = [f"It is {n}+1000=<<{n}+1000={n + 1000}>>{n + 1000:,}.\n#### {n + 1000:,}" for n in range(26)]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    solved = [
        {
            "question": row["question"],
            "ground_truth": row["answer"].replace("####", "A:"),
            "small": {"is_correct": n % 2 == 0, "solution": f"<<1+1=2>>Guess {n}\nA: {n + 1000 + n % 2}"},
            "large": {"is_correct": n % 3 == 0, "solution": f"Cut off {n}" if n % 3 else f"Sum {n}\nA: {n + 1000}"},
        }
        for n, row in enumerate(rows)
    ]
    for name, content in (("train", rows), ("test", rows[:3]), ("example_model_solutions", solved)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def open_folder(contract: str, folder: Path, keys: str = "") -> list[dict]:
    quoted = str(folder).replace("%", "%25").replace("&", "%26")
    return open_task(f"gsm8k:{contract}?path={quoted}{keys}")


def test_demonstrations_and_prompts_of_a_folder(folder):
    rows = open_folder("demonstrations", folder, "&split=test")
    assert rows[2] == {
        "prompt": "What is 2\u2028+ 1000?",
        "completion": "It is 2+1000=1,002.\n#### 1,002",
        "answer": "1002",
    }
    kept = open_folder("demonstrations", folder, "&split=test&annotations=keep")
    assert kept[2]["completion"] == "It is 2+1000=<<2+1000=1002>>1,002.\n#### 1,002"
    prompts = open_folder("prompts", folder, "&split=test&rows=2")
    assert prompts == [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows[:2]]


def test_solutions_of_a_folder(folder):
    rows = [row for split in ("train", "heldout") for row in open_folder("unpaired", folder, f"&split={split}")]
    by_completion = {row["completion"]: row for row in rows}
    assert len(by_completion) == 52
    assert by_completion["Guess 5\n#### 1006"]["label"] is False
    assert by_completion["Sum 6\n#### 1006"] == {
        "prompt": "What is 6\u2028+ 1000?",
        "completion": "Sum 6\n#### 1006",
        "label": True,
        "answer": "1006",
    }
    assert by_completion["Cut off 4"]["label"] is False
    pairs = [row for split in ("train", "heldout") for row in open_folder("preference", folder, f"&split={split}")]
    # One of the two models is right: even and not a multiple of three, or the other way round.
    expected = {n for n in range(26) if (n % 2 == 0) != (n % 3 == 0)}
    assert {int(re.findall("[0-9]+", row["prompt"])[0]) for row in pairs} == expected
    assert all(by_completion[row["chosen"]]["label"] and not by_completion[row["rejected"]]["label"] for row in pairs)


def test_a_split_does_not_depend_on_the_order_of_the_file(folder):
    before = {row["prompt"] for row in open_folder("prompts", folder, "&split=train")}
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    (folder / "train.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    assert {row["prompt"] for row in open_folder("prompts", folder, "&split=train")} == before
    assert len(before) == round(26 * 7000 / 7473)


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    assert len(open_task("gsm8k:prompts?split=test")) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gsm8k:prompts", "'gsm8k:prompts' does not say where GSM8K is: add path=<folder>, or set GSM8K_DIR"),
        (
            "gsm8k:prompts?path=/nowhere",
            "no file '/nowhere/train.jsonl' for 'gsm8k:prompts?path=/nowhere': "
            "path (or GSM8K_DIR) is the folder with train.jsonl",
        ),
        (
            "gsm8k:stepwise",
            "unknown contract 'stepwise' in 'gsm8k:stepwise': allowed are demonstrations, preference, unpaired, "
            "prompts (GSM8K has no labels on steps: use sums:stepwise)",
        ),
        (
            "gsm8k:prompts?split=heldout",
            "split=heldout in 'gsm8k:prompts?split=heldout': split is train or validation or test",
        ),
        ("gsm8k:preference?pairs=two", "pairs=two in 'gsm8k:preference?pairs=two': pairs is one or all"),
        ("gsm8k:unpaired?pairs=all", "unknown key 'pairs' in 'gsm8k:unpaired?pairs=all': "
         "allowed are path, split, rows, annotations"),
        ("gsm8k:prompts?annotations=keep", "unknown key 'annotations' in 'gsm8k:prompts?annotations=keep': "
         "allowed are path, split, rows"),
    ],
)  # fmt: skip
def test_errors(source, message, monkeypatch):
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        open_task(source)


@real
def test_counts_and_splits_of_the_demonstrations():
    splits = {split: gsm8k("demonstrations", split=split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 7000, "validation": 473, "test": 1319}
    seen = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(seen)) == 7473 + 1319
    assert {row["prompt"] for row in splits["train"] + splits["validation"]} == {
        row["question"] for row in records("train.jsonl")
    }
    assert [row["prompt"] for row in splits["test"]] == [row["question"] for row in records("test.jsonl")]


@real
def test_demonstrations_end_in_their_answer_and_have_no_annotations():
    rows = gsm8k("demonstrations") + gsm8k("demonstrations", split="test")
    for row in rows:
        assert "<<" not in row["completion"]
        assert row["completion"].rpartition("\n#### ")[2].replace(",", "") == row["answer"]
        assert re.fullmatch("-?[0-9]+", row["answer"])
    kept = gsm8k("demonstrations", split="test", annotations="keep")
    assert [row["completion"] for row in kept] == [row["answer"] for row in records("test.jsonl")]


@real
def test_counts_of_the_solutions():
    by_split = {split: gsm8k("unpaired", split=split) for split in ("train", "validation", "test", "heldout")}
    problems = {split: {row["prompt"] for row in rows} for split, rows in by_split.items()}
    assert {split: len(found) for split, found in problems.items()} == {
        "train": 1000,
        "validation": 100,
        "test": 219,
        "heldout": 319,
    }
    assert problems["validation"] | problems["test"] == problems["heldout"]
    assert not problems["train"] & problems["heldout"]
    assert not problems["validation"] & problems["test"]
    labels = Counter(row["label"] for row in by_split["train"] + by_split["heldout"])
    assert labels == {True: 286 + 515 + 458 + 742, False: 1033 + 804 + 861 + 577}


@real
def test_preference_pairs_are_a_right_and_a_wrong_solution_of_one_problem():
    marks = {}
    combinations = Counter()
    for row in records("example_model_solutions.jsonl"):
        solutions = [value for key, value in row.items() if key not in ("question", "ground_truth")]
        for solution in solutions:
            marks[row["question"], solution["solution"].replace("\nA: ", "\n#### ")] = solution["is_correct"]
        right = sum(solution["is_correct"] for solution in solutions)
        combinations[row["question"]] = right * (4 - right)
    both = [*gsm8k("preference", pairs="all", annotations="keep", split="train"),
            *gsm8k("preference", pairs="all", annotations="keep", split="heldout")]  # fmt: skip
    assert Counter(row["prompt"] for row in both) == +combinations
    assert len(both) == 2429
    for row in both:
        assert marks[row["prompt"], row["chosen"]] is True
        assert marks[row["prompt"], row["rejected"]] is False
    one = gsm8k("preference", annotations="keep") + gsm8k("preference", annotations="keep", split="heldout")
    assert len({row["prompt"] for row in one}) == len(one) == 731
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in one} <= {
        (row["prompt"], row["chosen"], row["rejected"]) for row in both
    }


@real
def test_verifier_agrees_with_the_published_marks():
    rows = gsm8k("unpaired") + gsm8k("unpaired", split="heldout")
    rewards = exact_answer(
        [row["prompt"] for row in rows], [row["completion"] for row in rows], answer=[row["answer"] for row in rows]
    )
    disagreeing = [row for row, reward in zip(rows, rewards, strict=True) if reward != float(row["label"])]
    assert disagreeing == []
