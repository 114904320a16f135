"""Losses of context compression, one value per token.

Shapes: N scored tokens, flat; V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ..utils.validation import check_same_shape


def full_context_kl(logits_NV: Tensor, *, full_logits_NV: Tensor) -> Tensor:
    r"""Computes the divergence from the model that sees the whole context to the one that sees its summaries.

    Paper: Learning by Distilling Context (Snell et al., 2022, arXiv:2209.15189).

    .. math:: KL_i = \sum_v q_i(v) \left(\log q_i(v) - \log p_i(v)\right)

    with q of the whole context, as a constant, and p of the summaries.

    Args:
        logits_NV: scores given the summaries, (N, V).
        full_logits_NV: scores given the whole context, (N, V).

    Returns:
        Divergences (N,), at least 0 up to rounding.

    Raises:
        ValueError: for different shapes.

    Example:
        >>> import torch
        >>> full_context_kl(torch.zeros(1, 2), full_logits_NV=torch.tensor([[0.0, 2.0]]))
        tensor([0.3278])
    """
    check_same_shape("NV", logits_NV=logits_NV, full_logits_NV=full_logits_NV)
    logp_NV, full_NV = logits_NV.log_softmax(-1), full_logits_NV.detach().log_softmax(-1)
    return (full_NV.exp() * (full_NV - logp_NV)).sum(-1)
