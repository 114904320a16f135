"""pass@k and maj@k against the enumeration of all subsets."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest

from rlhf_lightning.metrics.at_k import majority_at_k, pass_at_k


@pytest.mark.parametrize("num_samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            subsets = list(combinations(range(num_samples), k))
            share = fmean(any(sample < num_correct for sample in subset) for subset in subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


def test_one_right_sample_of_four_passes_at_four() -> None:
    assert pass_at_k(num_samples=4, num_correct=1, k=4) == 1.0


def majority(answers: list[str | None], values: dict[str, float]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    return fmean(values[answer] for answer, count in votes.items() if count == most)


@pytest.mark.parametrize("seed", range(6))
def test_majority_at_k_is_the_mean_over_all_subsets(seed: int) -> None:
    draw = random.Random(seed)
    answers = [draw.choice(["1", "2", "3", "4", None]) for _ in range(9)]
    values = {answer: draw.choice([0.0, 0.5, 1.0]) for answer in "1234"}
    given = [values[answer] if answer else 7.0 for answer in answers]
    for k in range(1, 10):
        expected = fmean(majority(list(subset), values) for subset in combinations(answers, k))
        assert majority_at_k(answers, given, k) == pytest.approx(expected, abs=1e-12)


def test_many_samples_stay_finite() -> None:
    answers = ["right"] * 400 + ["wrong"] * 300 + [None] * 300
    assert majority_at_k(answers, [1.0] * 400 + [0.0] * 600, k=1000) == pytest.approx(1.0)
    assert majority_at_k(answers, [1.0] * 400 + [0.0] * 600, k=1) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("given", "word"),
    [((4, 5, 1), "num_correct is 5"), ((4, 1, 5), "k is 5, and there are 4 samples"), ((4, 1, 0), "k is 0")],
)
def test_numbers_out_of_range(given: tuple[int, int, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pass_at_k(*given)


def test_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="answers"):
        majority_at_k(["1", "2"], [1.0], 1)
