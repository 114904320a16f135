"""Speculative decoding: several tokens of a row in one forward, the same tokens as plain decoding draws.

A drafter guesses the next ``k`` tokens of every row; one forward of the model computes the scores after each of them;
at every position the model draws with the uniform that its step has in plain decoding; and a guess counts if it is
what was drawn. So every token is the one of plain decoding, for each seed and all settings, up to rounding in the
model's own products, and neither drafts nor their lengths, which are chosen by the clock, change a sample or its
log-probs.

Leviathan et al. (2023, arXiv 2211.17192) accept a draft ``x`` of a distribution ``q`` with probability
``min(1, p(x) / q(x))`` instead, and draw from ``max(p - q, 0)`` where it is rejected. This accepts most, but then a
token depends on whether its position was drafted. Here a draft model draws from its ``q`` with the same uniform ``u``
by inverting its cumulative distribution. Share of drafts that are accepted, for a chat model of 135 million weights and
720 tokens that it wrote itself; drafts by its own scores with normal noise of standard deviation 0.5 (good) or 1
(fair), and by the model without 4 of its 30 layers (poor, and not trained to do without):

    temperature, top_p       1.0, 1    1.0, 0.95    0.7, 1    0.7, 0.9    0.3, 1
    entropy of p (nats)        2.26         1.94      1.23        0.89      0.41
    good: sum of min(p, q)    0.865        0.863     0.851       0.846     0.831
          same uniform        0.641        0.663     0.739       0.768     0.809
    fair: sum of min(p, q)    0.744        0.739     0.719       0.711     0.683
          same uniform        0.539        0.558     0.617       0.641     0.664
    poor: sum of min(p, q)    0.542        0.535     0.543       0.539     0.544
          same uniform        0.349        0.365     0.447       0.471     0.528

The price is acceptance where a distribution is broad; where it is peaked, as in sharpened sampling, arithmetic and
code, little is lost. Noise shared per token (Gumbel) would accept nearly the maximum, and needs as many random numbers
per step as the vocabulary has tokens, in plain decoding as well. A draft by lookup, or of a greedy sample, is accepted
as often either way.

Legend: N rows, K drafts of a row, W = K + 1, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..models import base_model, evaluating, load_causal_lm, load_tokenizer, num_positions
from ..models.backbone import decoder_blocks
from ..models.half_weights import rounded
from ..models.own_attention import is_switchable, using_attention
from ..sequences import register_attention
from .completion import Request
from .cpu_linear import packed_linears
from .decoder import Decoder
from .draft_lengths import Acceptance, Pace
from .drafts import Drafter, EarlyExitDrafter, ModelDrafter, NgramDrafter, first_layers
from .lanes import Lanes, to_device
from .projection import exact_projection
from .row_cache import Rows
from .sampling import SamplingParams, check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["ngram", "draft", "early_exit"]
SpeculationSpec = Literal["ngram"] | Mapping[str, Any]

# Most drafts of a round: lookups copy long passages for nothing, models pay for each token.
_LONGEST: Final = {"ngram": 10, "draft": 8, "early_exit": 8}
# Rows whose tokens cost little more than those of one, before anything is measured.
_FREE_ROWS: Final = {"cpu": 8}
_FREE_ROWS_OF_ACCELERATORS: Final = 128


@dataclass
class SpeculationCounts:
    """Counts of speculation since the engine was made.

    Attributes:
        rounds: forwards that checked drafts.
        plain_steps: forwards without drafts.
        plain_calls: calls of the engine that were made as without speculation, since it had gained too little.
        drafted: tokens that were drafted.
        accepted: drafts that were what the model drew.
        tokens: tokens that rounds gave to samples, the model's own one per row and round included.
    """

    rounds: int = 0
    plain_steps: int = 0
    plain_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0


class Speculation:
    """Holds an engine's way of drafting, and its measurements.

    Args:
        spec: ``"ngram"``, ``{"draft": folder or model}`` or ``{"early_exit": number of layers}``.
        model: the model that samples.
        tokenizer: its tokenizer, if the engine has one.

    Raises:
        ValueError: ``spec`` is something else, the draft has another vocabulary, or the model has too few layers.
    """

    def __init__(self, spec: SpeculationSpec, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.kind, value = parse_speculation(spec)
        self.draft: nn.Module | None = None
        self.counts = SpeculationCounts()
        cost = 0.0
        if self.kind == "early_exit":
            first_layers(model, value)
            self._layers, cost = value, value / len(decoder_blocks(base_model(model)))
        if self.kind == "draft":
            self.draft = _draft_model(value, model, tokenizer)
            cost = _share(self.draft, model)
        place = next(model.parameters()).device.type
        self.pace = Pace(_LONGEST[self.kind], cost, _FREE_ROWS.get(place, _FREE_ROWS_OF_ACCELERATORS))

    @property
    def longest(self) -> int:
        """Most drafts of a round."""
        return self.pace.longest

    def statistics(self) -> dict[str, Any]:
        """The kind, the counts, and the share of drafts that were accepted."""
        counts = asdict(self.counts)
        rate = self.counts.accepted / self.counts.drafted if self.counts.drafted else 0.0
        return {"kind": self.kind, **counts, "acceptance_rate": rate}

    def rests(self, rows: int) -> bool:
        """Whether a call for so many samples is made without speculation; counts it."""
        rests = self.pace.rests(rows)
        self.counts.plain_calls += rests
        return rests

    @contextmanager
    def begin(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        num_rows: int,
        max_batch_tokens: int,
    ) -> Iterator[Speculator]:
        """Makes what speculates in one call of the engine, and lets a draft model generate within the context.

        Args:
            decoder: the model.
            requests: all samples of the call.
            params: the sampling settings.
            num_rows: most rows at once.
            max_batch_tokens: most tokens of one prefill.

        Raises:
            ValueError: the draft model does not compute the same with rows of their own lengths.
        """
        with ExitStack() as contexts:
            drafter: Drafter = NgramDrafter(self.longest)
            if self.kind == "early_exit":
                # Made anew for each call: adapters may have been added meanwhile.
                drafter = EarlyExitDrafter(Decoder(first_layers(decoder.model, self._layers)))
            if self.draft is not None:
                self.draft.to(decoder.device)
                for prepare in (evaluating, rounded, exact_projection, packed_linears):
                    contexts.enter_context(prepare(self.draft))
                contexts.enter_context(using_attention(base_model(self.draft), register_attention()))
                draft = Decoder(self.draft)
                if not draft.agrees_in_rows():
                    raise ValueError(
                        f"{type(base_model(self.draft)).__name__} cannot draft: it does not compute the same with rows "
                        "of their own lengths in a cache; use another draft model"
                    )
                vocabulary = int(base_model(decoder.model).config.get_text_config().vocab_size)
                columns = max(len(request.prompt) + request.limit for request in requests) + self.longest
                drafter = ModelDrafter(draft, vocabulary, num_rows, columns, max_batch_tokens)
            yield Speculator(decoder, drafter, self.pace, self.counts, params)
            self.pace.finish(len(requests))


class Speculator:
    """Gives rows several tokens at once, by rounds of drafts and checks.

    Args:
        decoder: the model.
        drafter: guesses tokens.
        pace: chooses lengths.
        counts: what is counted.
        params: the sampling settings.
    """

    def __init__(
        self, decoder: Decoder, drafter: Drafter, pace: Pace, counts: SpeculationCounts, params: SamplingParams
    ) -> None:
        self._decoder, self._drafter, self._pace, self._counts, self._params = decoder, drafter, pace, counts, params
        self._positions = num_positions(decoder.model)
        self._acceptance: dict[Request, Acceptance] = {}

    def step(self, requests: Sequence[Request], cache: Rows, lanes: Lanes) -> bool:
        """Drafts and checks, if that is faster than a plain step; returns whether it was done.

        Args:
            requests: the samples, each with at least one token and not ended; they are given their tokens.
            cache: holds all of their tokens but the last, also afterwards.
            lanes: theirs.
        """
        rows = [self._of(request) for request in requests]
        rooms = self._rooms(requests)
        unprepared = self._drafter.unprepared(requests) if any(rooms) else 0
        left = sum(request.limit - len(request.token_ids) for request in requests) // (2 * len(requests))
        lengths = self._pace.choose([row.rate for row in rows], rooms, unprepared, max(left, 1))
        if not any(lengths):
            return False
        began = time.perf_counter()
        self._drafter.prepare(requests)
        prepared = time.perf_counter()
        self._pace.observe_preparation(unprepared, prepared - began)
        accepted = self._round(requests, cache, lanes, lengths)
        self._pace.observe_round(lengths, accepted, rows, time.perf_counter() - prepared)
        for request in requests:
            if request.finish_reason is not None:
                self._acceptance.pop(request)
        return True

    def observe_plain(self, num_rows: int, seconds: float) -> None:
        """Takes in that a plain step was done, and how long it took."""
        self._pace.observe_plain(num_rows, seconds)
        self._counts.plain_steps += 1

    def _of(self, request: Request) -> Acceptance:
        if request not in self._acceptance:
            self._acceptance[request] = self._pace.new_row()
        return self._acceptance[request]

    def _rooms(self, requests: Sequence[Request]) -> list[int]:
        """Most drafts of each row: the last token of a sample is never drafted, and positions end somewhere."""
        left = self._pace.longest
        if self._positions is not None:
            left = self._positions - max(len(request.prompt) + len(request.token_ids) for request in requests)
        rooms = self._drafter.rooms(requests)
        return [
            max(0, min(room, left, request.limit - len(request.token_ids) - 1))
            for room, request in zip(rooms, requests, strict=True)
        ]

    def _round(self, requests: Sequence[Request], cache: Rows, lanes: Lanes, lengths: Sequence[int]) -> list[int]:
        """Drafts and checks; returns how many drafts of each row were accepted."""
        drafts_NK = self._drafter.draft(requests, lanes, cache, lengths)
        if min(lengths) < max(lengths):
            drafts_NK = _masked(drafts_NK, lengths)
        tokens_NW = torch.cat((lanes.tokens_N[:, None], drafts_NK.clamp(min=0)), dim=1)
        drawn_NW, kept_N, table = check(self._decoder.extend(tokens_NW, cache), drafts_NK, lanes)

        # One copy to the host for the whole round.
        values = table.tolist()
        counts = [int(row[0]) for row in values[0]]
        cache.rollback([tokens_NW.shape[1] - count for count in counts])
        lanes.take(drawn_NW, kept_N, counts)
        for row, request in enumerate(requests):
            self._counts.tokens += self._push(request, counts[row], [part[row] for part in values[1:]])
        self._drafter.settle(requests)
        self._counts.rounds += 1
        self._counts.drafted += sum(lengths)
        self._counts.accepted += sum(counts) - len(counts)
        return [count - 1 for count in counts]

    def _push(self, request: Request, count: int, parts: Sequence[Sequence[float]]) -> int:
        """Gives a sample its tokens, up to one that ends it; returns how many it took."""
        taken = 0
        for token, logprob, model_logprob, finite in list(zip(*parts, strict=True))[:count]:
            check_finite(bool(finite))
            request.push(int(token), logprob, model_logprob if self._params.model_logprobs else None)
            taken += 1
            if request.finish_reason is not None:
                break
        return taken


def check(logits_NWV: Tensor, drafts_NK: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """Draws at every position as plain decoding would after the drafts before it, and counts the drafts that agree.

    Args:
        logits_NWV: the model's scores after the last token of each row, and after each of its drafts.
        drafts_NK: the drafts; -1 for positions without a draft.
        lanes: the rows' lanes, which stay as they are.

    Returns:
        The drawn tokens, ``(N, W)``; how many of them are those of plain decoding, ``(N,)``, from 1 to W; and both with
        what ``Lanes.draw`` returns, ``(5, N, W)``, for one copy to the host.
    """
    rows, width = logits_NWV.shape[:2]
    wide = lanes.ahead(drafts_NK)
    drawn = wide.draw(logits_NWV.flatten(0, 1)).view(-1, rows, width)
    drawn_NW = wide.tokens_N.view(rows, width)
    # The first draft that differs ends the row's share; what the model drew in its place is still its own token.
    kept_N = 1 + (drawn_NW[:, :-1] == drafts_NK).long().cumprod(1).sum(1)
    return drawn_NW, kept_N, torch.cat((kept_N.double()[None, :, None].expand(1, -1, width), drawn))


def _masked(drafts_NK: Tensor, lengths: Sequence[int]) -> Tensor:
    """Replaces what follows a row's own drafts by -1."""
    lengths_N1 = to_device(np.array(lengths, dtype=np.int64)[:, None], drafts_NK.device)
    return drafts_NK.where(torch.arange(drafts_NK.shape[1], device=drafts_NK.device) < lengths_N1, -1)


def parse_speculation(spec: object) -> tuple[Kind, Any]:
    """Returns the kind of speculation, and its folder, model or number of layers.

    Raises:
        ValueError: it is neither ``"ngram"`` nor ``{"draft": folder or model}`` nor ``{"early_exit": layers}``.

    Example:
        >>> parse_speculation({"early_exit": 2})
        ('early_exit', 2)
    """
    if spec == "ngram":
        return "ngram", None
    if isinstance(spec, Mapping) and len(spec) == 1:
        kind, value = next(iter(spec.items()))
        if kind == "draft" and isinstance(value, str | Path | nn.Module):
            return "draft", value
        if kind == "early_exit" and isinstance(value, int) and not isinstance(value, bool):
            return "early_exit", value
    raise ValueError(
        f"speculation={spec!r} is not allowed: use 'ngram', {{'draft': a folder or model}}, "
        "{'early_exit': a number of layers} or None"
    )


def _draft_model(
    draft: str | Path | nn.Module, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> nn.Module:
    """Loads a draft model, and checks that it speaks in the model's tokens."""
    own, place = None, draft if isinstance(draft, str | Path) else type(draft).__name__
    if not isinstance(draft, nn.Module):
        own = load_tokenizer(draft) if tokenizer is not None else None
        draft = load_causal_lm(draft, dtype=next(model.parameters()).dtype, trainable=False)
    sizes = [int(base_model(part).config.get_text_config().vocab_size) for part in (draft, model)]
    same = sizes[0] == sizes[1]
    if own is not None and tokenizer is not None:
        # The numbers of scores may differ then: some models have more of them than their tokenizer has tokens.
        sizes, same = [len(own), len(tokenizer)], own.get_vocab() == tokenizer.get_vocab()
    if not same:
        raise ValueError(
            f"speculation={{'draft': {str(place)!r}}} has another vocabulary ({sizes[0]} tokens, the model has "
            f"{sizes[1]}): use a draft model with the tokenizer of the model"
        )
    if not is_switchable(base_model(draft)):
        raise ValueError(
            f"speculation={{'draft': {str(place)!r}}} cannot draft: {type(base_model(draft)).__name__} does not take "
            "a cache with rows of their own lengths; use another draft model"
        )
    return draft


def _share(draft: nn.Module, model: nn.Module) -> float:
    """Estimates the cost of a draft model's step in the model's steps: by weights if they are large, else by layers."""
    weights = [sum(weight.numel() for weight in part.parameters()) for part in (draft, model)]
    layers = [len(decoder_blocks(base_model(part))) for part in (draft, model)]
    return max(weights[0] / weights[1], layers[0] / layers[1])
