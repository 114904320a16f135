"""Confidence intervals of shares and means, and tests of the difference of two models on the same prompts.

A result per prompt is one number: the mean over its samples. Prompts are the units that are drawn at random; samples of
one prompt are not independent of each other, and intervals over samples would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..utils.validation import check_count, check_same_length

Values = Sequence[float] | npt.NDArray[np.floating]

# Resamples that are drawn at a time: memory is this many times the number of prompts.
_BLOCK = 1024
_MANY_DEGREES = 10_000
# Shares that are added with the largest spread: n equal ones then leave a doubt of 2.8 / n, and what happens that
# seldom is missed with a probability of 6 %.
_MORE = 2


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.

    Example:
        >>> accuracy = Interval(0.5, 0.4, 0.6)
        >>> accuracy.low <= accuracy.value <= accuracy.high
        True
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A difference of two models on the same prompts.

    Attributes:
        difference: mean of the first's scores less that of the second's.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: probability of a difference at least as large, of either sign, if the two were equally good.

    Example:
        >>> Comparison(0.1, -0.02, 0.22, 0.11).difference
        0.1
    """

    difference: float
    low: float
    high: float
    p_value: float


def wilson_interval(num_successes: int, num_trials: int, level: float = 0.95) -> Interval:
    r"""Computes Wilson's score interval of a share.

    :math:`\frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}`, which stays within [0, 1]
    and covers well for few trials and shares near 0 or 1.

    Args:
        num_successes: from 0 to ``num_trials``.
        num_trials: independent trials, at least 1.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> found = wilson_interval(8, 10)
        >>> found.value, round(found.low, 4), round(found.high, 4)
        (0.8, 0.4902, 0.9433)
    """
    check_count("num_trials", num_trials, "an interval needs at least one trial")
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"num_successes is {num_successes!r}; it must be from 0 to num_trials={num_trials}")
    return _wilson(num_successes / num_trials, num_trials, level)


def _wilson(share: float, num_trials: float, level: float) -> Interval:
    z = NormalDist().inv_cdf(0.5 + _checked_level(level) / 2)
    spread = z * z / num_trials
    middle = share + spread / 2
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4)
    low, high = ((middle + side * half) / (1 + spread) for side in (-1, 1))
    # At 0 and 1 the ends are exact, which rounding hides.
    return Interval(share, 0.0 if share == 0 else low, 1.0 if share == 1 else high)


def mean_interval(values: Values, level: float = 0.95) -> Interval:
    """Computes Student's interval of a mean: mean ± t · s / sqrt(n), with n - 1 degrees of freedom.

    Args:
        values: one per prompt, at least two.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: fewer than two values, a value that is not finite, or a level out of its range.

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0, 4.0])
        >>> found.value, round(found.low, 4), round(found.high, 4)
        (2.5, 0.4457, 4.5543)
    """
    numbers = _checked("values", values)
    mean, error = float(numbers.mean()), float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half = student_quantile(0.5 + _checked_level(level) / 2, len(numbers) - 1) * error
    return Interval(mean, mean - half, mean + half)


def share_interval(count: int, total: float, squares: float, level: float = 0.95) -> Interval:
    r"""Computes the interval of a mean of shares, from their number, their sum and the sum of their squares.

    That of Wilson for :math:`n_{\text{eff}} = n\, p (1 - p) / s^2` trials, with the mean p and
    :math:`s^2 = (\sum_i (x_i - p)^2 + 2 p (1 - p)) / (n + 2)`: the spread of the shares, as if two more had been spread
    as widely as shares can be. Where every share is 0 or 1, it is Wilson's of n trials. Few shares that are alike say
    little about the others: Student's interval, without the two, has no width where all are equal, and
    covers far less than it says near 0 and 1. The whole range for a single share in between.

    Args:
        count: number of shares, at least 1.
        total: their sum.
        squares: sum of their squares.
        level: of confidence, in (0, 1).

    Raises:
        ValueError: no shares, or a level out of its range.

    Example:
        >>> share_interval(10, 8.0, 8.0) == wilson_interval(8, 10), share_interval(1, 0.25, 0.0625)
        (True, Interval(value=0.25, low=0.0, high=1.0))
    """
    check_count("count", count, "an interval needs at least one share")
    if squares == total:
        return wilson_interval(round(total), count, level)
    mean = total / count
    if count == 1:
        return Interval(mean, 0.0, 1.0)
    widest = mean * (1 - mean)
    spread = (max(0.0, squares - total * mean) + _MORE * widest) / (count + _MORE)
    return _wilson(mean, count * widest / spread, level)


def student_quantile(probability: float, degrees: int) -> float:
    """Returns the value that Student's t distribution stays below with this probability.

    Args:
        probability: in [0.5, 1).
        degrees: of freedom, at least 1.

    Example:
        >>> round(student_quantile(0.975, 10), 4)
        2.2281
    """
    # For many degrees the expansion around the normal quantile z (Abramowitz and Stegun, 26.7.5) is exact enough.
    if degrees > _MANY_DEGREES:
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)

    # The distribution function for whole degrees is a finite sum (26.7.3 and 26.7.4) in the angle
    # atan(t / sqrt(degrees)); its inverse by bisection over the angle, to the last bit.
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        angle = (low + high) / 2
        low, high = (low, angle) if _student_central(angle, degrees) > 2 * probability - 1 else (angle, high)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_central(angle: float, degrees: int) -> float:
    """The probability that ``abs(t)`` is below ``sqrt(degrees) * tan(angle)``."""
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for index in range(1, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (index + 1) / (index + 2)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for index in range(0, degrees, 2):
        total += term
        term *= cosine * cosine * (index + 1) / (index + 2)
    return sine * total


def paired_bootstrap(
    scores_a: Values, scores_b: Values, *, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Compares two models on the same prompts.

    The interval is the bootstrap's: quantiles of the mean difference over prompts that are drawn again with
    replacement, widened for small numbers of prompts (the expanded percentile interval of Hesterberg, 2015,
    arXiv:1411.5279: quantiles at the normal tail of sqrt(n / (n - 1)) · t). Of scores in [0, 1] it is that of
    ``share_interval`` for (1 + difference) / 2: resamples of few prompts that differ vary too little, and not at all
    where all differ alike. The p-value is that of the paired permutation test: the share of random signs of the
    differences, the given ones among them, whose mean is at least as far from 0. That test holds its level for any
    distribution.

    Args:
        scores_a: the first model's score of each prompt.
        scores_b: the second's, of the same prompts in the same order; at least two.
        num_resamples: number of resamples, at least 100, for each of the two.
        level: of confidence, in (0, 1).
        seed: of the resamples.

    Raises:
        ValueError: different numbers of prompts, a score that is not finite, or a number out of its range.

    Example:
        >>> found = paired_bootstrap([1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 1, 0], seed=0)
        >>> found.difference, found.low > 0, found.p_value < 0.1
        (0.625, True, True)
    """
    ours, theirs = _numbers("scores_a", scores_a), _numbers("scores_b", scores_b)
    if ours.ndim == theirs.ndim == 1:
        check_same_length(scores_a=ours, scores_b=theirs)
    ours, theirs = _checked("scores_a", ours), _checked("scores_b", theirs)
    differences = ours - theirs
    if not isinstance(num_resamples, Integral) or num_resamples < 100:
        raise ValueError(
            f"num_resamples is {num_resamples!r}; it must be a whole number of at least 100 (10000 is usual)"
        )
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at least 0")
    count, observed = len(differences), float(differences.mean())
    generator, means, extreme = np.random.default_rng(seed), [], 0
    # A sum in another order may differ in its last bits: such means are equal.
    least = abs(observed) - 1e-12 * float(np.abs(differences).mean())
    are_shares = bool((np.minimum(ours, theirs) >= 0).all() and (np.maximum(ours, theirs) <= 1).all())
    for start in range(0, num_resamples, _BLOCK):
        size = min(_BLOCK, num_resamples - start), count
        if not are_shares:
            means.append(differences[generator.integers(0, count, size)].mean(axis=1))
        signs = generator.integers(0, 2, size, dtype=np.int8) * 2 - 1
        extreme += int((np.abs((signs * differences).mean(axis=1)) >= least).sum())
    p_value = (extreme + 1) / (num_resamples + 1)
    if are_shares:
        shares = (1 + differences) / 2
        found = share_interval(count, float(shares.sum()), float((shares * shares).sum()), level)
        return Comparison(observed, 2 * found.low - 1, 2 * found.high - 1, p_value)
    reach = math.sqrt(count / (count - 1)) * student_quantile(0.5 + _checked_level(level) / 2, count - 1)
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Comparison(observed, float(low), float(high), p_value)


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """Tests whether two models are right equally often on the same prompts; returns the exact two-sided p-value.

    McNemar (1947): of the prompts on which one model alone is right, each model should have half. With b of them
    for one and c for the other, the p-value is that of min(b, c) in a binomial distribution, doubled, and at most 1.

    Args:
        right_a: whether the first model was right, per prompt.
        right_b: whether the second was, on the same prompts.

    Raises:
        ValueError: different numbers of prompts, or a value that is neither true (1) nor false (0).

    Example:
        >>> mcnemar([True, True, False, True], [True, False, True, False])
        1.0
        >>> mcnemar([False] * 6, [True] * 6)
        0.03125
    """
    right_a, right_b = _verdicts("right_a", right_a), _verdicts("right_b", right_b)
    check_same_length(right_a=right_a, right_b=right_b)
    only_a = sum(bool(a) and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(bool(b) and not a for a, b in zip(right_a, right_b, strict=True))
    total, fewest = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, index) for index in range(fewest + 1))
    return min(1.0, float(2 * tail / (1 << total)))


def _verdicts(name: str, values: Sequence[bool]) -> list[bool]:
    numbers = _numbers(name, values)
    if numbers.ndim != 1:
        raise ValueError(f"{name} has the shape {numbers.shape}; give one verdict per prompt")
    for index, value in enumerate(numbers.tolist()):
        if value not in (0.0, 1.0):
            raise ValueError(f"{name}[{index}] is {value}; write True or False, and shares to paired_bootstrap")
    return [value == 1.0 for value in numbers.tolist()]


def _numbers(name: str, values: Any) -> npt.NDArray[np.float64]:
    """Converts numbers to fp64, also tensors of any type and device."""
    if isinstance(values, Tensor):
        found: npt.NDArray[np.float64] = values.detach().cpu().double().numpy()
        return found
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r:.80}; give a list or an array with one number per prompt") from None


def _checked(name: str, values: Values) -> npt.NDArray[np.float64]:
    numbers = _numbers(name, values)
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"{name} has the shape {numbers.shape}; give one number per prompt, of at least two prompts")
    if not np.isfinite(numbers).all():
        index = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"{name}[{index}] is {numbers[index]}; every score must be finite: leave such prompts out")
    return numbers


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; it must be in (0, 1) (0.95 is usual)")
    return level
