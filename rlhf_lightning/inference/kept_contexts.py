"""Compressors that learn nothing: they keep a part of a context, or a text about it.

All keep one entry of the cache for every ``ratio`` tokens of a context, rounded up.

Legend: H heads, K heads of keys and values, T tokens of the context, Q tokens of a chunk, C entries that are kept,
D head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..data.text_tokens import decode, prompt_tokens
from ..models import CompressedContext, context_states, decoder_of, evaluating
from ..models.compressed_context import check_entries
from ..models.own_attention import EAGER, using_attention
from ..utils.validation import check_choice, check_count
from .engine import Engine, LocalEngine
from .sampling import SamplingParams

# Tokens whose attention to all before them is in memory at once.
_CHUNK = 256
_SUMMARY = "{context}\n\nSummarise the text above in at most {tokens} tokens, for questions about it.\n\nSummary: "


def num_kept(num_tokens: int, ratio: int) -> int:
    """Returns the number of entries that stand for a context: one for every ``ratio`` tokens, rounded up.

    Example:
        >>> num_kept(128, 4), num_kept(10, 4)
        (32, 3)
    """
    return math.ceil(num_tokens / ratio)


class _KeptContexts(ABC):
    """Compresses contexts one by one, to one entry for every ``ratio`` tokens."""

    def __init__(self, model: nn.Module, ratio: int = 4) -> None:
        check_count("ratio", ratio, "4 keeps a quarter; 1 keeps all")
        check_entries(model)
        self.model, self.ratio = model, ratio

    def compress(
        self, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None = None
    ) -> list[CompressedContext]:
        """Compresses contexts; ``queries`` are not read.

        Raises:
            ValueError: a context has no tokens.
        """
        return [self._kept(list(context)) for context in contexts]

    @abstractmethod
    def _kept(self, context: list[int]) -> CompressedContext:
        """Compresses one context."""


class Truncation(_KeptContexts):
    """Keeps the last tokens of a context, as if there had been no others.

    Args:
        model: a causal language model.
        ratio: tokens of a context for one that is kept, at least 1.

    Raises:
        ValueError: an option is not allowed, or the model cannot be given entries of a cache.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> [kept] = Truncation(LlamaForCausalLM(config), ratio=4).compress([range(3, 15)])
        >>> kept.size, kept.position, kept.num_tokens
        (3, 3, 12)
    """

    def _kept(self, context: list[int]) -> CompressedContext:
        kept = context_states(self.model, context[-num_kept(len(context), self.ratio) :])
        return replace(kept, num_tokens=len(context))


class SinkWindow(_KeptContexts):
    """Keeps the first and the last entries of a context's cache.

    Paper: StreamingLLM (Xiao et al., 2023, arXiv:2309.17453): the first tokens are sinks of attention, which a window
    alone would lose. Departures: the whole context is computed with full attention, so that entries in the window may
    hold what earlier tokens said, and keys keep the positions that they were computed at.

    Args:
        model: a causal language model.
        ratio: tokens of a context for one that is kept, at least 1.
        sinks: first tokens among the kept ones, at least 0.

    Raises:
        ValueError: an option is not allowed, or the model cannot be given entries of a cache.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> [kept] = SinkWindow(LlamaForCausalLM(config), ratio=4, sinks=1).compress([range(3, 15)])
        >>> kept.size, kept.position
        (3, 12)
    """

    def __init__(self, model: nn.Module, ratio: int = 4, sinks: int = 4) -> None:
        super().__init__(model, ratio)
        _check_number("sinks", sinks, "4 is usual")
        self.sinks = sinks

    def _kept(self, context: list[int]) -> CompressedContext:
        count = num_kept(len(context), self.ratio)
        first = min(self.sinks, count)
        kept = [*range(first), *range(len(context) - (count - first), len(context))]
        return context_states(self.model, context).select(kept)


class AttentionEviction(_KeptContexts):
    """Keeps the entries of a context's cache that later tokens attend to most.

    Papers: H2O (Zhang et al., 2023, arXiv:2306.14048) with ``observed="context"``: the score of an entry is the sum of
    the attention that all tokens of the context pay to it, so that earlier ones are seen by more; SnapKV (Li et al.,
    2024, arXiv:2404.14469) with ``window``: the last tokens alone are observed, here without pooling over neighbours.
    With ``observed="query"`` the tokens that follow the context are observed: what is kept then serves this query
    alone. Every layer and every head of keys and values chooses its own entries, by the sum over the heads that share
    it. Departure: entries are chosen once, when the whole context has been computed, instead of token by token.

    Args:
        model: a causal language model.
        ratio: tokens of a context for one entry that is kept, at least 1.
        recent: last tokens that are kept whatever their score, at least 0; they count as kept.
        observed: tokens whose attention counts: those of the ``context``, or of the ``query`` that follows it.
        window: with ``context``: the last so many alone, at least 1; all by default.

    Raises:
        ValueError: an option is not allowed, or the model cannot be given entries of a cache.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> [kept] = AttentionEviction(LlamaForCausalLM(config), ratio=4, recent=1).compress([range(3, 15)])
        >>> kept.size, kept.position
        (3, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: int = 4,
        recent: int = 0,
        observed: Literal["context", "query"] = "context",
        window: int | None = None,
    ) -> None:
        super().__init__(model, ratio)
        _check_number("recent", recent, "0 keeps the best alone")
        check_choice("observed", observed, ("context", "query"))
        if window is not None:
            check_count("window", window, "16 is usual; leave it out to observe all tokens")
            if observed == "query":
                raise ValueError(
                    f"window is {window!r}, and observed='query' observes the query's tokens: leave out one of them"
                )
        self.recent, self.observed, self.window = recent, observed, window
        self.reads_query = observed == "query"

    @torch.no_grad()
    def compress(
        self, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None = None
    ) -> list[CompressedContext]:
        """Compresses contexts.

        Args:
            contexts: tokens of each, at least one.
            queries: tokens that will follow each, at least one; needed with ``observed="query"``.

        Raises:
            ValueError: a context has no tokens, or queries are missing.
        """
        if self.observed == "context":
            return super().compress(contexts)
        if queries is None or not all(map(len, queries)):
            raise ValueError("observed='query' needs the tokens that follow each context: give queries, none empty")
        return [self._kept(list(context), list(query)) for context, query in zip(contexts, queries, strict=True)]

    def _kept(self, context: list[int], query: Sequence[int] = ()) -> CompressedContext:
        length = len(context)
        if not length:
            raise ValueError("a context has no tokens: leave it out, or give it one")
        first = length if query else 0 if self.window is None else max(0, length - self.window)
        states, scores = observed_attention(self.model, [*context, *query], length, first)
        count = num_kept(length, self.ratio)
        recent = min(self.recent, count)
        chosen_by_layer = [_chosen(scores_KT, count, recent) for scores_KT in scores]
        kept = [
            tuple(_gathered(states_KTD, chosen_KC) for states_KTD in layer)
            for layer, chosen_KC in zip(states, chosen_by_layer, strict=True)
        ]
        return CompressedContext(kept, length, length)  # type: ignore[arg-type]


class TextSummary:
    """Replaces a context by a summary that an engine writes, as if the summary had been the context.

    Args:
        model: a causal language model, which continues after the summary.
        tokenizer: of the model.
        ratio: tokens of a context for one of its summary, at least 1; longer summaries are cut off.
        engine: writes the summaries, greedily; by default the model itself.
        prompt: asks for a summary: a text with ``{context}``, and if wanted ``{tokens}``, its largest length, and
            ``{query}``, the prompt that follows the context.

    Raises:
        ValueError: an option is not allowed, or the model cannot be given entries of a cache.

    Example:
        >>> summary = TextSummary(model, tokenizer, ratio=8, engine=RemoteEngine("http://localhost:8000", tokenizer))
        ... # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        ratio: int = 4,
        engine: Engine | None = None,
        prompt: str = _SUMMARY,
    ) -> None:
        check_count("ratio", ratio, "4 is a good start")
        if "{context}" not in prompt:
            raise ValueError(f"prompt is {prompt!r:.60}, without a place for the context: write {{context}} there")
        check_entries(model)
        self.model, self.tokenizer, self.ratio, self.prompt = model, tokenizer, ratio, prompt
        self.engine: Engine = LocalEngine(model, tokenizer) if engine is None else engine
        self.reads_query = "{query}" in prompt

    def compress(
        self, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None = None
    ) -> list[CompressedContext]:
        """Compresses contexts.

        Args:
            contexts: tokens of each, at least one.
            queries: tokens that will follow each; needed where the prompt has ``{query}``.

        Raises:
            ValueError: a context has no tokens, or queries are missing.
        """
        if not all(map(len, contexts)):
            raise ValueError("a context has no tokens: leave it out, or give it one")
        if "{query}" in self.prompt and queries is None:
            raise ValueError("the prompt for summaries has {query}: give queries, the tokens that follow each context")
        counts = [num_kept(len(context), self.ratio) for context in contexts]
        prompts = [self._asked(n, contexts, queries, counts) for n in range(len(contexts))]
        greedy = SamplingParams(max_new_tokens=max(counts, default=1), temperature=0.0)
        answers = self.engine.generate(prompts, sampling=greedy, limits=counts)
        # Tokens of the engine's model may be others, so texts are encoded again.
        texts = [prompt_tokens(self.tokenizer, answer.text) for [answer] in answers]
        return [
            replace(context_states(self.model, text[:count]), num_tokens=len(context))
            for text, count, context in zip(texts, counts, contexts, strict=True)
        ]

    def _asked(
        self, n: int, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None, counts: Sequence[int]
    ) -> str:
        # Not str.format: texts of prompts may have braces of their own.
        found = self.prompt.replace("{tokens}", str(counts[n]))
        if queries is not None:
            found = found.replace("{query}", decode(self.tokenizer, queries[n]))
        return found.replace("{context}", decode(self.tokenizer, contexts[n]))


def observed_attention(
    model: nn.Module, tokens: Sequence[int], length: int, first: int
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Computes the cache of a sequence's beginning, and the attention that some of its tokens pay to it.

    Args:
        model: a causal language model.
        tokens: the sequence.
        length: tokens of the beginning, at least 1.
        first: the first token whose attention counts; all after it do as well.

    Returns:
        Per layer, keys and values of the beginning, ``(K, T, D)`` each; and the sums of attention to it over the tokens
        that count and the heads that share keys and values, ``(K, T)``.
    """
    base, decoder = check_entries(model), decoder_of(model)
    ids = torch.tensor(list(tokens), device=next(model.parameters()).device)
    cache = DynamicCache()
    scores: list[Tensor] = []
    with torch.no_grad(), evaluating(model), using_attention(base, EAGER):
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            output = decoder(
                input_ids=chunk[None],
                position_ids=torch.arange(start, start + len(chunk), device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
            skipped = max(0, first - start)
            for number, (layer, weights) in enumerate(zip(cache.layers, output.attentions, strict=True)):
                heads: int = layer.keys.shape[1]  # type: ignore[union-attr]
                if start == 0:
                    scores.append(weights.new_zeros((heads, length), dtype=torch.float32))
                seen_HT = weights[0, :, skipped:].float().sum(1)[:, :length]
                scores[number][:, : seen_HT.shape[1]] += seen_HT.unflatten(0, (heads, -1)).sum(1)
    layers: list[Any] = cache.layers
    return [(layer.keys[0, :, :length], layer.values[0, :, :length]) for layer in layers], scores


def _chosen(scores_KT: Tensor, count: int, recent: int) -> Tensor:
    """Returns the entries with the largest scores, the later ones of equal, and the last ones, in order: ``(K, C)``."""
    heads, length = scores_KT.shape
    # Tokens outside of a window of attention all have the score 0.
    backwards_KT = scores_KT[:, : length - recent].flip(1).argsort(dim=1, descending=True, stable=True)
    best_KC = length - recent - 1 - backwards_KT[:, : count - recent]
    last_KC = torch.arange(length - recent, length, device=scores_KT.device).expand(heads, -1)
    return torch.cat((best_KC, last_KC), dim=1).sort(dim=1).values


def _gathered(states_KTD: Tensor, chosen_KC: Tensor) -> Tensor:
    return states_KTD.gather(1, chosen_KC[..., None].expand(-1, -1, states_KTD.shape[-1]))


def _check_number(name: str, value: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0 ({advice})")
