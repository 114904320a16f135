"""Losses of process reward models, one value per step, and the aggregation of step scores per completion.

Shapes: M steps of all sequences, flat and in order; S sequences.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.validation import check_choice, check_same_shape

Aggregation = Literal["min", "product", "last", "mean"]

AGGREGATIONS: Final[tuple[Aggregation, ...]] = get_args(Aggregation)


def step_bce_loss(logits_M: Tensor, labels_M: Tensor) -> Tensor:
    """Computes the binary cross-entropy of each step's logit with its label, hard or soft.

    Papers: Let's Verify Step by Step (Lightman et al., 2023, arXiv:2305.20050); Math-Shepherd (Wang et al., 2023,
    arXiv:2312.08935), with its estimated probabilities as soft labels. With S the logistic function:
    -y log S(logit) - (1-y) log S(-logit).

    Args:
        logits_M: one per step, (M,).
        labels_M: in [0, 1] or bool, (M,): 1 = a correct step, or the probability of that.

    Returns:
        Losses (M,), unreduced: divide their sum over the global batch by the number of steps.

    Raises:
        ValueError: shapes that differ, or a label outside [0, 1]. Labels on a GPU are not checked, as the host would
            wait for it.

    Example:
        >>> step_bce_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([0.6931, 1.1269])
    """
    check_same_shape("M", logits_M=logits_M, labels_M=labels_M)
    labels_M = labels_M.to(logits_M)
    outside = ~((labels_M >= 0) & (labels_M <= 1)) if labels_M.device.type == "cpu" else None
    if outside is not None and outside.any():
        value = labels_M[outside][0].item()
        raise ValueError(f"labels_M holds {value:.4g}, outside [0, 1]: give 0, 1 or a probability")
    return -labels_M * F.logsigmoid(logits_M) - (1 - labels_M) * F.logsigmoid(-logits_M)


def aggregate_step_logits(
    logits_M: Tensor, sequence_index_M: Tensor, steps_S: Tensor, *, aggregation: Aggregation
) -> Tensor:
    """Aggregates the logits of a completion's steps into one number of any sign, which preferences can compare.

    ``min`` and ``last`` choose a logit, and so the one of the least or last probability; ``mean`` averages logits;
    ``product`` is the log of the product of probabilities, sum log S(logit).

    Args:
        logits_M: of steps being right, (M,), sequence after sequence.
        sequence_index_M: the sequence of each step, (M,), integer, in ascending order.
        steps_S: the number of steps of each sequence, (S,), at least 1.
        aggregation: one of ``AGGREGATIONS``.

    Returns:
        Values (S,). The gradient goes to the given logits; nothing waits for the device.

    Raises:
        ValueError: shapes that differ, or an unknown aggregation.

    Example:
        >>> logits, index, steps = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1])
        >>> aggregate_step_logits(logits, index, steps, aggregation="min")
        tensor([-2.,  3.])
        >>> aggregate_step_logits(logits, index, steps, aggregation="product")
        tensor([-2.4402, -0.0486])
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_same_shape("M", logits_M=logits_M, sequence_index_M=sequence_index_M)
    if aggregation == "last":
        return logits_M[steps_S.cumsum(0) - 1]
    start_S = logits_M.new_zeros(len(steps_S))
    if aggregation == "min":
        return start_S.scatter_reduce(0, sequence_index_M, logits_M, "amin", include_self=False)
    if aggregation == "product":
        return start_S.index_add(0, sequence_index_M, F.logsigmoid(logits_M))
    return start_S.index_add(0, sequence_index_M, logits_M) / steps_S


def aggregate_step_scores(
    scores_M: Tensor, sequence_index_M: Tensor, *, num_sequences: int, aggregation: Aggregation = "min"
) -> Tensor:
    """Aggregates the scores of a completion's steps into one score.

    Papers: the product of step probabilities, Lightman et al., 2023 (arXiv:2305.20050); their minimum, Math-Shepherd
    (arXiv:2312.08935); the last, Snell et al., 2024 (arXiv:2408.03314).

    Args:
        scores_M: probabilities of being correct, (M,), in the order of the steps.
        sequence_index_M: the sequence of each step, (M,), integer.
        num_sequences: S.
        aggregation: one of ``AGGREGATIONS``.

    Returns:
        Scores (S,). The gradient goes to the given scores.

    Raises:
        ValueError: shapes that differ, an unknown aggregation, or a sequence without steps.

    Example:
        >>> aggregate_step_scores(torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0, 0, 1]), num_sequences=2)
        tensor([0.2500, 1.0000])
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_same_shape("M", scores_M=scores_M, sequence_index_M=sequence_index_M)
    steps_S = torch.bincount(sequence_index_M, minlength=num_sequences)
    if not steps_S.all():
        empty = int((steps_S == 0).nonzero()[0])
        raise ValueError(f"sequence {empty} has no steps: drop it, or score it as one step")
    if aggregation == "last":
        order_M = torch.arange(len(scores_M), device=scores_M.device)
        last_S = order_M.new_zeros(num_sequences).scatter_reduce(0, sequence_index_M, order_M, "amax")
        return scores_M[last_S]
    reduction = {"min": "amin", "product": "prod", "mean": "mean"}[aggregation]
    start_S = scores_M.new_zeros(num_sequences)
    return start_S.scatter_reduce(0, sequence_index_M, scores_M, reduction, include_self=False)
