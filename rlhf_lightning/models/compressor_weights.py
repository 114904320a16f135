"""Weights of a context compressor: embeddings of its slots, and the encoder's low-rank changes of the decoder.

Legend: R rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

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
        num_slots: slots that have embeddings of their own; a last one begins a reconstruction.
        pooled: whether slots attend to the tokens that they stand for, by queries that begin at zero.
        rank: of the changes that the encoder makes to each linear layer; 0 makes none.
        seed: of the initial weights: embeddings of slots are drawn with the mean and the deviation of the decoder's,
            and changes begin at zero.
    """

    on_dummy_pass: Callable[[], AbstractContextManager[None]]  # in which a pass over one token reaches the weights

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

    def embed(self, states: Tensor, slots: Tensor, groups: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Puts the embeddings of slots among those of tokens: ``(T, D), (T,) -> (T, D)``.

        Args:
            states: embeddings of tokens; not read at slots.
            slots: numbers of slots, below 0 at tokens.
            groups: places of tokens, and of the slots that stand for them: adds the tokens' mean to the slot, weighted
                by the softmax of ``q . x / sqrt(D)`` where there are queries.
        """
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


class Encoded(NamedTuple):
    """Holds what a forward over contexts is given besides tokens.

    Args:
        gate: tokens that the encoder reads: ``True`` for all, or 1 and 0 for each, ``(T,)``.
        slots: numbers of slots, below 0 at tokens, ``(T,)``.
        groups: see ``CompressorWeights.embed``.
    """

    gate: Tensor | bool
    slots: Tensor
    groups: tuple[Tensor, Tensor] | None = None


class Encoding:
    """Embeds slots in a decoder's forward, and adds the encoder's changes to its layers at the tokens of contexts.

    Both happen within the forward, where the weights of a sharded decoder are gathered.

    Args:
        model: the decoder.
        weights: the embeddings and the changes.
    """

    def __init__(self, model: nn.Module, weights: CompressorWeights) -> None:
        self.weights = weights
        self._now: Encoded | None = None
        # Gates of forwards whose layers run again in their backward pass, by the number of their tokens.
        self._again: dict[int, Tensor | bool] = {}
        self._modules = list(model.modules())
        embedding: Any = base_model(model).get_input_embeddings()
        # Closures, so that a copy of the model does not copy the weights.
        embedding.register_forward_hook(lambda module, args, output: self._embed(output))
        for name, layer in linear_layers(model):
            if name in weights.inner:
                layer.register_forward_hook(self._hook(name))
        weights.on_dummy_pass = self._of_one_token

    @contextmanager
    def reading(self, encoded: Encoded | None) -> Iterator[None]:
        """Runs the model as an encoder, within the context and in backward passes through it.

        Args:
            encoded: of the forward within the context; ``None`` for the decoder as it is.
        """
        self._again.clear()
        with self._set(encoded):
            yield

    @contextmanager
    def _set(self, encoded: Encoded | None) -> Iterator[None]:
        before, self._now = self._now, encoded
        try:
            yield
        finally:
            self._now = before
            # Checkpointed layers run again in the backward pass.
            checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self._modules)
            if encoded is not None and torch.is_grad_enabled() and checkpointed:
                self._again[len(encoded.slots)] = encoded.gate

    def _of_one_token(self) -> AbstractContextManager[None]:
        """Reads a single token as a slot, so that a pass over it reaches the weights; may come within another pass."""
        return self._set(Encoded(True, torch.zeros(1, dtype=torch.long, device=self.weights.slots.device)))

    def _embed(self, output: Tensor) -> Tensor | None:
        if self._now is None:
            return None
        states = output.flatten(0, -2)
        return self.weights.embed(states, self._now.slots, self._now.groups).view_as(output)

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            inputs, gate = args[0], None if self._now is None else self._now.gate
            count = inputs.shape[:-1].numel()
            if gate is None and torch.is_grad_enabled():
                gate = self._again.get(count)
            if gate is None:
                return None
            change = self.weights.change(name, inputs)
            if isinstance(gate, Tensor):
                if gate.numel() != count:
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
