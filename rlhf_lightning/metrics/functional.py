"""Formulas of the metrics, on sums that can be added over batches and ranks before division.

Shapes: P pairs, B values, K attributes, M steps, S sequences, N bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_ERROR = -1  # index of the first error in a sequence without one


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes differ ({text}): give tensors of one shape")


def preference_accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Computes the share of pairs whose chosen completion has the higher reward; equal rewards count as wrong.

    Args:
        chosen_P: rewards of the chosen completions, at least one.
        rejected_P: rewards of the rejected ones, the same shape.

    Returns:
        A scalar in [0, 1], fp64.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> preference_accuracy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, -1.0]))
        tensor(0.6667, dtype=torch.float64)
    """
    _check_same_shape(chosen_P=chosen_P, rejected_P=rejected_P)
    return (chosen_P > rejected_P).double().mean()


def preference_margin(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Computes the mean of chosen minus rejected reward.

    Args:
        chosen_P: rewards of the chosen completions, at least one.
        rejected_P: rewards of the rejected ones, the same shape.

    Returns:
        A scalar, fp64.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> preference_margin(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    _check_same_shape(chosen_P=chosen_P, rejected_P=rejected_P)
    return (chosen_P.double() - rejected_P.double()).mean()


def calibration_sums(confidence_B: Tensor, correct_B: Tensor, num_bins: int) -> Tensor:
    """Computes the sums of the calibration error: per bin count, sum of confidences and hits, ``(3, N)`` in fp64.

    Args:
        confidence_B: in [0, 1].
        correct_B: whether the prediction was right, bool or 0 and 1, the same shape.
        num_bins: bins of equal width over [0, 1]; the last one includes 1.

    Raises:
        ValueError: shapes that differ, or a confidence outside [0, 1].

    Example:
        >>> calibration_sums(torch.tensor([0.2, 0.9]), torch.tensor([True, True]), num_bins=2).tolist()
        [[1.0, 1.0], [0.20000000298023224, 0.8999999761581421], [1.0, 1.0]]
    """
    _check_same_shape(confidence_B=confidence_B, correct_B=correct_B)
    confidence = confidence_B.detach().double().flatten()
    outside = ~((confidence >= 0) & (confidence <= 1))
    if outside.any():
        raise ValueError(f"a confidence is {confidence[outside][0].item():.4g}, outside [0, 1]: give probabilities")
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, correct_B.double().flatten()])
    return values.new_zeros(3, num_bins).index_add(1, bins, values)


def calibration_error(sums: Tensor) -> Tensor:
    """Computes the calibration error from the sums of ``calibration_sums``: a scalar; nan without any value."""
    count, confidence, correct = sums
    error: Tensor = (confidence - correct).abs().sum() / count.sum()
    return error


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
    return calibration_error(calibration_sums(confidence_B, correct_B, num_bins))


def correlation_sums(rewards_BK: Tensor, ratings_BK: Tensor) -> Tensor:
    """Computes the sums of the correlation: per attribute n, x, y, xx, yy, xy, ``(6, K)`` in fp64.

    Args:
        rewards_BK: (B, K).
        ratings_BK: the same shape; NaN where an attribute was not rated.

    Raises:
        ValueError: shapes that differ or are not (B, K).

    Example:
        >>> correlation_sums(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [float("nan")]])).flatten().tolist()
        [1.0, 1.0, 3.0, 1.0, 9.0, 3.0]
    """
    _check_same_shape(rewards_BK=rewards_BK, ratings_BK=ratings_BK)
    if rewards_BK.ndim != 2:
        raise ValueError(f"rewards_BK has shape {tuple(rewards_BK.shape)}: give (B, K), one column per attribute")
    counts = ~ratings_BK.isnan()
    x = torch.where(counts, rewards_BK.detach().double(), 0.0)
    y = torch.where(counts, ratings_BK.double(), 0.0)
    return torch.stack([counts.double(), x, y, x * x, y * y, x * y]).sum(dim=1)


def correlation(sums: Tensor) -> Tensor:
    """Computes correlations (K,) from the sums of ``correlation_sums``; nan where either side is constant."""
    n, x, y, xx, yy, xy = sums
    covariance = n * xy - x * y
    spread = (n * xx - x * x) * (n * yy - y * y)
    # A variance within rounding noise is that of a constant.
    constant = (n * xx - x * x <= 1e-12 * n * xx) | (n * yy - y * y <= 1e-12 * n * yy)
    return torch.where(constant, torch.nan, covariance / spread.clamp_min(1e-300).sqrt())


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
    return correlation(correlation_sums(rewards_BK, ratings_BK))


def first_errors(scores_M: Tensor, sequence_index_M: Tensor, num_sequences: int, threshold: float = 0.5) -> Tensor:
    """Finds the first step of each sequence whose score is below a threshold.

    Args:
        scores_M: (M,) probabilities that steps are right, or labels, in the order of the steps.
        sequence_index_M: (M,) the sequence of each step, ascending.
        num_sequences: S.
        threshold: a step with a lower score is an error.

    Returns:
        (S,) step numbers from 0; ``NO_ERROR`` where there is none.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> first_errors(torch.tensor([0.9, 0.2, 0.1, 0.8]), torch.tensor([0, 0, 0, 1]), 2)
        tensor([ 1, -1])
    """
    _check_same_shape(scores_M=scores_M, sequence_index_M=sequence_index_M)
    counts_S = torch.bincount(sequence_index_M, minlength=num_sequences)
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


def first_error_sums(predicted_S: Tensor, expected_S: Tensor) -> Tensor:
    """Computes the sums of the F1: sequences with an error, hits among them, without one, hits among those; ``(4,)``.

    Args:
        predicted_S: step numbers, ``NO_ERROR`` for none.
        expected_S: the same shape.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> first_error_sums(torch.tensor([1, -1]), torch.tensor([2, -1])).tolist()
        [1.0, 0.0, 1.0, 1.0]
    """
    _check_same_shape(predicted_S=predicted_S, expected_S=expected_S)
    wrong, hit = expected_S != NO_ERROR, predicted_S == expected_S
    return torch.stack([wrong.sum(), (wrong & hit).sum(), (~wrong).sum(), (~wrong & hit).sum()]).double()


def first_error(sums: Tensor) -> FirstError:
    """Computes F1 and accuracies from the sums of ``first_error_sums``; nan where sequences of a kind are missing."""
    wrong, found, right, passed = sums
    with_error, without_error = found / wrong, passed / right
    total = with_error + without_error
    f1 = torch.where(total == 0, 0.0, 2 * with_error * without_error / total)
    return FirstError(f1, with_error, without_error)


def first_error_f1(predicted_S: Tensor, expected_S: Tensor) -> FirstError:
    """Computes the F1 of ProcessBench, which rewards finding the first wrong step, and none where all are right.

    Paper: ProcessBench (Zheng et al., 2024, arXiv:2412.06559): the harmonic mean of the accuracies on sequences with
    and without an error.

    Args:
        predicted_S: step numbers, ``NO_ERROR`` for none.
        expected_S: the same shape.

    Returns:
        F1 and both accuracies, scalars in [0, 1], fp64.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> first_error_f1(torch.tensor([1, 2, -1]), torch.tensor([1, 0, -1])).f1
        tensor(0.6667, dtype=torch.float64)
    """
    return first_error(first_error_sums(predicted_S, expected_S))
