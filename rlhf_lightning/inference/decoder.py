"""Runs a model as a decoder with a cache, and probes whether the shared batch layout suits the model.

Legend: N rows of the running batch, P prompts, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..models import base_model
from ..models.own_attention import EAGER, short_reach, using_attention
from .kv_cache import PromptStates, SlotCache
from .lanes import to_device
from .projection import computes_in_half

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
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        accepted = inspect.signature(base_model(model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, PromptStates]:
        """Computes prompts, padded on the left to the longest.

        Returns:
            The scores after each prompt, ``(P, V)``, and the keys and values of each layer.
        """
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
        cache = DynamicCache()
        logits_PV = self._forward(input_ids_PL, mask_PL, places_PL.clamp(min=0), cache)
        layers: list[Any] = cache.layers
        return logits_PV, [(layer.keys, layer.values) for layer in layers]

    def step(self, tokens_N: Tensor, cache: SlotCache) -> Tensor:
        """Computes one more token of every row; returns the scores after it, ``(N, V)``."""
        cache.prepare()
        logits_NV = self._forward(tokens_N[:, None], cache.mask(), cache.positions(), cache)
        cache.end += 1
        return logits_NV

    def _forward(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        arguments = dict(self._options)
        if self._takes_positions:
            arguments["position_ids"] = positions
        output = self.model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **arguments
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def agrees(self) -> bool:
        """Whether rows of different length, one of them joining late, get the logits of forwards without a cache.

        Probed once per model and attention function, on a few tokens: masks, positions and caches are the model's own
        code, and some models (recurrent layers, custom caches) cannot share a batch this way.
        """
        model = base_model(self.model)
        known = _PROBED.setdefault(model, {})
        attention = str(getattr(model.config, "_attn_implementation", None))
        if attention not in known:
            try:
                error = self._probe(model)
            except _UNSUPPORTED:
                error = math.inf
            if math.isnan(error):
                return True  # broken weights say nothing about the layout; sampling reports them
            known[attention] = error <= 1.0
        return known[attention]

    def _probe(self, model: PreTrainedModel) -> float:
        """The error of the shared layout on two short rows, as a multiple of the tolerated rounding error."""
        window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
        length = 4 if window > 64 else 4 + window  # past the window, where that costs nothing
        vocabulary = int(model.config.get_text_config().vocab_size)
        first = [(3 + 7 * i) % vocabulary for i in range(length + 3)]
        # A padding token within a prompt, since some models compute positions or masks from it.
        first[1] = special_token(model)
        second = [(5 + 11 * i) % vocabulary for i in range(4)]
        expected = torch.cat((self._reference(first)[-4:], self._reference(second)[-3:]))

        # As in sampling: two prompts, and the shorter one joins a step later.
        logits_PV, prompts = self.prefill([first[:length], second[:2]])
        cache = SlotCache(prompts, num_rows=2, num_columns=length + 4)
        cache.admit(prompts, 0, length, copies=1)
        tokens = torch.tensor((first[length:], [0, *second[2:]]), device=self.device)
        first_rows, second_rows = [logits_PV[0], self.step(tokens[:1, 0], cache)[0]], [logits_PV[1]]
        cache.admit(prompts, 1, 2, copies=1)
        for i in (1, 2):
            logits_NV = self.step(tokens[:, i], cache)
            first_rows.append(logits_NV[0])
            second_rows.append(logits_NV[1])

        # Relative to the spread of the logits, since their scale differs between models.
        tolerance = 0.1 if computes_in_half(model) else 1e-3
        error = (torch.stack(first_rows + second_rows).double() - expected.double()).square().mean().sqrt()
        spread = (expected.double() - expected.double().mean(-1, keepdim=True)).square().mean().sqrt()
        return float(error / (tolerance * spread))

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
