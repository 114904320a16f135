"""A panel's reward against means that are written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_lightning.rewards import JudgePanel

ASPECTS = {"polite": "It is polite.", "short": "It is short."}


class Scripted:
    """A judge that knows its verdicts by completion and statement."""

    def __init__(self, verdicts: dict[tuple[str, str], Any]) -> None:
        self.verdicts = verdicts
        self.calls = 0

    def __call__(self, questions: Sequence[str]) -> list[Any]:
        self.calls += 1
        found = []
        for question in questions:
            answer = question.partition("answered:\n")[2].partition("\n")[0]
            statement = question.partition("true of the answer: ")[2].partition("\n")[0]
            found.append(self.verdicts[answer, statement])
        return found


@pytest.fixture
def judges() -> dict[str, Scripted]:
    polite, short = ASPECTS.values()
    failure = ValueError("no verdict in 'hm'")
    first = {("a", polite): 0.8, ("a", short): 1.0, ("b", polite): 0.0, ("b", short): 0.5}
    second = {("a", polite): 0.4, ("a", short): failure, ("b", polite): 1.0, ("b", short): 0.1}
    return {"first": Scripted(first), "second": Scripted(second)}


def test_rewards_are_means_over_judges_and_aspects(judges: dict[str, Scripted]) -> None:
    # a: polite (0.8 + 0.4) / 2 = 0.6, short 1.0 by one judge; b: polite 0.5, short 0.3.
    assert JudgePanel(judges, ASPECTS)(["p", "p"], ["a", "b"]) == pytest.approx([0.8, 0.4])
    weighted = JudgePanel(judges, ASPECTS, weights={"polite": 3.0, "short": 1.0})
    assert weighted(["p", "p"], ["a", "b"]) == pytest.approx([0.7, 0.45])
    assert JudgePanel(judges, ASPECTS, combine="min")(["p", "p"], ["a", "b"]) == pytest.approx([0.6, 0.3])


def test_each_judge_is_asked_once_and_by_name(judges: dict[str, Scripted]) -> None:
    found = JudgePanel(judges, ASPECTS).verdicts(["p"], ["a"])
    assert found == [{"polite": {"first": 0.8, "second": 0.4}, "short": {"first": 1.0, "second": None}}]
    assert [judge.calls for judge in judges.values()] == [1, 1]


def test_an_aspect_without_a_verdict_gives_none() -> None:
    silent = Scripted({("a", "It is polite."): ValueError("nonsense"), ("a", "It is short."): 1.0})
    assert JudgePanel({"only": silent}, ASPECTS)(["p"], ["a"]) == [None]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"judges": {}}, "judges is {}"),
        ({"aspects": {}}, "aspects is {}"),
        ({"weights": {"polite": 1.0}}, "give one each"),
        ({"weights": {"polite": 1.0, "short": 0.0}}, "weight of aspect 'short'"),
        ({"combine": "min", "weights": {"polite": 1.0, "short": 1.0}}, "leave one of them out"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"question": "{answer}"}, "wrong field"),
    ],
)
def test_mistakes(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        JudgePanel(**{"judges": {"a": Scripted({})}, "aspects": ASPECTS} | options)
