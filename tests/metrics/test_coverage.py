"""How often 95 % intervals hold the truth: for few prompts, and for rates near 0 and 1, where usual ones do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import comb

import numpy as np
import pytest

from rlhf_lightning.evaluation.win_rate import rate_of
from rlhf_lightning.metrics.intervals import mean_interval, paired_bootstrap, share_interval, wilson_interval

DRAWS = 2000
Draw = np.random.Generator
Shares = Callable[[Draw, int], np.ndarray]


def answers(samples: int, alpha: float, beta: float) -> tuple[Shares, float]:
    """Shares of right samples of prompts whose difficulties have a beta distribution; and their mean."""
    return (lambda draw, count: draw.binomial(samples, draw.beta(alpha, beta, count)) / samples), alpha / (alpha + beta)


def outcomes(win: float, loss: float) -> tuple[Shares, float]:
    """Wins, losses, and ties for the rest; and the win rate."""
    chances = [loss, 1 - win - loss, win]
    return (lambda draw, count: draw.choice([0.0, 0.5, 1.0], count, p=chances)), (1 + win - loss) / 2


def covered(kind: tuple[Shares, float], count: int, interval: Callable[[np.ndarray], tuple[float, float]]) -> float:
    """The share of draws of ``count`` prompts whose interval holds the mean of all prompts."""
    (shares, truth), draw = kind, np.random.default_rng(count)
    ends = np.array([interval(shares(draw, count)) for _ in range(DRAWS)])
    return float(((ends[:, 0] <= truth + 1e-12) & (truth <= ends[:, 1] + 1e-12)).mean())


def of_shares(values: np.ndarray) -> tuple[float, float]:
    found = share_interval(len(values), values.sum(), (values * values).sum())
    return found.low, found.high


def of_wins(values: np.ndarray) -> tuple[float, float]:
    return _of_wins(*(int((values == value).sum()) for value in (1.0, 0.5, 0.0)))


@cache
def _of_wins(wins: int, ties: int, losses: int) -> tuple[float, float]:
    texts = [""] * (wins + ties + losses)
    found = rate_of([0.5] * wins + [0.0] * ties + [-0.5] * losses, texts, texts)
    return found.low, found.high


def of_student(values: np.ndarray) -> tuple[float, float]:
    found = mean_interval(values)
    return found.low, found.high


@pytest.mark.parametrize("kind", [answers(8, 0.8, 1.2), answers(4, 0.2, 0.2), answers(4, 5.0, 2.0)])
@pytest.mark.parametrize("count", [20, 60, 400])
def test_accuracies_of_several_samples(kind: tuple[Shares, float], count: int) -> None:
    assert 0.93 <= covered(kind, count, of_shares) <= 0.97


@pytest.mark.parametrize("kind", [answers(4, 0.2, 5.0), answers(4, 5.0, 0.3), answers(8, 30.0, 0.5)])
def test_accuracies_near_the_ends_of_few_prompts(kind: tuple[Shares, float]) -> None:
    """Student's interval, of 10 prompts, holds the truth in less than 86 of 100 draws."""
    for count in (5, 10, 25):
        assert covered(kind, count, of_shares) >= 0.93
    assert covered(kind, 10, of_student) < 0.86
    assert 0.93 <= covered(kind, 500, of_shares) <= 0.97


@pytest.mark.parametrize("count", [10, 20, 50, 200])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.05), (0.0, 0.1), (0.9, 1.0), (0.3, 0.7), (0.0, 1.0)])
def test_accuracies_of_single_answers_over_rates(count: int, low: float, high: float) -> None:
    """By summation over counts, over rates: as counts are discrete, coverage goes up and down with a single rate."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: no oracle")
    rates = np.linspace(low, high, 402)[1:-1]
    chances = stats.binom.pmf(np.arange(count + 1)[:, None], count, rates)
    found = [wilson_interval(right, count) for right in range(count + 1)]
    holds = np.array([(i.low <= rates) & (rates <= i.high) for i in found])
    assert 0.93 <= (chances * holds).sum(0).mean() <= 0.97


@pytest.mark.parametrize("kind", [outcomes(0.6, 0.1), outcomes(0.3, 0.2), outcomes(0.02, 0.6), outcomes(0.9, 0.02)])
def test_win_rates_with_ties(kind: tuple[Shares, float]) -> None:
    for count in (10, 20):
        assert covered(kind, count, of_wins) >= 0.93
    for count in (60, 400):
        assert 0.93 <= covered(kind, count, of_wins) <= 0.97


def test_win_rates_of_models_that_nearly_always_tie_or_win() -> None:
    for kind in (outcomes(0.05, 0.0), outcomes(0.1, 0.05), outcomes(0.97, 0.03)):
        for count in (5, 20, 50):
            # Of five that all are won, four at 97 %: 0.867 as for any binomial share (see above).
            assert covered(kind, count, of_wins) >= (0.85 if count == 5 else 0.93)
    assert covered(outcomes(0.05, 0.0), 20, of_student) < 0.7


def _exact(count: int, win: float, loss: float) -> float:
    """Coverage of the interval of a difference of single answers, by summation over all numbers of wins and losses."""
    total = 0.0
    for wins in range(count + 1):
        for losses in range(count + 1 - wins):
            ways = comb(count, wins) * comb(count - wins, losses)
            chance = ways * win**wins * loss**losses * (1 - win - loss) ** (count - wins - losses)
            if chance < 1e-6:
                continue
            ours = [1.0] * wins + [0.0] * (count - wins)
            theirs = [0.0] * wins + [1.0] * losses + [0.0] * (count - wins - losses)
            found = paired_bootstrap(ours, theirs, num_resamples=100)
            total += chance * (found.low - 1e-12 <= win - loss <= found.high + 1e-12)
    return total


@pytest.mark.parametrize(
    ("win", "loss"), [(0.02, 0.02), (0.05, 0.0), (0.1, 0.02), (0.2, 0.1), (0.5, 0.3), (0.6, 0.0), (0.9, 0.05)]
)
def test_differences_of_two_models_on_few_prompts(win: float, loss: float) -> None:
    """The percentiles of resamples hold it in 34, 57 and 22 of 100 draws of eight prompts, for some of these."""
    for count in (8, 25):
        assert _exact(count, win, loss) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 25, 800])
@pytest.mark.parametrize(
    ("ours", "theirs"), [((8.0, 1.0), (1.0, 8.0)), ((0.3, 0.3), (0.3, 0.3)), ((10.0, 0.5), (30.0, 0.5))]
)
def test_differences_of_several_samples(count: int, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    """Of difficulties that are and are not the same for both models; far from 0 and near it."""
    draw, hits = np.random.default_rng(count), 0
    truth = ours[0] / sum(ours) - theirs[0] / sum(theirs)
    for _ in range(DRAWS):
        scores = [draw.binomial(4, draw.beta(*of, count)) / 4 for of in (ours, theirs)]
        found = paired_bootstrap(*scores, num_resamples=100)
        hits += found.low <= truth <= found.high
    assert hits / DRAWS >= 0.93
    if count == 800:
        assert hits / DRAWS <= 0.97
