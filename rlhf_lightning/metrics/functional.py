"""Formulas of the metrics: pure functions of all values of a batch.

Shapes: B values, K attributes, M steps, S sequences, N bins or tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.transfer import count_index
from ..utils.validation import check_same_shape

NO_ERROR = -1  # index of the first error in a sequence without one


def expected_calibration_error(confidence_B: Tensor, correct_B: Tensor, num_bins: int = 15) -> Tensor:
    r"""Computes the expected calibration error, the mean difference of confidence and accuracy over bins.

    Paper: Guo et al., 2017 (arXiv:1706.04599): sum over bins of (n_b / n) abs(accuracy_b - mean confidence_b). For a
    reward model, the confidence is the Bradley-Terry probability of the completion with the higher reward.

    Args:
        confidence_B: in [0, 1], at least one.
        correct_B: whether the prediction was right, bool or 0 and 1, the same shape.
        num_bins: at least 1.

    Returns:
        A scalar in [0, 1], fp64.

    Raises:
        ValueError: shapes that differ, or a confidence outside [0, 1].

    Example:
        >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 0, 1, 0]), num_bins=10)
        tensor(0.2500, dtype=torch.float64)
    """
    return error_of_bins(calibration_bins(confidence_B, correct_B, num_bins))


def calibration_bins(confidence_B: Tensor, correct_B: Tensor, num_bins: int) -> Tensor:
    """Counts predictions by confidence, in bins of equal width.

    Args:
        confidence_B: in [0, 1].
        correct_B: whether the prediction was right, the same shape.
        num_bins: N, at least 1.

    Returns:
        (3, N), fp64: number of predictions, sum of confidences, number of right ones.

    Raises:
        ValueError: shapes that differ, or a confidence outside [0, 1].
    """
    check_same_shape("B", confidence_B=confidence_B, correct_B=correct_B)
    confidence_B = confidence_B.detach().double()
    outside = ~((confidence_B >= 0) & (confidence_B <= 1))
    if outside.any():
        raise ValueError(f"a confidence is {confidence_B[outside][0].item():.4g}, outside [0, 1]: give probabilities")

    # The last bin includes 1.
    bins_B = (confidence_B * num_bins).long().clamp(max=num_bins - 1)
    values_3B = torch.stack([torch.ones_like(confidence_B), confidence_B, correct_B.double()])
    return values_3B.new_zeros(3, num_bins).index_add(1, bins_B, values_3B)


def error_of_bins(bins_3N: Tensor) -> Tensor:
    """Computes the expected calibration error of ``calibration_bins``, which may be added up before."""
    count_N, confidence_N, correct_N = bins_3N
    error: Tensor = (confidence_N - correct_N).abs().sum() / count_N.sum()
    return error


def token_divergences(log_p_NV: Tensor, log_q_NV: Tensor, target_ids_N: Tensor) -> Tensor:
    r"""Computes how far two distributions are apart at each token, over the whole vocabulary and at the token itself.

    Args:
        log_p_NV: log-probabilities of the model; ``-inf`` for what is impossible.
        log_q_NV: of the reference.
        target_ids_N: the tokens x.

    Returns:
        (6, N), fp64: :math:`\sum_v p_v (\log p_v - \log q_v)`, the same with p and q exchanged, k1
        :math:`= \log p(x) - \log q(x)`, k3 :math:`= q(x)/p(x) - 1 - \log(q(x)/p(x))`, :math:`\log p(x)`,
        :math:`\log q(x)`.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> [round(float(value), 4) for value in token_divergences(p, q, torch.tensor([0]))[:2, 0]]
        [0.1438, 0.1308]
    """
    check_same_shape("NV", log_p_NV=log_p_NV, log_q_NV=log_q_NV)
    own, other = (logs.gather(1, target_ids_N[:, None])[:, 0].double() for logs in (log_p_NV, log_q_NV))
    difference = log_p_NV - log_q_NV
    # Tokens of zero probability add nothing, whatever the other distribution gives them.
    forward, reverse = (
        torch.where(logs == -torch.inf, 0.0, logs.exp() * gap).sum(1, dtype=torch.float64)
        for logs, gap in ((log_p_NV, difference), (log_q_NV, -difference))
    )
    k3 = torch.expm1(other - own) - (other - own)
    return torch.stack((forward, reverse, own - other, k3, own, other))


def attribute_correlation(rewards_BK: Tensor, ratings_BK: Tensor) -> Tensor:
    """Computes Pearson's correlation of each attribute's reward with its rating, over the rows where it was rated.

    Args:
        rewards_BK: (B, K).
        ratings_BK: the same shape; NaN where an attribute was not rated.

    Returns:
        (K,) in [-1, 1], fp64; nan where an attribute has fewer than two different ratings or rewards.

    Raises:
        ValueError: shapes that differ or are not (B, K).

    Example:
        >>> attribute_correlation(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([1.], dtype=torch.float64)
    """
    check_same_shape("BK", rewards_BK=rewards_BK, ratings_BK=ratings_BK)
    rated_BK = ~ratings_BK.isnan()
    x_BK = torch.where(rated_BK, rewards_BK.detach().double(), 0.0)
    y_BK = torch.where(rated_BK, ratings_BK.double(), 0.0)
    n, x, y = rated_BK.double().sum(0), x_BK.sum(0), y_BK.sum(0)
    xx, yy, xy = x_BK.square().sum(0), y_BK.square().sum(0), (x_BK * y_BK).sum(0)

    # A variance within rounding noise is that of a constant.
    variance_x, variance_y = n * xx - x * x, n * yy - y * y
    is_constant = (variance_x <= 1e-12 * n * xx) | (variance_y <= 1e-12 * n * yy)
    spread = (variance_x * variance_y).clamp_min(1e-300).sqrt()
    return torch.where(is_constant, torch.nan, (n * xy - x * y) / spread)


def first_errors(scores_M: Tensor, sequence_index_M: Tensor, num_sequences: int, threshold: float = 0.5) -> Tensor:
    """Finds the first step of each sequence whose score is below a threshold.

    Args:
        scores_M: (M,) probabilities that steps are right, or labels, in the order of the steps.
        sequence_index_M: (M,) the sequence of each step, ascending.
        num_sequences: S.
        threshold: a step with a lower score is an error.

    Returns:
        (S,) step numbers from 0; ``NO_ERROR`` without one.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> first_errors(torch.tensor([0.9, 0.2, 0.1, 0.8]), torch.tensor([0, 0, 0, 1]), 2)
        tensor([ 1, -1])
    """
    check_same_shape("M", scores_M=scores_M, sequence_index_M=sequence_index_M)
    counts_S = count_index(sequence_index_M, num_sequences)
    first_S = counts_S.cumsum(0) - counts_S
    step_M = torch.arange(len(scores_M), device=scores_M.device) - first_S[sequence_index_M]
    none = len(scores_M) + 1
    step_M = torch.where(scores_M < threshold, step_M, none)
    found_S = step_M.new_full((num_sequences,), none).scatter_reduce(0, sequence_index_M, step_M, "amin")
    return torch.where(found_S == none, NO_ERROR, found_S)


class FirstError(NamedTuple):
    """Accuracy of predicted first errors.

    Args:
        f1: harmonic mean of the two accuracies.
        with_error: share of sequences with an error whose first error was found.
        without_error: share of sequences without an error in which no error was predicted.
    """

    f1: Tensor
    with_error: Tensor
    without_error: Tensor


def first_error_f1(predicted_S: Tensor, expected_S: Tensor) -> FirstError:
    """Computes the F1 of ProcessBench, which rewards finding the first wrong step, and none where all are right.

    Paper: ProcessBench (Zheng et al., 2024, arXiv:2412.06559): the harmonic mean of the accuracies on sequences with
    and without an error.

    Args:
        predicted_S: step numbers, ``NO_ERROR`` for none.
        expected_S: the same shape.

    Returns:
        F1 and both accuracies, scalars in [0, 1], fp64; nan without sequences of a kind.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> first_error_f1(torch.tensor([1, 2, -1]), torch.tensor([1, 0, -1])).f1
        tensor(0.6667, dtype=torch.float64)
    """
    return f1_of_counts(first_error_counts(predicted_S, expected_S))


def first_error_counts(predicted_S: Tensor, expected_S: Tensor) -> Tensor:
    """Counts sequences with an error, those of them whose first error was found, and the same without an error.

    Args:
        predicted_S: step numbers, ``NO_ERROR`` for none.
        expected_S: the same shape.

    Returns:
        (4,), int64: with an error, found; without an error, none predicted.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape("S", predicted_S=predicted_S, expected_S=expected_S)
    has_error, is_hit = expected_S != NO_ERROR, predicted_S == expected_S
    return torch.stack([has_error.sum(), (has_error & is_hit).sum(), (~has_error).sum(), (~has_error & is_hit).sum()])


def f1_of_counts(counts_4: Tensor) -> FirstError:
    """Computes the F1 of ``first_error_counts``, which may be added up before."""
    errors, found, sound, passed = counts_4.double()
    with_error, without_error = found / errors, passed / sound
    total = with_error + without_error
    f1 = torch.where(total == 0, 0.0, 2 * with_error * without_error / total)
    return FirstError(f1, with_error, without_error)
