"""Runs a model as a decoder with a cache, and probes whether the layouts of caches suit the model.

Legend: N rows of the running batch, Q new tokens, P prompts, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..models import CompressedContext, base_model
from ..models.own_attention import EAGER, is_switchable, short_reach, using_attention
from ..sequences import CachedRows
from .kv_cache import PromptStates, SlotCache
from .lanes import to_device
from .planes import WholePlane
from .projection import computes_in_half
from .row_cache import RowCache, Rows

# Errors that a model without support for the layout may raise during the probe.
_UNSUPPORTED = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
_PROBED: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def special_token(model: PreTrainedModel) -> int:
    """The padding token, which some models give special positions, or the first token of the vocabulary."""
    config = model.config.get_text_config()
    token = getattr(config, "pad_token_id", None)
    return int(token) if isinstance(token, int) and 0 <= token < int(config.vocab_size) else 0


class Decoder:
    """Runs a causal language model on prompts and then token by token, with its rows in one ``SlotCache``.

    Args:
        model: a causal language model of transformers, bare or with adapters around it.
        contexts: compressed contexts that prompts follow, by the tokens that stand for their entries (``contexts.py``).
    """

    def __init__(self, model: nn.Module, contexts: Mapping[int, CompressedContext] | None = None) -> None:
        self.model = model
        self.contexts = contexts or {}
        self.device = next(model.parameters()).device
        accepted = inspect.signature(base_model(model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, PromptStates]:
        """Computes prompts, padded on the left to the longest.

        Returns:
            The scores after each prompt, ``(P, V)``, and the keys and values of each layer.
        """
        if self.contexts:
            return self._prefill_after_contexts(prompts)
        cache = DynamicCache()
        logits_PV = self._after(prompts, cache)
        layers: list[Any] = cache.layers
        return logits_PV, [(layer.keys, layer.values) for layer in layers]

    def positions_ahead(self, prompt: Sequence[int]) -> int:
        """Returns how far the position after a prompt is ahead of its length, after a compressed context."""
        context = self.contexts.get(prompt[0])
        return 0 if context is None else context.position - context.size

    def _prefill_after_contexts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, PromptStates]:
        """Computes prompts one by one, each after the entries of its context."""
        width = max(map(len, prompts))
        found: list[Tensor] = []
        padded: list[list[tuple[Tensor, Tensor]]] = []
        for prompt in prompts:
            context = self.contexts.get(prompt[0])
            cache, before = DynamicCache(), 0 if context is None else context.size
            for number, (keys, values) in enumerate([] if context is None else context.states):
                cache.update(keys[None], values[None], number)
            columns = torch.arange(before, len(prompt), device=self.device)[None]
            given = {
                "position_ids": columns + self.positions_ahead(prompt),
                "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device),
                "cached_rows": CachedRows(columns, len(prompt)),
            }
            ids = torch.tensor([list(prompt[before:])], device=self.device)
            found.append(self._forward(ids, cache, given)[:, -1])
            layers: list[Any] = cache.layers
            missing = (0, 0, width - len(prompt), 0)
            padded.append([(F.pad(layer.keys, missing), F.pad(layer.values, missing)) for layer in layers])
        by_layer = zip(*padded, strict=True)
        states = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in by_layer]
        return torch.cat(found), cast(PromptStates, states)

    def after(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Computes the scores after prompts, padded on the left to the longest, ``(P, V)``; keeps no cache."""
        return self._after(prompts, None)

    def _after(self, prompts: Sequence[Sequence[int]], cache: Cache | None) -> Tensor:
        width = max(map(len, prompts))
        table = np.zeros((len(prompts), width + 1), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            table[row, 0] = len(prompt)
            table[row, 1 + width - len(prompt) :] = prompt
        # Lengths and tokens in one copy.
        table_PL = to_device(table, self.device)
        lengths_P1, input_ids_PL = table_PL[:, :1], table_PL[:, 1:]
        # Padding on the left gets position 0, which nothing reads.
        places_PL = torch.arange(width, device=self.device) - width + lengths_P1
        mask_PL = (places_PL >= 0).long() if min(map(len, prompts)) < width else None
        given = {"attention_mask": mask_PL, "position_ids": places_PL.clamp(min=0)}
        return self._forward(input_ids_PL, cache, given)[:, -1]

    def last(self, tokens: Sequence[int], keep: int) -> Tensor:
        """Computes the scores after each of the last ``keep`` tokens of one sequence, ``(keep, V)``."""
        input_ids = torch.tensor([tokens], device=self.device)
        return self._forward(input_ids, None, {}, keep)[0, -keep:]

    def step(self, tokens_N: Tensor, cache: SlotCache | Rows, alive_N: Tensor | None = None) -> Tensor:
        """Computes one more token of every row; returns the scores after it, ``(N, V)``.

        Args:
            tokens_N: the tokens, on the device.
            cache: its rows.
            alive_N: the rows that take their token, where some do not; ``Rows`` only.
        """
        if isinstance(cache, SlotCache):
            logits_NV = self._forward(tokens_N[:, None], cache, cache.begin())[:, -1]
            cache.advance()
        else:
            logits_NV = self._forward(tokens_N[:, None], cache, cache.begin(alive_N=alive_N))[:, -1]
            cache.advance(alive_N=alive_N)
        return logits_NV

    def extend(self, tokens: Sequence[Sequence[int]] | Tensor, cache: Rows) -> Tensor:
        """Computes several more tokens of every row in one forward.

        Args:
            tokens: the next tokens of each row, any number of them for each, but at least one for some row; or as many
                for all, ``(N, Q)`` on the device.
            cache: its rows, which become longer by them; ``cache.rollback`` takes tokens back.

        Returns:
            ``(N, Q, V)``, Q the largest number of tokens: the scores after each row's tokens, which begin at index 0;
            what follows a shorter row's last is arbitrary.
        """
        counts = [len(row) for row in tokens]
        most = max(counts)
        logits_NQV = self._extend(tokens, cache, keep=most)
        if min(counts) == most:
            return logits_NQV
        # Rows were padded on the left.
        places = np.arange(most) + most - np.array(counts)[:, None]
        source_NQ = to_device(places.clip(max=most - 1), self.device)
        return logits_NQV.gather(1, source_NQ[..., None].expand_as(logits_NQV))

    def finish(self, tokens: Sequence[Sequence[int]], cache: Rows) -> Tensor:
        """Computes the rest of prompts, at least one token of each; returns the scores after it, ``(N, V)``."""
        return self._extend(tokens, cache, keep=1)[:, -1]

    def _extend(self, tokens: Sequence[Sequence[int]] | Tensor, cache: Rows, keep: int) -> Tensor:
        """Returns the scores after the last tokens of rows that are padded on the left."""
        counts = [len(row) for row in tokens]
        if not isinstance(tokens, Tensor):
            table = np.zeros((len(counts), max(counts)), dtype=np.int64)
            for row, new in enumerate(tokens):
                table[row, table.shape[1] - len(new) :] = new
            tokens = to_device(table, self.device)
        logits_NQV = self._forward(tokens, cache, cache.begin(counts), keep)[:, -keep:]
        cache.advance(counts)
        return logits_NQV

    def _forward(self, input_ids: Tensor, cache: Cache | None, given: dict[str, Any], keep: int = 1) -> Tensor:
        """The scores after the last tokens, at least ``keep`` of them."""
        arguments = dict(given)
        if not self._takes_positions:
            arguments.pop("position_ids")
        if self._takes_keep:
            arguments["logits_to_keep"] = keep
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, **arguments)
        logits: Tensor = output.logits
        return logits

    def agrees(self) -> bool:
        """Whether rows of different length, one of them joining late, get the logits of forwards without a cache.

        Probed once per model and attention function, on a few tokens: masks, positions and caches are the model's own
        code, and some models (recurrent layers, custom caches) cannot share a batch this way.
        """
        return self._known("slots", self._probe)

    def agrees_in_rows(self) -> bool:
        """Whether the same holds of ``Rows``, several tokens at once and rollbacks included.

        To be called within ``using_attention(model, register_attention())``; models whose layers do not look up their
        attention by name do not agree.
        """
        return is_switchable(base_model(self.model)) and self._known("rows", self._probe_rows)

    def _known(self, layout: str, probe: Callable[[PreTrainedModel], float]) -> bool:
        model = base_model(self.model)
        known = _PROBED.setdefault(model, {})
        name = f"{layout} {getattr(model.config, '_attn_implementation', None)}"
        if name not in known:
            try:
                error = probe(model)
            except _UNSUPPORTED:
                error = math.inf
            if math.isnan(error):
                return True  # broken weights say nothing about the layout; sampling reports them
            known[name] = error <= 1.0
        return known[name]

    def _probe(self, model: PreTrainedModel) -> float:
        """The error of rows that end at one column, on two short rows."""
        window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
        length = 4 if window > 64 else 4 + window  # past the window, where that costs nothing
        first, second = _probed_tokens(model, length + 3)
        tokens = torch.tensor((first[length:], [0, *second[2:4]]), device=self.device)

        # As in sampling: two prompts, and the shorter one joins a step later.
        logits_PV, prompts = self.prefill([first[:length], second[:2]])
        cache = SlotCache(prompts, num_rows=2, num_columns=length + 4)
        cache.admit(prompts, 0, length, copies=1)
        first_rows, second_rows = [logits_PV[0], self.step(tokens[:1, 0], cache)[0]], [logits_PV[1]]
        cache.admit(prompts, 1, 2, copies=1)
        for i in (1, 2):
            logits_NV = self.step(tokens[:, i], cache)
            first_rows.append(logits_NV[0])
            second_rows.append(logits_NV[1])
        expected = torch.cat((self._reference(first)[-4:], self._reference(second[:4])[-3:]))
        return _error(torch.stack(first_rows + second_rows), expected, model)

    def _probe_rows(self, model: PreTrainedModel) -> float:
        """The error of rows of their own lengths, on two short rows, with windows as they are and shortened."""
        error = self._probe_two_rows(model)
        with short_reach(model):
            return max(error, self._probe_two_rows(model))

    def _probe_two_rows(self, model: PreTrainedModel) -> float:
        first, second = _probed_tokens(model, 9)
        logits_PV, prompts = self.prefill([first[:4], second[:2]])
        cache = RowCache(WholePlane, num_rows=2, num_columns=12)
        cache.admit(prompts, 0, 4, copies=1)
        found = [logits_PV, self.step(torch.tensor(first[4:5], device=self.device), cache)]
        cache.admit(prompts, 1, 2, copies=1)

        # Several tokens at once, wrong ones among them, which are taken back.
        one, other = self.extend([[*first[5:7], 0], second[2:4]], cache)
        cache.rollback([1, 0])
        found += [one[:2], other[:2], self.step(torch.tensor([first[7], second[4]], device=self.device), cache)]
        of_first, of_second = self._reference(first), self._reference(second)
        expected = (of_first[3:4], of_second[1:2], of_first[4:7], of_second[2:4], of_first[7:8], of_second[4:5])
        return _error(torch.cat(found), torch.cat(expected), model)

    def check_sampling(self) -> None:
        """Checks two properties that batched sampling rests on: causality, and keys that do not depend on the layout.

        Raises:
            ValueError: the model has not both of them.
        """
        model = base_model(self.model)
        if not self.looks_back():
            raise ValueError(
                f"{type(model).__name__} cannot be sampled from: an earlier token sees later ones; use a causal "
                "language model (where the config has is_decoder, set it)"
            )
        if vars(model.config.get_text_config()).get("index_topk"):
            raise ValueError(
                f"{type(model).__name__} cannot be sampled from: it chooses the keys that it reads (index_topk), and "
                "equal ones by where they lie in a batch; use another model"
            )

    def looks_back(self) -> bool:
        """Whether the logits after a token do not depend on later tokens; probed once per model."""
        known = _PROBED.setdefault(base_model(self.model), {})
        if "looks back" not in known:
            # With shortened windows as well, which these few tokens would not exceed otherwise.
            known["looks back"] = self._looks_back()
            with short_reach(base_model(self.model)):
                known["looks back"] &= self._looks_back()
        return known["looks back"]

    def _looks_back(self) -> bool:
        vocabulary = int(base_model(self.model).config.get_text_config().vocab_size)
        tokens = [(3 + 7 * i) % vocabulary for i in range(9)]
        try:
            found, expected = self._reference(tokens)[:4].double(), self._reference(tokens[:4]).double()
        except _UNSUPPORTED as error:
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{type(base_model(self.model)).__name__} cannot be sampled from: {said}") from error
        limit = 1e-3 if next(self.model.parameters()).dtype.itemsize >= 4 else 0.1
        difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        return math.isnan(difference) or difference <= limit

    def _reference(self, tokens: Sequence[int]) -> Tensor:
        """The model's own scores after every token: its eager attention, without padding and cache."""
        with using_attention(base_model(self.model), EAGER):
            output = self.model(input_ids=torch.tensor([tokens], device=self.device), use_cache=False)
        logits: Tensor = output.logits[0]
        return logits


def _probed_tokens(model: PreTrainedModel, length: int) -> tuple[list[int], list[int]]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    first = [(3 + 7 * i) % vocabulary for i in range(length)]
    # A padding token within a prompt, since some models compute positions or masks from it.
    first[1] = special_token(model)
    return first, [(5 + 11 * i) % vocabulary for i in range(length)]


def _error(found: Tensor, expected: Tensor, model: PreTrainedModel) -> float:
    """The error of logits, as a multiple of the tolerated rounding error."""
    # Relative to the spread of the logits, since their scale differs between models.
    tolerance = 0.1 if computes_in_half(model) else 1e-3
    error = (found.double() - expected.double()).square().mean().sqrt()
    spread = (expected.double() - expected.double().mean(-1, keepdim=True)).square().mean().sqrt()
    return float(error / (tolerance * spread))
