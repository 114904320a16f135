"""Estimates from n samples per prompt of what k samples would reach, without bias: pass@k, maj@k, and the best of k.

All are means over all subsets of k of the n samples, so that one set of samples gives the whole curve over k.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from ..utils.validation import check_count, check_same_length

# Binomial coefficients of more samples are above the largest float.
MOST_SAMPLES = 1000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""Estimates the probability that at least one of k samples is right.

    Paper: Chen et al., 2021 (arXiv:2107.03374), :math:`1 - \binom{n - c}{k} / \binom{n}{k}`: the share of the subsets
    of k of the n samples that hold a right one.

    Args:
        num_samples: n, at least 1.
        num_correct: c, from 0 to n.
        k: from 1 to n.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> pass_at_k(num_samples=4, num_correct=1, k=1), pass_at_k(num_samples=4, num_correct=1, k=4)
        (0.25, 1.0)
    """
    num_samples, num_correct, k = map(_plain, (num_samples, num_correct, k))
    _check_sizes(num_samples, k)
    if isinstance(num_correct, bool) or not isinstance(num_correct, int) or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"num_correct is {num_correct!r}; it must be a whole number from 0 to num_samples={num_samples}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[Hashable | None], values: Sequence[float], k: int) -> float:
    r"""Estimates the value of the most frequent answer among k samples, such as its accuracy (maj@k).

    The mean over the subsets of k of the n samples, by counting: with :math:`n_a` samples of answer a, c votes for the
    winners and m answers that share them, :math:`\sum_{c, m} \frac1m \sum_a v_a` times the number of subsets in which
    a is among the m. Samples without an answer do not vote; answers with equally many votes are equally likely to be
    chosen, and nothing but abstentions has the value 0.

    Args:
        answers: the answer of each sample, ``None`` without one; n of them, 1 to 1,000.
        values: what choosing each sample's answer is worth; that of an answer is the mean of its samples'.
        k: from 1 to n.

    Returns:
        The expected value.

    Raises:
        ValueError: lists of different lengths, or a number out of its range.

    Example:
        >>> [round(majority_at_k(["3", "3", "5"], [1.0, 1.0, 0.0], k), 4) for k in (1, 3)]
        [0.6667, 1.0]
    """
    check_same_length(answers=answers, values=values)
    _check_sizes(len(answers), k)
    if len(answers) > MOST_SAMPLES:
        raise ValueError(f"there are {len(answers)} samples; maj@k takes at most {MOST_SAMPLES}: give a part of them")
    worth: dict[Hashable, list[float]] = {}
    for answer, value in zip(answers, values, strict=True):
        if answer is not None:
            worth.setdefault(answer, []).append(float(value))
    classes = [(len(found), sum(found) / len(found)) for found in worth.values()]
    silent = len(answers) - sum(count for count, _ in classes)
    # Winners have at most the votes of the commonest answer, and enough that all k samples find a place.
    largest = min(k, max((count for count, _ in classes), default=0))
    possible = [v for v in range(1, largest + 1) if silent + sum(min(count, v) for count, _ in classes) >= k]
    ways = sum(_worth_of_winners(classes, silent, k, votes) for votes in possible)
    return float(ways / math.comb(len(answers), k))


def expected_best(scores: Sequence[float], values: Sequence[float] | None = None) -> list[float]:
    r"""Estimates, without bias, what best-of-n gives for every n up to the number of samples, from one set of samples.

    With the scores in ascending order, :math:`E[\max] = \sum_i \binom{i-1}{n-1} / \binom{N}{n}\, r_{(i)}`: the mean
    over all subsets of n samples.

    Args:
        scores: of N independent samples of one prompt, by which the best is chosen.
        values: of the same samples, such as 1 for right ones: the result is then the expected value of the chosen
            sample; ties are broken at random. By default the scores themselves.

    Returns:
        N numbers, for n = 1 to N.

    Raises:
        ValueError: lists of different lengths, more than 1,000 samples, or a score or value that is not finite.

    Example:
        >>> expected_best([1.0, 0.0, 2.0])
        [1.0, 1.6666666666666667, 2.0]
    """
    check_same_length(scores=scores, values=scores if values is None else values)
    if len(scores) > MOST_SAMPLES:
        raise ValueError(f"there are {len(scores)} samples of a prompt; give at most {MOST_SAMPLES} of them")
    for name, given in (("scores", scores), ("values", () if values is None else values)):
        for place, number in enumerate(given):
            if not math.isfinite(number):
                raise ValueError(f"{name}[{place}] is {number}; it must be finite: leave such samples out")
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    chosen = [scores[place] if values is None else values[place] for place in order]
    # Samples of equal score are equally likely to be the chosen one.
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        chosen[start:end] = [sum(chosen[start:end]) / (end - start)] * (end - start)
        start = end
    count = len(scores)
    return [
        sum(math.comb(i, n - 1) * value for i, value in enumerate(chosen)) / math.comb(count, n)
        for n in range(1, count + 1)
    ]


def usual_ks(num_samples: int) -> tuple[int, ...]:
    """Returns the k of a curve over k: powers of two, and the number of samples.

    Example:
        >>> usual_ks(6)
        (1, 2, 4, 6)
    """
    powers = [2**n for n in range(num_samples.bit_length()) if 2**n <= num_samples]
    return tuple(dict.fromkeys([*powers, num_samples]))


def _worth_of_winners(classes: Sequence[tuple[int, float]], silent: int, k: int, votes: int) -> float:
    """Sums, over the subsets of k samples whose winners have this many votes, the mean value of the winners."""
    # By number of samples taken and number of winners: subsets, and the sum of the values of their winners.
    most = k // votes
    subsets = np.zeros((k + 1, most + 1))
    subsets[: min(silent, k) + 1, 0] = [math.comb(silent, taken) for taken in range(min(silent, k) + 1)]
    worth = np.zeros_like(subsets)
    for count, value in classes:
        new_subsets, new_worth = np.zeros_like(subsets), np.zeros_like(worth)
        for taken in range(min(count, votes - 1, k) + 1):
            ways = float(math.comb(count, taken))
            new_subsets[taken:] += ways * subsets[: k + 1 - taken]
            new_worth[taken:] += ways * worth[: k + 1 - taken]
        if count >= votes:
            ways = float(math.comb(count, votes))
            new_subsets[votes:, 1:] += ways * subsets[: k + 1 - votes, :-1]
            new_worth[votes:, 1:] += ways * (worth + value * subsets)[: k + 1 - votes, :-1]
        subsets, worth = new_subsets, new_worth
    return float((worth[k, 1:] / np.arange(1, most + 1)).sum())


def _plain(value: Any) -> Any:
    """Makes numpy's whole numbers Python's."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _check_sizes(num_samples: int, k: int) -> None:
    check_count("num_samples", num_samples, "give at least one sample per prompt")
    check_count("k", k, "1 is the accuracy of a single sample")
    if k > num_samples:
        raise ValueError(f"k is {k}, and there are {num_samples} samples: draw at least k samples, or lower k")
