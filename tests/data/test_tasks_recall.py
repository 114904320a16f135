from __future__ import annotations

import re

import pytest

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.data.tasks.sums import split_of
from rlhf_lightning.rewards import exact_answer

FACT = re.compile(r"(?<![a-z!])([a-z]+)([A-Z]+)")
SHAPES = ["", "&length=48&facts=12&key=1&value=3", "&key=2&value=1&facts=30", "&length=200&decoys=9&value=4"]


def facts_of(context: str) -> dict[str, tuple[str, int]]:
    """The value and the place of every key, read without the generator."""
    found = {match[1]: (match[2], match.start()) for match in FACT.finditer(context)}
    assert len(found) == len(FACT.findall(context))
    return found


def test_rows_are_pinned():
    # Written down once: a change here changes every experiment that names a seed.
    assert open_task("recall:demonstrations?rows=2&length=24&facts=4") == [
        {"context": " 7wFL1nWX19lCS-56 --vBJ0", "prompt": "?w", "completion": "#FL", "answer": "FL", "offset": 2},
        {"context": "pPF46mXV6,9bMU94oZC.59 1", "prompt": "?b", "completion": "#MU", "answer": "MU", "offset": 11},
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_the_context(shape):
    keys = dict(part.split("=") for part in f"length=128&facts=16&key=1&value=2{shape}".split("&"))
    length, number, key, value = map(int, (keys[name] for name in ("length", "facts", "key", "value")))
    for row in open_task(f"recall:demonstrations?rows=60{shape}"):
        facts = facts_of(row["context"])
        assert len(row["context"]) == length
        assert len(facts) == number
        assert all(len(name) == key and len(said) == value for name, (said, _) in facts.items())
        assert row["prompt"][0] == "?"
        assert facts[row["prompt"][1:]] == (row["answer"], row["offset"])
        assert row["completion"] == f"#{row['answer']}"


def test_decoys_deny_a_wrong_value_of_a_key_in_use():
    for row in open_task("recall:prompts?rows=50&decoys=5"):
        facts = facts_of(row["context"])
        denied = re.findall(r"([a-z])!([A-Z]{2})", row["context"])
        assert len(denied) == 5
        assert all(facts[key][0] != value for key, value in denied)


def test_questions_ask_for_different_facts_of_one_context():
    single = open_task("recall:demonstrations?rows=5")
    several = open_task("recall:demonstrations?rows=29&questions=6")
    assert len(several) == 29
    for number, one in enumerate(single):
        rows = several[6 * number : 6 * number + 6]
        facts = facts_of(one["context"])
        assert rows[0] == one
        assert {row["context"] for row in rows} == {one["context"]}
        assert len({row["prompt"] for row in rows}) == len(rows) == (5 if number == 4 else 6)
        assert all(facts[row["prompt"][1:]] == (row["answer"], row["offset"]) for row in rows)


def test_context_at_the_beginning_of_the_prompt_is_the_same_problem():
    apart = open_task("recall:prompts?rows=10&seed=4")
    within = open_task("recall:prompts?rows=10&seed=4&place=prompt")
    assert [row["context"] + row["prompt"] for row in apart] == [row["prompt"] for row in within]
    assert not any("context" in row for row in within)


def test_splits_have_no_context_in_common():
    seen = {}
    for split in ("train", "validation", "test"):
        rows = open_task(f"recall:prompts?rows=300&split={split}&length=6&facts=1&value=1")
        assert all(split_of(row["context"]) == split for row in rows)
        seen[split] = {row["context"] for row in rows}
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & (seen["train"] | seen["test"])


def test_every_fact_is_asked_for_alike_wherever_it_is():
    offsets = [row["offset"] for row in open_task("recall:prompts?rows=2000")]
    quarters = [sum(32 * n <= offset < 32 * (n + 1) for offset in offsets) / 2000 for n in range(4)]
    assert all(abs(share - 0.25) < 0.045 for share in quarters)


def test_the_verifier_tells_values_apart():
    rows = open_task("recall:demonstrations?rows=300&value=2&seed=9")
    completions = [row["completion"] for row in rows]
    answers = [row["answer"] for row in rows]
    assert exact_answer(completions, completions, answer=answers) == [1.0] * 300
    shifted = [*answers[1:], answers[0]]
    expected = [float(one == other) for one, other in zip(answers, shifted, strict=True)]
    assert exact_answer(completions, completions, answer=shifted) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "recall:preference",
            "unknown contract 'preference' in 'recall:preference': allowed are demonstrations, prompts",
        ),
        (
            "recall:prompts?length=47",
            "length=47 in 'recall:prompts?length=47': length is at least 48, the characters of its facts and decoys",
        ),
        ("recall:prompts?facts=27", "facts=27 in 'recall:prompts?facts=27': facts is a whole number from 1 to 26"),
        ("recall:prompts?place=end", "place=end in 'recall:prompts?place=end': place is column or prompt"),
        (
            "recall:demonstrations?facts=3&questions=4",
            "questions=4 in 'recall:demonstrations?facts=3&questions=4': questions is a whole number from 1 to 3",
        ),
        (
            "recall:prompts?terms=2",
            "unknown key 'terms' in 'recall:prompts?terms=2': allowed are split, rows, seed, length, key, value, "
            "facts, decoys, place, questions",
        ),
    ],
)
def test_errors(source, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        open_task(source)
