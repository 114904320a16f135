"""Fisher information of weights that FSDP2 has sharded over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..distributed.fsdp2 import sharded_units
from ..distributed.lockstep import Lockstep
from ..merging.data import drawn_logprob


def sharded_fisher_sums(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    sequences: Mapping[int, Sequence[int]],
    *,
    seed: int,
    rank: int,
    agreement: Lockstep,
) -> dict[str, Tensor]:
    """Adds up the squared gradients of ``merging.data.fisher_sums`` over rows; every rank calls it with the same rows.

    Gradients of sharded weights are sums over ranks, and a square needs that of one row alone. So the first rank passes
    through one row after the other, and the others through dummy rows whose gradient is 0: each then has its shard of
    the gradient that one device would compute.

    Args:
        model: a causal language model of transformers, sharded, in evaluation mode.
        weights: its trained weights, by name, without gradients.
        sequences: tokens of rows by their numbers; those of less than two have no part.
        seed: of the draws.
        rank: this rank's number.
        agreement: the lockstep of the run.

    Returns:
        The sums by name, in at least fp32, sharded as the weights are.
    """
    sums = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    for number, tokens in sequences.items():
        if len(tokens) < 2:
            continue
        with torch.enable_grad():
            if rank == 0:
                total = drawn_logprob(model, tokens, seed=seed, number=number, device=agreement.device)
                agreement.backward(total).backward()
            agreement.drop_unreached()
        for unit in sharded_units(model):
            unit.reshard()
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad.to(sums[name].dtype).square()
                weight.grad = None
    return sums
