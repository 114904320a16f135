"""Weights of a context compressor: embeddings of its slots, and the encoder's low-rank changes of the decoder.

Legend: R rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .backbone import base_model, decoder_of

_SCALE = 2.0  # of the encoder's changes, as with LoRA's alpha of twice the rank
_SAMPLED = 1024  # embeddings from which those of slots are drawn


class CompressorWeights(nn.Module):
    """Holds what a compressor adds to a decoder.

    Args:
        model: the decoder.
        num_slots: slots of a segment; there is one embedding for each, and a last one that begins a reconstruction.
        pooled: whether slots attend to the tokens that they stand for, by queries that begin at zero.
        rank: of the changes that the encoder makes to each linear layer; 0 makes none.
        seed: of the initial weights: embeddings of slots are drawn with the mean and the deviation of the decoder's,
            and changes begin at zero.
    """

    def __init__(self, model: nn.Module, num_slots: int, rank: int, seed: int, *, pooled: bool = False) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        embedding: Any = base_model(model).get_input_embeddings()
        count = embedding.weight.shape[0]
        ids = torch.linspace(0, count - 1, min(count, _SAMPLED), device=embedding.weight.device).long()
        with torch.no_grad():
            known = embedding(ids)
        self.slots = nn.Parameter(self._drawn((num_slots + 1, known.shape[1]), known, generator))
        self.queries = nn.Parameter(torch.zeros_like(self.slots[:-1])) if pooled else None

        self.inner, self.outer = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in linear_layers(model) if rank else ():
            inputs, outputs = _sizes(layer)
            inner = torch.randn((rank, inputs), generator=generator, device="cpu") / inputs**0.5
            self.inner[name] = nn.Parameter(inner.to(known))
            self.outer[name] = nn.Parameter(known.new_zeros((outputs, rank)))

    @staticmethod
    def _drawn(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator, device="cpu").to(like)
        return like.mean(0) + noise * like.std(0)

    def embed(
        self, model: nn.Module, input_ids: Tensor, slots: Tensor, groups: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Embeds tokens and slots: ``(T,), (T,) -> (T, D)``.

        Args:
            model: the decoder.
            input_ids: tokens; not read at slots.
            slots: numbers of slots, -1 at tokens.
            groups: places of tokens, and of the slots that stand for them: adds the tokens' mean to the slot, weighted
                by the softmax of ``q . x / sqrt(D)`` where there are queries.
        """
        embedding: Any = base_model(model).get_input_embeddings()
        states: Tensor = embedding(input_ids)
        own = F.embedding(slots.clamp(min=0), self.slots).to(states.dtype)
        if groups is not None:
            own = own + self._pooled(states, slots, *groups)
        return torch.where((slots >= 0)[:, None], own, states)

    def _pooled(self, states: Tensor, slots: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Averages the embeddings of each slot's tokens: ``(T, D) -> (T, D)``, 0 elsewhere."""
        chosen = F.embedding(tokens, states)
        if self.queries is None:
            weights = torch.ones_like(chosen[:, 0])
        else:
            queries = F.embedding(slots[places], self.queries).to(chosen.dtype)
            scores = (queries * chosen).sum(-1) / chosen.shape[1] ** 0.5
            # The largest of each slot is taken off, which changes no weight.
            largest = scores.new_full((len(states),), -torch.inf).scatter_reduce(0, places, scores, "amax").detach()
            weights = (scores - largest[places]).exp()
        total = weights.new_zeros(len(states)).index_add(0, places, weights)
        return torch.zeros_like(states).index_add(0, places, chosen * (weights / total[places])[:, None])

    def change(self, name: str, inputs: Tensor) -> Tensor:
        """Computes what the encoder adds to the output of a layer."""
        inner, outer = self.inner[name], self.outer[name]
        return _SCALE * F.linear(F.linear(inputs.to(inner.dtype), inner), outer)


class Encoding:
    """Adds the encoder's changes to a decoder's layers, at the tokens of contexts.

    Args:
        model: the decoder.
        weights: the changes.

    Attributes:
        gate: tokens that are changed: ``None`` for none, ``True`` for all, or 1 and 0 for each, ``(T,)``.
        kept: the gate of the last forward, for layers that run again in its backward pass.
    """

    def __init__(self, model: nn.Module, weights: CompressorWeights) -> None:
        self.gate: Tensor | bool | None = None
        self.kept: Tensor | bool | None = None
        self.weights = weights
        for name, layer in linear_layers(model):
            if name in weights.inner:
                layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        # A closure, so that a copy of the model does not copy the weights.
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            gate, inputs = self.gate, args[0]
            if gate is None and torch.is_grad_enabled():
                gate = self.kept
            if gate is None:
                return None
            change = self.weights.change(name, inputs)
            if isinstance(gate, Tensor):
                if gate.numel() != inputs.shape[:-1].numel():
                    raise ValueError(
                        f"{name} is given some of the tokens alone, so that an encoder of its own cannot be told apart "
                        "there: use encoder_rank=0"
                    )
                change = change * gate.to(change.dtype).view(*inputs.shape[:-1], 1)
            return output + change.to(output.dtype)

        return add


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear layers of a decoder without its output projection, by names that adapters do not change."""
    for name, module in decoder_of(model).named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name:
            # Names of parameters have no dots.
            yield name.removesuffix(".base_layer").replace(".", "-"), module


def _sizes(layer: Any) -> tuple[int, int]:
    """Returns the sizes of a layer's inputs and outputs."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
