"""Several models that decode the same rows in lockstep: a cache for each, and one draw from their combined scores.

Legend: M models, N rows, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models import base_model, evaluating
from ..models.own_attention import EAGER, avoid_cudnn_attention, using_attention
from .completion import Request
from .continuous_batching import ContinuousBatch, Counts
from .decoder import Decoder
from .engine import generation_attention
from .kv_cache import SlotCache
from .projection import whole_weights
from .row_cache import Rows
from .sampling import SamplingParams
from .stores import Computed, Store, make_store

# From the scores of every model, ``(M, N, V)``, to the scores that tokens are drawn from, ``(N, V)``.
Combine = Callable[[Tensor], Tensor]


class CombinedStore(Store):
    """A cache for each model; the scores that a batch sees are combined.

    Args:
        members: each model with its cache; the caches have equal numbers of rows.
        combine: combines their scores.
    """

    def __init__(self, members: Sequence[tuple[Decoder, Store]], combine: Combine) -> None:
        super().__init__(members[0][1].num_rows)
        self._members, self._combine = members, combine
        self._device = members[0][0].device

    @property
    def cache(self) -> SlotCache | Rows:
        """The rows that run, in the first model's cache."""
        return self._members[0][1].cache

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(store.nbytes for _, store in self._members)

    def _combined(self, scores: Sequence[Tensor]) -> Tensor:
        return self._combine(torch.stack([each.to(self._device).float() for each in scores]))

    def compute(self, decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> list[Computed]:
        """Computes prompts with every model."""
        found = [store.compute(member, prompts) for member, store in self._members]
        logits_PV = self._combined([torch.stack([prompt.logits_V for prompt in each]) for each in found])
        return [Computed(logits_PV[n], [each[n] for each in found], 0) for n in range(len(prompts))]

    def step(self, decoder: Decoder, tokens_N: Tensor, alive_N: Tensor | None) -> Tensor:
        """Computes one more token of every row with every model."""
        return self._combined(
            [store.step(member, tokens_N.to(member.device), alive_N) for member, store in self._members]
        )

    def admit(self, prompt: Computed, copies: int) -> None:
        """Appends rows that each begin with a prompt."""
        for (_, store), computed in zip(self._members, prompt.states, strict=True):
            store.admit(computed, copies)

    def drop(self, prompt: Computed) -> None:
        """Tells every cache that no more rows begin with a prompt."""
        for (_, store), computed in zip(self._members, prompt.states, strict=True):
            store.drop(computed)

    def keep(self, order: Sequence[int], leaving: Mapping[int, Sequence[int]]) -> None:
        """Keeps some rows, in a new order."""
        for _, store in self._members:
            store.keep(order, leaving)


@contextmanager
def decoding(models: Sequence[nn.Module]) -> Iterator[list[Decoder]]:
    """Prepares models to decode, without gradients: evaluation mode, exact logits, and an attention that fits batches.

    Raises:
        ValueError: a model cannot be sampled from, or not in batches of rows of different length.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        decoders = []
        for model in models:
            for context in (evaluating(model), whole_weights(model)):
                stack.enter_context(context)
            decoder = Decoder(model)
            avoid_cudnn_attention(decoder.device)
            decoder.check_sampling()
            stack.enter_context(using_attention(base_model(model), _fitting_attention(decoder)))
            decoders.append(decoder)
        yield decoders


def _fitting_attention(decoder: Decoder) -> str:
    """Finds an attention with which rows of different length can share a batch."""
    model = base_model(decoder.model)
    for attention in (generation_attention(model, decoder.device), EAGER):
        with using_attention(model, attention):
            if decoder.agrees():
                return attention
    raise ValueError(
        f"{type(model).__name__} does not compute rows of different length in one batch as it computes them alone, "
        "which models that decode together have to: leave it out"
    )


def generate_together(
    decoders: Sequence[Decoder],
    combine: Combine,
    requests: Sequence[Request],
    params: SamplingParams,
    stop_ids: Sequence[int],
    max_batch_tokens: int,
    counts: Counts,
) -> None:
    """Generates all samples; the results are in the requests.

    Args:
        decoders: the models, within ``decoding``.
        combine: combines their scores.
        requests: the samples to make, at least one.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        max_batch_tokens: tokens of each model's cache; one row always fits.
        counts: what was done is added to these.
    """
    members = [(decoder, make_store("dynamic", requests, max_batch_tokens)) for decoder in decoders]
    store = CombinedStore(members, combine)
    ContinuousBatch(decoders[0], requests, params, stop_ids, store, max_batch_tokens, counts).run()
