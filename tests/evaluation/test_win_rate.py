"""Win rates by rewards and by judges of both orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_lightning.evaluation import win_rate

PROMPTS = ["p0", "p1", "p2", "p3"]


def by_length(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [None if "?" in text else float(len(text)) for text in completions]


def test_rewards_and_ties() -> None:
    found = win_rate(PROMPTS, ["aaa", "aa", "a", "?"], ["a", "aa", "aaa", "a"], reward=by_length)
    assert (found.value, found.wins, found.ties, found.losses, found.undecided) == (0.5, 1, 1, 1, 1)
    assert found.consistent is None
    assert 0 <= found.low < 0.5 < found.high <= 1
    wide = win_rate(PROMPTS[:3], ["aaa", "aa", "a"], ["a", "aa", "aaaa"], reward=by_length, tie_margin=2)
    assert (wide.wins, wide.ties, wide.losses) == (0, 2, 1)


class Judge:
    """Prefers longer answers, and the first place by some margin."""

    def __init__(self, bias: float = 0.0) -> None:
        self.bias, self.asked = bias, []

    def __call__(self, questions: Sequence[str]) -> list[float | Exception]:
        self.asked += questions
        found: list[float | Exception] = []
        for question in questions:
            first, second = question.split("|")[1:3]
            if "{" in first + second:
                found.append(ValueError("cannot read"))
            else:
                found.append(min(1.0, max(0.0, 0.5 + self.bias + 0.1 * (len(first) - len(second)))))
        return found


QUESTION = "{prompt}|{first}|{second}"


def test_both_orders_remove_the_favour_of_a_place() -> None:
    judge = Judge(bias=0.2)
    found = win_rate(PROMPTS, ["aaaa", "a", "aa", "same"], ["a", "aaaa", "a", "same"], judge=judge, question=QUESTION)
    assert len(judge.asked) == 6  # equal texts are not asked
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.consistent == pytest.approx(2 / 3)  # one token does not outweigh the place
    assert found.length_controlled != found.value


def test_braces_in_answers_are_text_and_nonsense_is_undecided() -> None:
    judge = Judge()
    found = win_rate(PROMPTS, ["{second}", "aaa", "a", "aa"], ["b", "a", "aaa", "a"], judge=judge, question=QUESTION)
    assert judge.asked[0] == "p0|{second}|b"
    assert (found.undecided, found.wins, found.losses) == (1, 2, 1)
    with pytest.raises(ValueError, match="0 of 2 prompts have a verdict"):
        win_rate(PROMPTS[:2], ["a", "b"], ["c", "d"], judge=lambda texts: ["yes"] * len(texts))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "one of reward and judge"),
        ({"reward": by_length, "judge": Judge()}, "one of reward and judge"),
        ({"reward": by_length, "tie_margin": -1}, "tie_margin is -1"),
        ({"judge": Judge(), "question": "{first} {second}"}, "has no {prompt}"),
        ({"judge": lambda texts: [1.0]}, "1 verdicts for 8 questions"),
    ],
)
def test_bad_input(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        win_rate(PROMPTS, ["a"] * 4, ["b"] * 4, **options)
