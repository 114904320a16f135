"""Intervals and tests against scipy, and their coverage and level by simulation."""

from __future__ import annotations

from itertools import product
from statistics import fmean

import numpy as np
import pytest

from rlhf_lightning.metrics.intervals import (
    mcnemar,
    mean_interval,
    paired_bootstrap,
    share_interval,
    student_quantile,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: no oracle")
optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 5), (3, 7), (50, 100), (100, 100)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson(successes: int, trials: int, level: float) -> None:
    found = wilson_interval(successes, trials, level)
    expected = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 1001, 9_999, 10_001, 500_000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9999])
def test_student(degrees: int, probability: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(
        stats.t.ppf(probability, degrees), rel=1e-7, abs=1e-9
    )


def test_mean_interval() -> None:
    values = np.random.default_rng(0).normal(size=13)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = mean_interval(values, 0.9)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), expected.low, expected.high))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        right_a, right_b = draw.random((2, 15)) < 0.5
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert mcnemar(right_a, right_b) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_is_that_of_all_signs() -> None:
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.5, -0.5, 0.25, 1.0])
    signs = np.array(list(product([-1, 1], repeat=len(differences))))
    exact = fmean(np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12)
    found = paired_bootstrap(differences, np.zeros(8), num_resamples=200_000, seed=3)
    assert found.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact / 200_000))
    assert found.difference == differences.mean()


def test_the_interval_is_that_of_scipy_but_for_its_width() -> None:
    draw = np.random.default_rng(2)
    scores_a, scores_b = draw.random((2, 400))
    expected = stats.bootstrap(
        (scores_a, scores_b),
        lambda a, b: a.mean() - b.mean(),
        paired=True,
        vectorized=False,
        method="percentile",
        rng=0,
    ).confidence_interval
    found = paired_bootstrap(scores_a, scores_b, num_resamples=20_000, seed=0)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_the_same_seed_gives_the_same_result_and_swapped_models_the_opposite() -> None:
    scores_a, scores_b = np.random.default_rng(3).random((2, 50))
    found = paired_bootstrap(scores_a, scores_b, seed=5)
    assert found == paired_bootstrap(list(scores_a), list(scores_b), seed=5)
    other = paired_bootstrap(scores_b, scores_a, seed=5)
    assert (other.difference, other.low, other.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert other.p_value == found.p_value


def test_equal_models_differ_by_nothing() -> None:
    found = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.difference, found.p_value) == (0.0, 1.0)
    # Three prompts of one kind leave a doubt: of 7.5 trials, which have the variance of three ties, a win and a loss.
    end = 1.959964 / np.sqrt(7.5 + 1.959964**2)
    assert (found.low, found.high) == pytest.approx((-end, end), abs=1e-6)
    scale = paired_bootstrap([3.0, 2.0, 9.0], [3.0, 2.0, 9.0])  # no shares: there is no largest spread
    assert (scale.low, scale.high) == (0.0, 0.0)


def test_means_and_shares_of_samples_cover_as_often_as_they_say() -> None:
    draw = np.random.default_rng(6)
    means, shares = 0, 0
    for _ in range(2000):
        interval = mean_interval(draw.normal(2.0, 3.0, 12))
        means += interval.low <= 2.0 <= interval.high
        # Eight samples of 60 prompts that are more or less difficult: samples of one prompt are not independent.
        right = draw.binomial(8, draw.beta(0.8, 1.2, 60)) / 8
        found = share_interval(60, right.sum(), (right * right).sum())
        shares += found.low <= 0.4 <= found.high
    assert 0.93 <= means / 2000 <= 0.97
    assert 0.93 <= shares / 2000 <= 0.97


@pytest.mark.parametrize("values", [[0.25, 0.5, 1.0, 0.0, 0.75], [0.5, 0.5, 0.5], [1.0] * 20 + [0.875]])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_shares_is_where_the_score_test_accepts(values: list[float], level: float) -> None:
    """Its ends are the means for which the observed one is z deviations away, if trials had the variance of shares."""
    shares = np.array(values)
    found = share_interval(len(shares), shares.sum(), (shares * shares).sum(), level)
    # The variance of the shares and of two that are added with the largest one, per that of a trial.
    mean, count = shares.mean(), len(shares)
    spread = ((shares - mean) ** 2).sum() + 2 * mean * (1 - mean)
    ratio = spread / (count + 2) / (mean * (1 - mean))
    z = stats.norm.ppf(0.5 + level / 2)
    away = lambda p: abs(mean - p) / np.sqrt(ratio * p * (1 - p) / count) - z  # noqa: E731
    assert found.low == pytest.approx(optimize.brentq(away, 1e-12, mean))
    assert found.high == pytest.approx(optimize.brentq(away, mean, 1 - 1e-12))


def test_the_interval_of_single_verdicts_is_wilsons() -> None:
    assert share_interval(7, 3.0, 3.0) == wilson_interval(3, 7)
    with pytest.raises(ValueError, match="count is 0"):
        share_interval(0, 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_intervals_cover_as_often_as_they_say(kind: str) -> None:
    draw = np.random.default_rng(4)
    covered, rejected, wilson = 0, 0, 0
    for trial in range(2000):
        if kind == "binary":
            shared = draw.random(100)
            scores_a, scores_b = (shared < 0.5).astype(float), ((shared + draw.normal(0, 0.3, 100)) < 0.4).astype(float)
            # The mean of Phi((0.4 - s) / 0.3) over s in [0, 1], by the integral u Phi(u) + phi(u) of Phi.
            ends = [u * stats.norm.cdf(u) + stats.norm.pdf(u) for u in (0.4 / 0.3, -0.6 / 0.3)]
            truth = 0.5 - 0.3 * (ends[0] - ends[1])
        else:
            scores_a, scores_b = draw.exponential(1.0, 100), draw.exponential(0.5, 100)
            truth = 0.5
        found = paired_bootstrap(scores_a, scores_b, num_resamples=999, seed=trial)
        covered += found.low <= truth <= found.high
        mixed = np.where(draw.random(100) < 0.5, scores_a, scores_b)
        other = np.where(mixed == scores_a, scores_b, scores_a)
        rejected += paired_bootstrap(mixed, other, num_resamples=999, seed=trial).p_value <= 0.05
        number = int((draw.random(100) < 0.3).sum())
        interval = wilson_interval(number, 100)
        wilson += interval.low <= 0.3 <= interval.high
    assert 0.93 <= covered / 2000 <= 0.97
    assert 0.93 <= wilson / 2000 <= 0.97
    assert rejected / 2000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (lambda: paired_bootstrap([1.0], [0.0]), "at least two prompts"),
        (lambda: paired_bootstrap([1.0, 2.0], [0.0]), "scores_a"),
        (lambda: paired_bootstrap([1.0, float("nan")], [0.0, 1.0]), r"scores_a\[1\] is nan"),
        (lambda: paired_bootstrap([1.0, 2.0], [0.0, 1.0], num_resamples=5), "num_resamples is 5"),
        (lambda: wilson_interval(5, 4), "num_successes is 5"),
        (lambda: wilson_interval(1, 0), "num_trials is 0"),
        (lambda: mean_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: mcnemar([True], [True, False]), "right_a"),
    ],
)
def test_bad_input(run: object, word: str) -> None:
    assert callable(run)
    with pytest.raises(ValueError, match=word):
        run()
