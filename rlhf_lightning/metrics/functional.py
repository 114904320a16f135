"""Formulas of the metrics: pure functions of all values of a batch.

Shapes: B values, K attributes, M steps, S sequences, N bins.
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
    check_same_shape("B", confidence_B=confidence_B, correct_B=correct_B)
    confidence_B = confidence_B.detach().double()
    outside = ~((confidence_B >= 0) & (confidence_B <= 1))
    if outside.any():
        raise ValueError(f"a confidence is {confidence_B[outside][0].item():.4g}, outside [0, 1]: give probabilities")

    # Per bin: number of values, sum of confidences, number of hits. The last bin includes 1.
    bins_B = (confidence_B * num_bins).long().clamp(max=num_bins - 1)
    values_3B = torch.stack([torch.ones_like(confidence_B), confidence_B, correct_B.double()])
    count_N, confidence_N, correct_N = values_3B.new_zeros(3, num_bins).index_add(1, bins_B, values_3B)
    error: Tensor = (confidence_N - correct_N).abs().sum() / count_N.sum()
    return error


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
    check_same_shape("S", predicted_S=predicted_S, expected_S=expected_S)
    has_error, is_hit = expected_S != NO_ERROR, predicted_S == expected_S
    with_error = (has_error & is_hit).sum().double() / has_error.sum()
    without_error = (~has_error & is_hit).sum().double() / (~has_error).sum()
    total = with_error + without_error
    f1 = torch.where(total == 0, 0.0, 2 * with_error * without_error / total)
    return FirstError(f1, with_error, without_error)
