"""Compressed contexts: the keys and values that a decoder keeps of a context, and the position that follows.

Legend: K key/value heads, C entries of the cache, D head size, Q new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..sequences import CachedRows, register_attention
from .backbone import base_model, decoder_of, evaluating
from .own_attention import is_switchable, using_attention

LayerStates = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class CompressedContext:
    """Stands for a context in a decoder's cache.

    A token that follows sees every entry. Windows of a decoder count entries, and not positions.

    Args:
        states: keys and values of each layer, ``(K, C, D)``, as the decoder's cache holds them.
        position: position of the token that follows, at least 0.
        num_tokens: tokens of the context.
    """

    states: LayerStates
    position: int
    num_tokens: int

    @property
    def size(self) -> int:
        """Entries of the cache."""
        return int(self.states[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.itemsize for layer in self.states for tensor in layer)

    def select(self, index: Tensor | Sequence[int]) -> CompressedContext:
        """Keeps some entries.

        Args:
            index: their numbers, in the order in which they are kept.
        """
        chosen = torch.as_tensor(index, dtype=torch.long, device=self.states[0][0].device)
        return replace(self, states=[(keys[:, chosen], values[:, chosen]) for keys, values in self.states])


class Compressor(Protocol):
    """Interface of compressors: learned ones, and others that keep a part of a context.

    An attribute ``reads_query`` that is true says that a context is compressed again for each prompt that follows it.
    """

    def compress(
        self, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None = None
    ) -> list[CompressedContext]:
        """Compresses contexts.

        Args:
            contexts: tokens of each, at least one.
            queries: tokens that will follow each, for compressors that look at them.
        """
        ...


def run_after(
    model: nn.Module, states: LayerStates, input_ids: Tensor, positions: Tensor
) -> tuple[Tensor, LayerStates]:
    """Runs a decoder on new tokens of one sequence after entries of its cache.

    Args:
        model: a causal language model that runs with the registered attention.
        states: what the tokens see before them, as in ``CompressedContext``; may be empty.
        input_ids: ``(Q,)``.
        positions: ``(Q,)``.

    Returns:
        Hidden states after the final norm, ``(Q, H)``, and keys and values of the new tokens alone.
    """
    cache = DynamicCache()
    for number, (keys, values) in enumerate(states):
        cache.update(keys[None], values[None], number)
    before, count = cache.get_seq_length() if states else 0, len(positions)
    columns = torch.arange(before, before + count, device=positions.device)
    output = decoder_of(model)(
        input_ids=input_ids[None],
        position_ids=positions[None],
        # A mask with four dimensions passes through mask creation untouched, and the attention does not read it.
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=positions.device),
        cached_rows=CachedRows(columns[None], before + count),
        past_key_values=cache,
        use_cache=True,
    )
    layers: list[Any] = cache.layers
    new = [(layer.keys[0, :, before:], layer.values[0, :, before:]) for layer in layers]
    return output.last_hidden_state[0], new


@torch.no_grad()
def context_states(model: nn.Module, tokens: Sequence[int]) -> CompressedContext:
    """Computes a context without compressing it.

    Args:
        model: a causal language model.
        tokens: of the context, at least one.

    Raises:
        ValueError: there is no token, or the model looks up its attention otherwise than by name.
    """
    if not len(tokens):
        raise ValueError("a context has no tokens: leave it out, or give it one")
    base = check_entries(model)
    ids = torch.tensor(list(tokens), device=next(model.parameters()).device)
    with evaluating(model), using_attention(base, register_attention()):
        _, states = run_after(model, [], ids, torch.arange(len(ids), device=ids.device))
    return CompressedContext(states, len(ids), len(ids))


def check_entries(model: nn.Module) -> Any:
    """Returns a model's transformers part, where its layers can be given entries of a cache.

    Raises:
        ValueError: its layers do not look up their attention by name.
    """
    base = base_model(model)
    if not is_switchable(base):
        raise ValueError(
            f"{type(base).__name__} has an attention of its own, which cannot be given compressed contexts: use a "
            "model whose layers look up their attention by name"
        )
    return base
