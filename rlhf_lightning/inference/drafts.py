"""Drafts: guesses at the next tokens of each row, by lookup, by a smaller model, or by the model's own first layers.

A draft is checked against the token that the model draws with the same uniform (``speculation``), so that a drafter may
guess in any way. Draft models draw from their own scores with the rows' own uniforms and settings, which makes
them agree as often as their distributions do.

Legend: N rows, K drafts of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..models import base_model, num_positions
from ..models.backbone import decoder_blocks
from .completion import Request
from .decoder import Decoder
from .lanes import Lanes, to_device
from .planes import WholePlane
from .row_cache import RowCache, Rows

# Lengths of the n-grams that are looked up, the longest first.
_NGRAMS = 4, 3, 2


class Drafter(Protocol):
    """Guesses the next tokens of rows."""

    def rooms(self, requests: Sequence[Request]) -> list[int]:
        """Most tokens that each row can draft now."""
        ...

    def unprepared(self, requests: Sequence[Request]) -> int:
        """Tokens that have to be computed before these rows can draft."""
        ...

    def prepare(self, requests: Sequence[Request]) -> None:
        """Computes them."""
        ...

    def draft(self, requests: Sequence[Request], lanes: Lanes, cache: Rows, lengths: Sequence[int]) -> Tensor:
        """Drafts tokens.

        Args:
            requests: the samples, each with at least one token.
            lanes: theirs, which stay as they are.
            cache: the model's own, which holds all of their tokens but the last; left as it is.
            lengths: tokens of each row, not all 0.

        Returns:
            ``(N, K)``, K the largest length; what follows a shorter row's drafts is ignored.
        """
        ...

    def settle(self, requests: Sequence[Request]) -> None:
        """Takes in which tokens these rows were given, after each round."""
        ...


class NgramTable:
    """A growing sequence, with the place where each of its n-grams last occurred.

    Example:
        >>> table = NgramTable()
        >>> table.extend([5, 6, 7, 8, 5, 6])
        >>> table.continuation(4)
        [7, 8, 5, 6]
        >>> table.extend([9])
        >>> table.continuation(4)
        []
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            end = len(self._tokens)
            # An n-gram is entered with the token that follows it, so that a lookup finds an earlier place.
            for length in _NGRAMS:
                if length <= end:
                    self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def continuation(self, most: int) -> list[int]:
        """Returns the tokens after the last place of the longest n-gram at the end; a period continues as a period."""
        end = len(self._tokens)
        for length in _NGRAMS:
            place = self._after.get(tuple(self._tokens[end - length :])) if length <= end else None
            if place is not None:
                period = self._tokens[place:]
                return (period * math.ceil(most / len(period)))[:most]
        return []


class NgramDrafter:
    """Copies what followed the last tokens where they occurred before in the prompt or the completion.

    Prompt lookup: the longest of the last 4, 3 or 2 tokens that occurred before, and its latest occurrence.

    Args:
        longest: most drafts.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tables: dict[Request, NgramTable] = {}

    def rooms(self, requests: Sequence[Request]) -> list[int]:
        """As many as follow an n-gram that occurred before."""
        return [len(self._table(request).continuation(self._longest)) for request in requests]

    def unprepared(self, requests: Sequence[Request]) -> int:
        """Nothing is computed."""
        return 0

    def prepare(self, requests: Sequence[Request]) -> None:
        """Nothing is computed."""

    def draft(self, requests: Sequence[Request], lanes: Lanes, cache: Rows, lengths: Sequence[int]) -> Tensor:
        """See ``Drafter``."""
        drafts = np.zeros((len(requests), max(lengths)), dtype=np.int64)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            drafts[row, :length] = self._table(request).continuation(length)
        return to_device(drafts, cache.device)

    def settle(self, requests: Sequence[Request]) -> None:
        """Forgets the tables of samples that have ended."""
        for request in requests:
            if request.finish_reason is not None:
                self._tables.pop(request, None)

    def _table(self, request: Request) -> NgramTable:
        table = self._tables.get(request)
        if table is None:
            table = self._tables[request] = NgramTable()
            table.extend(request.prompt)
        table.extend(request.token_ids[len(table) - len(request.prompt) :])
        return table


class ModelDrafter:
    """Draws ahead from a smaller model with the same tokens, and with a cache of its own.

    Args:
        decoder: the smaller model.
        vocabulary: number of the model's scores; that of the smaller one may differ in tokens that no text has.
        num_rows: most rows at once.
        num_columns: most tokens of a row, drafts included.
        max_batch_tokens: most tokens of one prefill; one row always fits.
    """

    def __init__(
        self, decoder: Decoder, vocabulary: int, num_rows: int, num_columns: int, max_batch_tokens: int
    ) -> None:
        self._decoder, self._vocabulary, self._budget = decoder, vocabulary, max_batch_tokens
        self._last_token = int(base_model(decoder.model).config.get_text_config().vocab_size) - 1
        self._positions = num_positions(decoder.model)
        self._cache = RowCache(WholePlane, num_rows, num_columns)
        self._rows: list[Request] = []

    def rooms(self, requests: Sequence[Request]) -> list[int]:
        """As many as the smaller model has positions for, in the longest row: its rows advance together."""
        if self._positions is None:
            return [self._vocabulary] * len(requests)
        longest = max(len(request.prompt) + len(request.token_ids) for request in requests)
        return [max(0, self._positions + 1 - longest)] * len(requests)

    def unprepared(self, requests: Sequence[Request]) -> int:
        """Tokens of rows that joined, and tokens that others were given meanwhile, besides the usual two."""
        known = {request: int(length) for request, length in zip(self._rows, self._cache.lengths, strict=False)}
        missing = [len(request.prompt) + len(request.token_ids) - known.get(request, 0) for request in requests]
        return sum(count for count in missing if count > 2)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Lets the cache hold the rows of these requests, in their order."""
        wanted = set(requests)
        staying = [row for row, request in enumerate(self._rows) if request in wanted]
        if self._rows and staying != list(range(len(self._rows))):
            self._cache.keep(staying)
        self._rows = [self._rows[row] for row in staying]
        self._join([request for request in requests if request not in set(self._rows)])
        places = {request: row for row, request in enumerate(self._rows)}
        order = [places[request] for request in requests]
        if order != list(range(len(order))):
            self._cache.keep(order)
            self._rows = list(requests)

        # Rows that were given tokens by plain steps.
        late = [tokens[:-1] if len(tokens) > 2 else [] for tokens in self._missing(requests)]
        if any(late):
            self._decoder.finish(late, self._cache)

    def _join(self, requests: Sequence[Request]) -> None:
        """Computes rows up to the token before the last."""
        by_tokens: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            by_tokens.setdefault((*request.prompt, *request.token_ids[:-1]), []).append(request)
        waiting = sorted(by_tokens, key=len, reverse=True)
        while waiting:
            # The longest comes first, so that its length is the width of the whole group.
            count = max(1, self._budget // len(waiting[0]))
            group, waiting = waiting[:count], waiting[count:]
            _, states = self._decoder.prefill([[self._known(token) for token in tokens] for tokens in group])
            for index, tokens in enumerate(group):
                self._cache.admit(states, index, len(tokens), copies=len(by_tokens[tokens]))
                self._rows.extend(by_tokens[tokens])

    def draft(self, requests: Sequence[Request], lanes: Lanes, cache: Rows, lengths: Sequence[int]) -> Tensor:
        """See ``Drafter``."""
        ahead, drafts = lanes.copy(), []
        for column in range(max(lengths)):
            if column == 0:
                logits_NV = self._decoder.finish(self._missing(requests), self._cache)
            else:
                logits_NV = self._decoder.step(ahead.tokens_N.clamp(max=self._last_token), self._cache)
            ahead.draw(self._as_wide(logits_NV))
            drafts.append(ahead.tokens_N)
        return torch.stack(drafts, dim=1)

    def settle(self, requests: Sequence[Request]) -> None:
        """Takes back the tokens that were rejected."""
        lengths = self._cache.lengths[: len(self._rows)].tolist()
        right = [len(request.prompt) + len(request.token_ids) - 1 for request in self._rows]
        self._cache.rollback([max(0, length - most) for length, most in zip(lengths, right, strict=True)])

    def _missing(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens that each row of the cache lacks."""
        missing = []
        for request, length in zip(requests, self._cache.lengths.tolist(), strict=False):
            start = length - len(request.prompt)
            tokens = request.token_ids[start:] if start >= 0 else [*request.prompt[start:], *request.token_ids]
            missing.append([self._known(token) for token in tokens])
        return missing

    def _known(self, token: int) -> int:
        return min(token, self._last_token)

    def _as_wide(self, logits_NV: Tensor) -> Tensor:
        missing = self._vocabulary - logits_NV.shape[-1]
        return logits_NV if missing == 0 else pad(logits_NV, (0, missing), value=-math.inf)


class EarlyExitDrafter:
    """Draws ahead from the scores after the model's first layers, in the model's own cache (Zhang et al. 2023).

    The final norm and the output layer read the hidden states of an earlier layer, as in Draft & Verify, arXiv
    2309.08168. The first layers' keys and values are the model's own, so that nothing is stored or
    prepared; the check computes them again.

    Args:
        decoder: the model's first layers, see ``first_layers``.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def rooms(self, requests: Sequence[Request]) -> list[int]:
        """As many as are wanted."""
        return [len(request.prompt) + request.limit for request in requests]

    def unprepared(self, requests: Sequence[Request]) -> int:
        """Nothing has to be computed."""
        return 0

    def prepare(self, requests: Sequence[Request]) -> None:
        """Nothing has to be computed."""

    def draft(self, requests: Sequence[Request], lanes: Lanes, cache: Rows, lengths: Sequence[int]) -> Tensor:
        """See ``Drafter``."""
        ahead, drafts = lanes.copy(), []
        for _ in range(max(lengths)):
            ahead.draw(self._decoder.step(ahead.tokens_N, cache))
            drafts.append(ahead.tokens_N)
        cache.rollback([len(drafts)] * len(requests))
        return torch.stack(drafts, dim=1)

    def settle(self, requests: Sequence[Request]) -> None:
        """Nothing is kept."""


def first_layers(model: nn.Module, count: int) -> nn.Module:
    """Returns a causal language model that ends after its first decoder layers; modules and weights are shared.

    Args:
        model: a causal language model of transformers, bare or with adapters within its layers.
        count: layers, at least 1 and fewer than the model has.

    Raises:
        ValueError: the model has too few layers.
    """
    base = base_model(model)
    blocks = decoder_blocks(base)
    if not 1 <= count < len(blocks):
        raise ValueError(
            f"speculation={{'early_exit': {count}}} is not allowed: the model has {len(blocks)} layers; "
            f"use 1 to {len(blocks) - 1}"
        )
    return _shortened(base, blocks, count)


def _shortened(module: nn.Module, blocks: Sequence[nn.Module], count: int) -> nn.Module:
    """Copies the modules on the way to the list of blocks, and cuts the list."""
    if isinstance(module, nn.ModuleList) and list(module) == list(blocks):
        return nn.ModuleList(module[:count])
    inside = {id(part) for part in module.modules()}
    if id(blocks[0]) not in inside:
        return module
    shallow = copy(module)
    shallow._modules = {
        name: None if part is None else _shortened(part, blocks, count) for name, part in module._modules.items()
    }
    return shallow
