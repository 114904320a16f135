"""Log-probabilities of whole vocabularies at the scored tokens of examples, a few tokens at a time.

Legend: N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models import base_model, evaluating, hidden_states, output_head, resolve_layout
from ..models.own_attention import using_attention
from ..sequences import Example, SequenceBatch, pack, plan_micro_batches, register_attention

# Entries of the logits of two models that exist at once.
_ENTRIES = 1 << 24


def batches(
    examples: Sequence[Example], budget: int, device: torch.device
) -> Iterator[tuple[Sequence[int], SequenceBatch]]:
    """Packs examples into micro-batches; yields the numbers of their examples with each.

    Args:
        examples: rows with scored tokens.
        budget: tokens of a micro-batch, above 0.
        device: where batches go.
    """
    for micro in plan_micro_batches(examples, budget=budget):
        yield micro, pack([examples[n] for n in micro], device=device)


@torch.no_grad()
def log_probs(models: Sequence[nn.Module], batch: SequenceBatch) -> Iterator[tuple[slice, list[Tensor]]]:
    """Computes the distributions that models predict a batch's scored tokens from, in at least fp32.

    Args:
        models: causal language models with one vocabulary.
        batch: packed examples.

    Yields:
        Chunks of the scored tokens, and the log-probs of each model at them, ``(n, V)``.
    """
    states, heads = [_states(model, batch) for model in models], [output_head(model) for model in models]
    chunk = max(1, _ENTRIES // (2 * heads[0].weight.shape[0]))
    for start in range(0, len(batch.target_ids), chunk):
        part = slice(start, start + chunk)
        logits = (head.logits(state[part]) for head, state in zip(heads, states, strict=True))
        yield part, [_at_least_fp32(values).log_softmax(dim=-1) for values in logits]


def _states(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Returns the hidden states that scored tokens are predicted from, ``(N, D)``."""
    with evaluating(model), using_attention(base_model(model), register_attention()):
        layout = resolve_layout(model, "auto")
        return hidden_states(model, batch, layout).read(batch.source_index, batch.source_path, batch.source_depth)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
