"""The load-balancing loss of a mixture of experts.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterSums:
    """Holds sums of router statistics over some tokens; the sums of a batch's parts add up to those of the batch.

    Args:
        weight: ``()`` number of tokens, counted once per router.
        choices_E: how often each expert was among the K of a token; without gradient.
        probs_E: sum of the probabilities that the routers gave to each expert; with gradient.
    """

    weight: Tensor
    choices_E: Tensor
    probs_E: Tensor

    def __add__(self, other: RouterSums) -> RouterSums:
        return RouterSums(self.weight + other.weight, self.choices_E + other.choices_E, self.probs_E + other.probs_E)


def router_sums(logits: Iterable[Tensor], weights_T: Tensor, *, top_k: int) -> RouterSums:
    """Sums router statistics over tokens and routers.

    Args:
        logits: ``(T, E)`` of each router.
        weights_T: how often each token counts, at least 0: 0 for padding, the number of sequences for a shared prompt.
        top_k: K, the number of experts that a token is sent to.

    Returns:
        Counts in fp64, probabilities in at least fp32.

    Example:
        >>> sums = router_sums([torch.tensor([[9.0, 0.0], [8.0, 1.0]])], torch.tensor([2.0, 1.0]), top_k=1)
        >>> float(sums.weight), sums.choices_E.tolist()
        (3.0, [3.0, 0.0])
    """
    parts = [_sums(logits_TE, weights_T, top_k) for logits_TE in logits]
    if not parts:
        raise ValueError("no router logits are given: the load-balancing loss is a sum over at least one")
    return sum(parts[1:], start=parts[0])


def _sums(logits_TE: Tensor, weights_T: Tensor, top_k: int) -> RouterSums:
    # In at least fp32, also under autocast; counts in fp64, since they exceed the whole numbers that fp32 represents.
    with torch.autocast(logits_TE.device.type, enabled=False):
        probs_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(dim=-1)
        chosen_TK = probs_TE.detach().topk(top_k, dim=-1).indices
        counts_T = weights_T.to(logits_TE.device, torch.float64)
        zeros_E = counts_T.new_zeros(logits_TE.shape[-1])
        choices_E = zeros_E.index_add(0, chosen_TK.flatten(), counts_T.repeat_interleave(top_k))
        return RouterSums(counts_T.sum(), choices_E, (probs_TE * counts_T.to(probs_TE.dtype)[:, None]).sum(dim=0))


def load_balancing_loss(part: RouterSums, whole: RouterSums | None = None) -> Tensor:
    r"""Computes the load-balancing loss (Fedus et al., 2021, arXiv:2101.03961, equation 4), with K experts per token.

    .. math:: L = E \sum_e f_e P_e, \qquad f_e = \frac{1}{T} \sum_t 1[e \in \mathrm{topk}(p_t)], \quad
              P_e = \frac{1}{T} \sum_t p_{t,e}

    The sums run over the tokens of every layer, as in transformers: the loss is K where all experts are used equally,
    and E where only K are used. It is linear in P, which alone has a gradient: the shares of a batch's parts, with f
    of the whole batch, add up to the loss of the batch.

    Args:
        part: sums of some tokens.
        whole: sums of all tokens of the loss; those of ``part`` by default.

    Returns:
        ``()`` the part's share of the loss.

    Example:
        >>> even = router_sums([torch.tensor([[1.0, 0.0], [0.0, 1.0]])], torch.ones(2), top_k=1)
        >>> float(load_balancing_loss(even))
        1.0
    """
    whole = part if whole is None else whole
    weight = whole.weight.clamp(min=1.0)  # 0 for a batch without rows
    slopes_E = len(whole.choices_E) * whole.choices_E.detach() / weight.square()
    return (slopes_E.to(part.probs_E.dtype) * part.probs_E).sum()
