"""Losses on completions that are individually labelled good or bad: KTO and the unpaired APO-zero.

Shapes: B examples, M mismatched prompt-completion pairs.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor

from ..utils.validation import check_choice, check_not_negative, check_positive, check_same_shape

KTOLossType = Literal["kto", "apo_zero_unpaired"]

LOSS_TYPES: Final[tuple[KTOLossType, ...]] = get_args(KTOLossType)
# Losses that read the KL estimate, and so couple the examples of the global batch.
COUPLED: Final = frozenset({"kto"})


def validate_kto_loss(
    loss_type: str, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> None:
    """Checks the arguments that a config sets.

    Args:
        loss_type: one of ``LOSS_TYPES``.
        beta: above 0.
        desirable_weight: at least 0.
        undesirable_weight: at least 0; not both weights may be 0.

    Raises:
        ValueError: what is wrong, what is allowed, and what to write.

    Example:
        >>> validate_kto_loss("kto", beta=0.1)
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_positive("beta", beta, "0.1 is usual")
    check_not_negative("desirable_weight", desirable_weight, "1.0 is usual")
    check_not_negative("undesirable_weight", undesirable_weight, "1.0 is usual")
    if desirable_weight == 0 and undesirable_weight == 0:
        raise ValueError(
            "desirable_weight=0 and undesirable_weight=0 leave nothing to learn: set one above 0, usually 1"
        )


def kto_kl(kl_logps_M: Tensor, ref_kl_logps_M: Tensor) -> Tensor:
    """Estimates KL(policy || reference), which KTO compares rewards with, as a constant.

    Paper: KTO (Ethayarajh et al., 2024, arXiv:2402.01306): the mean log-ratio of completions under unrelated prompts,
    clamped at 0.

    Args:
        kl_logps_M: sum of the policy's log-probs over each mismatched completion of the global batch, (M,), M > 0.
        ref_kl_logps_M: the same of the reference, (M,).

    Returns:
        A scalar without gradient.

    Raises:
        ValueError: shapes that differ, or no pair to average over.

    Example:
        >>> kto_kl(torch.tensor([-3.0, -5.0]), torch.tensor([-5.0, -6.0]))
        tensor(1.5000)
    """
    check_same_shape("M", kl_logps_M=kl_logps_M, ref_kl_logps_M=ref_kl_logps_M)
    if len(kl_logps_M) == 0:
        raise ValueError(
            "kl_logps_M is empty: a batch without mismatched pairs has no KL estimate; pass an earlier one"
        )
    return (kl_logps_M - ref_kl_logps_M).detach().mean().clamp(min=0)


def kto_loss(
    logps_B: Tensor,
    ref_logps_B: Tensor,
    *,
    label_B: Tensor,
    kl: Tensor | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: KTOLossType = "kto",
) -> Tensor:
    """Computes the KTO or unpaired APO-zero loss, one value per example.

    Papers: KTO (Ethayarajh et al., 2024, arXiv:2402.01306); APO (D'Oosterlinck et al., 2024, arXiv:2408.06266),
    eq. 7, without pairs. With h the log-ratio of policy over reference, S the logistic function, w the label's weight::

        kto                desirable  w S(-beta (h - kl))    undesirable  w S(beta (h - kl))
        apo_zero_unpaired  desirable  w S(-beta h)           undesirable  w S(beta h)

    Args:
        logps_B: sum of the policy's log-probs over each completion, (B,).
        ref_logps_B: the same of the reference, (B,).
        label_B: whether the completion is desirable, (B,), bool.
        kl: the scalar of ``kto_kl``, for ``kto``; treated as a constant.
        beta: above 0; larger keeps the policy nearer to the reference.
        desirable_weight: at least 0, the paper's lambda_D.
        undesirable_weight: at least 0, lambda_U. The paper chooses them such that lambda_D n_D is
            1 to 4/3 times lambda_U n_U, with n the counts of both labels.
        loss_type: ``kto`` or ``apo_zero_unpaired``.

    Returns:
        Losses (B,), unreduced: divide their sum over the global batch by the number of examples.

    Raises:
        ValueError: a shape that differs, labels that are not bool, no ``kl`` for ``kto``, or an argument out of range.

    Example:
        >>> kto_loss(torch.tensor([-4.0]), torch.tensor([-4.0]), label_B=torch.tensor([True]), kl=0.0)
        tensor([0.5000])
    """
    validate_kto_loss(loss_type, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    check_same_shape("B", logps_B=logps_B, ref_logps_B=ref_logps_B, label_B=label_B)
    if label_B.dtype != torch.bool:
        raise ValueError(f"label_B has dtype {label_B.dtype}: give bool, True for a desirable completion")

    # The reference point of prospect theory: KTO compares rewards with it, APO-zero with 0.
    rewards_B = logps_B - ref_logps_B
    if loss_type == "kto":
        if kl is None:
            raise ValueError("loss_type 'kto' needs kl, got None: pass kto_kl(...), or use 'apo_zero_unpaired'")
        rewards_B = rewards_B - (kl.detach() if isinstance(kl, Tensor) else kl)
    losses_B = (beta * torch.where(label_B, -rewards_B, rewards_B)).sigmoid()
    return torch.where(label_B, desirable_weight * losses_B, undesirable_weight * losses_B)
