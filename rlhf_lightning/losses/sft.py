"""Supervised fine-tuning losses, one value per token.

Shapes: N scored tokens, flat.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from torch import Tensor

from ..utils.validation import check_choice, check_same_shape

SFTLossType = Literal["nll", "dft"]

LOSS_TYPES: Final[tuple[SFTLossType, ...]] = get_args(SFTLossType)


def nll(logprobs_N: Tensor) -> Tensor:
    """Computes the negative log-likelihood per token: -log p.

    Args:
        logprobs_N: log-probability of each target token, (N,).

    Returns:
        Losses (N,).

    Example:
        >>> import torch
        >>> nll(torch.tensor([-0.5, -2.0]))
        tensor([0.5000, 2.0000])
    """
    return -logprobs_N


def dft(logprobs_N: Tensor) -> Tensor:
    """Computes the dynamic fine-tuning loss: the negative log-likelihood times the token's probability as a constant.

    Paper: On the Generalization of SFT (Wu et al., 2025, arXiv:2508.05629): -sg[p] log p, whose gradient is that
    of -p; tokens that are unlikely under the policy have less effect.

    Args:
        logprobs_N: log-probability of each target token, (N,).

    Returns:
        Losses (N,).

    Example:
        >>> import torch
        >>> dft(torch.tensor([0.5, 0.125]).log())
        tensor([0.3466, 0.2599])
    """
    return -logprobs_N.detach().exp() * logprobs_N


def smooth(losses_N: Tensor, mean_logprobs_N: Tensor, label_smoothing: float) -> Tensor:
    """Mixes a per-token loss with the mean negative log-probability over the vocabulary.

    Paper: Rethinking the Inception Architecture (Szegedy et al., 2016, arXiv:1512.00567), section 7:
    (1 - eps) * loss - eps * mean_v log p(v): the cross-entropy with a target of 1 - eps on the label and eps spread
    evenly over all V tokens, the label among them.

    Args:
        losses_N: (N,).
        mean_logprobs_N: mean of log p over the vocabulary at each position, (N,).
        label_smoothing: eps, in [0, 1).

    Returns:
        Losses (N,).

    Example:
        >>> import torch
        >>> smooth(torch.tensor([1.0]), torch.tensor([-3.0]), 0.1)
        tensor([1.2000])
    """
    return (1 - label_smoothing) * losses_N - label_smoothing * mean_logprobs_N


def validate_sft_loss(loss_type: str, *, label_smoothing: float = 0.0) -> None:
    """Checks the arguments of ``sft_loss`` that a config sets.

    Args:
        loss_type: one of ``LOSS_TYPES``.
        label_smoothing: in [0, 1); above 0 with ``nll`` only.

    Raises:
        ValueError: what is wrong, what is allowed, and what to write.

    Example:
        >>> validate_sft_loss("nll", label_smoothing=0.1)
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1): 0.1 is usual, 0 is off")
    if label_smoothing and loss_type != "nll":
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type {loss_type!r}: set it to 0 or use 'nll'"
        )


def sft_loss(
    logprobs_N: Tensor,
    *,
    mean_logprobs_N: Tensor | None = None,
    loss_type: SFTLossType = "nll",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes one loss value per token: ``nll`` (with or without label smoothing) or ``dft``.

    Args:
        logprobs_N: log-probability of each target token, (N,).
        mean_logprobs_N: mean of log p over the vocabulary at each position, (N,); read with label smoothing only.
        loss_type: ``nll`` or ``dft``.
        label_smoothing: in [0, 1); 0 with ``dft``.

    Returns:
        Losses (N,), unreduced: divide their weighted sum over the global batch by the sum of the weights.

    Raises:
        ValueError: an argument out of range, or no ``mean_logprobs_N`` with label smoothing.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([-0.5]))
        tensor([0.5000])
    """
    validate_sft_loss(loss_type, label_smoothing=label_smoothing)
    losses_N = dft(logprobs_N) if loss_type == "dft" else nll(logprobs_N)
    if label_smoothing == 0.0:
        return losses_N
    if mean_logprobs_N is None:
        raise ValueError(
            f"label_smoothing={label_smoothing} needs mean_logprobs_N, the mean log-prob over the vocabulary: pass it"
        )
    check_same_shape("N", logprobs_N=logprobs_N, mean_logprobs_N=mean_logprobs_N)
    return smooth(losses_N, mean_logprobs_N, label_smoothing)
