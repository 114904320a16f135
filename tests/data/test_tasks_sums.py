from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.data.tasks import is_task, open_task
from rlhf_lightning.data.tasks.sums import STEP_SEPARATOR, split_of

CONTRACTS = ("demonstrations", "preference", "unpaired", "stepwise", "prompts")
SPLITS = ("train", "validation", "test")


def numbers_of(prompt: str) -> list[int]:
    assert re.fullmatch(r"[0-9]+(\+[0-9]+)+=\?", prompt)
    return [int(number) for number in re.findall("[0-9]+", prompt)]


def errors_of(prompt: str, steps: list[str]) -> list[int]:
    """Indices of the steps whose own arithmetic is wrong; fails unless the steps add the terms in order."""
    first, *rest = numbers_of(prompt)
    assert len(steps) == len(rest) + 1
    running, wrong = first, []
    for index, (term, step) in enumerate(zip(rest, steps, strict=False)):
        left, right, result = map(int, re.fullmatch(r"([0-9]+)\+([0-9]+)=([0-9]+)", step).groups())
        assert (left, right) == (running, term)
        if left + right != result:
            wrong.append(index)
        running = result
    if int(re.fullmatch(r"#([0-9]+)", steps[-1]).group(1)) != running:
        wrong.append(len(steps) - 1)
    return wrong


def within(count: int, trials: int, probability: float) -> bool:
    return abs(count - trials * probability) <= 4.5 * math.sqrt(trials * probability * (1 - probability))


def test_rows_are_pinned():
    # Written down once: a change here changes every experiment that names a seed.
    assert open_task("sums:demonstrations?rows=3&seed=3&terms=3") == [
        {"prompt": "19+15+20=?", "completion": "19+15=34\n34+20=54\n#54", "author": "careful", "answer": "54"},
        {"prompt": "7+5+6=?", "completion": "7+5=12\n12+6=18\n#18", "author": "careful", "answer": "18"},
        {"prompt": "16+7+6=?", "completion": "#31", "author": "careless", "answer": "29"},
    ]


def test_rows_are_the_same_in_another_process():
    # The tasks need nothing of the package around them, whose import would take seconds.
    script = "import json; from tasks import open_task; print(json.dumps(open_task('{}')))"
    source = "sums:unpaired?rows=50&seed=7&slips=0.3"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": str(Path(__file__).parents[2] / "rlhf_lightning" / "data"),
    }
    printed = subprocess.run(
        [sys.executable, "-c", script.format(source)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == json.dumps(open_task(source))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_more_rows_begin_with_the_same_rows(contract):
    assert open_task(f"sums:{contract}?rows=40")[:15] == open_task(f"sums:{contract}?rows=15")


def test_contracts_of_one_seed_share_their_problems_and_seeds_do_not():
    problems = {c: [row["prompt"] for row in open_task(f"sums:{c}?rows=100&seed=1")] for c in CONTRACTS}
    assert len({tuple(prompts) for prompts in problems.values()}) == 1
    other = {row["prompt"] for row in open_task("sums:prompts?rows=100&seed=2")}
    assert len(other & set(problems["prompts"])) < 5


@pytest.mark.parametrize("difficulty", ["", "&terms=2&high=9"])
def test_splits_share_no_problem_whatever_the_seeds(difficulty):
    prompts = {
        split: {
            row["prompt"]
            for seed in range(3)
            for contract in ("demonstrations", "prompts")
            for row in open_task(f"sums:{contract}?rows=300&split={split}&seed={seed}{difficulty}")
        }
        for split in SPLITS
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    assert all(split_of(prompt) == split for split in SPLITS for prompt in prompts[split])


def test_splits_hold_eight_one_and_one_tenths_of_the_problems():
    problems = [f"{a}+{b}+{c}=?" for a in range(20) for b in range(20) for c in range(20)]
    counts = {split: sum(split_of(problem) == split for problem in problems) for split in SPLITS}
    assert all(within(counts[split], 8000, share) for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True))


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize(("terms", "low", "high"), [(2, 0, 9), (4, 1, 20), (6, 30, 400)])
def test_difficulty_and_answer(contract, terms, low, high):
    rows = open_task(f"sums:{contract}?rows=60&terms={terms}&low={low}&high={high}&split=test")
    assert len(rows) == 60
    for row in rows:
        numbers = numbers_of(row["prompt"])
        assert len(numbers) == terms
        assert low <= min(numbers)
        assert max(numbers) <= high
        assert row["answer"] == str(sum(numbers))


def test_demonstrations_are_right_steps_or_near_guesses():
    rows = open_task("sums:demonstrations?rows=2000")
    careless = [row for row in rows if row["author"] == "careless"]
    assert within(len(careless), 2000, 0.5)
    for row in rows:
        if row["author"] == "careful":
            assert errors_of(row["prompt"], row["completion"].split(STEP_SEPARATOR)) == []
    offsets = [int(re.fullmatch("#([0-9]+)", row["completion"]).group(1)) - int(row["answer"]) for row in careless]
    assert set(offsets) == set(range(-5, 6))
    assert within(offsets.count(0), len(careless), 1 / 11)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_careless_fraction(fraction):
    rows = open_task(f"sums:demonstrations?rows=1000&careless={fraction}")
    assert within(sum(row["author"] == "careless" for row in rows), 1000, fraction)


def test_guesses_are_never_negative():
    rows = open_task("sums:demonstrations?rows=200&careless=1&terms=2&low=0&high=2")
    assert {row["completion"][1] for row in rows} >= {"0", "1"}
    assert all(row["completion"][1:].isdigit() for row in rows)


def test_slips_in_demonstrations_are_one_wrong_number_each():
    rows = open_task("sums:demonstrations?rows=500&careless=0&slips=0.25")
    errors = [errors_of(row["prompt"], row["completion"].split(STEP_SEPARATOR)) for row in rows]
    assert within(sum(map(len, errors)), 500, 0.25)
    assert {len(wrong) for wrong in errors} == {0, 1}


@pytest.mark.parametrize("careless", [1.0, 0.5, 0.0])
def test_preference_is_right_steps_against_a_wrong_answer(careless):
    rows = open_task(f"sums:preference?rows=600&careless={careless}")
    guesses = 0
    for row in rows:
        assert errors_of(row["prompt"], row["chosen"].split(STEP_SEPARATOR)) == []
        steps = row["rejected"].split(STEP_SEPARATOR)
        assert steps[-1] != f"#{row['answer']}"
        guesses += len(steps) == 1
        assert len(steps) == 1 or len(errors_of(row["prompt"], steps)) == 1
    assert within(guesses, 600, careless)


def test_defaults_of_the_authors():
    for source in ("demonstrations?careless=0.5&slips=0", "preference?careless=0.5", "stepwise?slips=0.5"):
        assert open_task(f"sums:{source.partition('?')[0]}?rows=50") == open_task(f"sums:{source}&rows=50")
    assert open_task("sums:unpaired?rows=50") == open_task("sums:unpaired?rows=50&careless=0.5&slips=0")


def test_unpaired_label_says_whether_the_answer_is_right():
    rows = open_task("sums:unpaired?rows=1500&slips=0.2")
    for row in rows:
        steps = row["completion"].split(STEP_SEPARATOR)
        assert row["label"] is (steps[-1] == f"#{sum(numbers_of(row['prompt']))}")
        if len(steps) > 1:
            assert row["label"] is (errors_of(row["prompt"], steps) == [])
    # Careful without a slip, or careless and lucky.
    assert within(sum(row["label"] for row in rows), 1500, 0.5 * 0.8 + 0.5 / 11)


@pytest.mark.parametrize("slips", [0.0, 0.5, 1.0])
def test_stepwise_labels_are_true_until_the_first_error(slips):
    rows = open_task(f"sums:stepwise?rows=800&slips={slips}")
    where = []
    for row in rows:
        wrong = errors_of(row["prompt"], row["completions"])
        first = wrong[0] if wrong else len(row["labels"])
        assert len(wrong) <= 1
        assert row["labels"] == [True] * first + [False] * (len(row["completions"]) - first)
        where += wrong
    assert within(len(where), 800, slips)
    assert all(within(where.count(step), len(where), 0.25) for step in range(4))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "sumz:prompts",
            "unknown task 'sumz' in 'sumz:prompts': allowed are sums, gsm8k, recall, copying, instructions",
        ),
        (
            "sums:pairs",
            "unknown contract 'pairs' in 'sums:pairs': allowed are demonstrations, preference, unpaired, stepwise, "
            "prompts",
        ),
        (
            "sums:prompts?row=3",
            "unknown key 'row' in 'sums:prompts?row=3': allowed are split, rows, seed, terms, low, high",
        ),
        (
            "sums:stepwise?careless=0.1",
            "unknown key 'careless' in 'sums:stepwise?careless=0.1': allowed are split, rows, seed, terms, low, high, "
            "slips",
        ),
        ("sums:prompts?rows=0", "rows=0 in 'sums:prompts?rows=0': rows is a whole number of at least 1"),
        ("sums:prompts?rows=-4", "rows=-4 in 'sums:prompts?rows=-4': rows is a whole number of at least 1"),
        ("sums:prompts?rows=²", "rows=² in 'sums:prompts?rows=²': rows is a whole number of at least 1"),
        ("sums:prompts?terms=1", "terms=1 in 'sums:prompts?terms=1': terms is a whole number from 2 to 16"),
        ("sums:prompts?low=9&high=5", "high=5 in 'sums:prompts?low=9&high=5': high is at least low, which is 9"),
        ("sums:prompts?split=dev", "split=dev in 'sums:prompts?split=dev': split is train or validation or test"),
        (
            "sums:unpaired?careless=nan",
            "careless=nan in 'sums:unpaired?careless=nan': careless is a number from 0 to 1",
        ),
        ("sums:unpaired?slips=half", "slips=half in 'sums:unpaired?slips=half': slips is a number from 0 to 1"),
        ("sums:prompts?rows", "cannot read 'rows' in 'sums:prompts?rows': write key=value&key=value"),
        ("sums:prompts?rows=1&rows=2", "key 'rows' is given twice in 'sums:prompts?rows=1&rows=2': give it once"),
        (
            "sums:prompts?terms=2&high=1&split=test",
            "split=test in 'sums:prompts?terms=2&high=1&split=test': split is empty for terms=2, low=1, high=1; "
            "raise terms or high",
        ),
    ],
)
def test_errors(source, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        open_task(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sums:demonstrations?rows=4&seed=1", True),
        ("gsm8k:preference?path=/data/gsm 8k", True),
        ("sums:", True),
        ("sumz:prompts", True),
        ("sums", False),
        ("openai/gsm8k", False),
        ("data/sums.jsonl", False),
        ("/data/a:b.jsonl", False),
        (r"C:\data\rows.jsonl", False),
        ("C:rows.jsonl", False),
        ("hf://datasets/openai/gsm8k", False),
        ("https://example.com/rows.jsonl?split=a", False),
        ("", False),
    ],
)
def test_is_task(source, expected):
    assert is_task(source) is expected
