"""Scorers of samples: failures count over calls, however samples are put together."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.self_improvement.scorers import load_scorer


def flaky(prompts: Any, completions: list[str]) -> list[Any]:
    return [RuntimeError("timeout") if text == "bad" else 1.0 for text in completions]


def test_a_failure_is_no_score_however_many_samples_share_a_call():
    score = load_scorer(f"{__name__}.flaky")
    assert score(["p"], ["bad"]) == [None]
    assert score(["p", "p"], ["ok", "bad"]) == [1.0, None]
    assert score([], []) == []


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_reward_that_always_fails_is_an_error(size):
    score = load_scorer(f"{__name__}.flaky")
    for _ in range(2):
        for _ in range(8 // size - 1):
            assert score(["p"] * size, ["bad"] * size) == [None] * size
        assert score(["p"], ["ok"]) == [1.0]  # it works: the count begins again
    for _ in range(8 // size - 1):
        score(["p"] * size, ["bad"] * size)
    with pytest.raises(ValueError, match=r"flaky' failed on all of 8 samples: .*timeout"):
        score(["p"] * size, ["bad"] * size)
