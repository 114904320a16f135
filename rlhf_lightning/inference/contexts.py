"""Prompts that follow compressed contexts: how they are encoded, and how many tokens fit after them.

An entry of a context's cache stands in a prompt as a token below 0, the same for all entries of a context, so that a
prompt has as many tokens as its row has columns, and prompts after the same context are told apart from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.text_tokens import opening_tokens, prompt_tokens
from ..models import CompressedContext, Compressor
from ..utils.validation import check_same_length

Context = str | Sequence[int] | CompressedContext | None


class ContextPrompts:
    """Encodes prompts as an engine does, each after its context.

    Args:
        engine: encodes prompts without a context.
        prompts: strings, or token ids.
        contexts: one for each prompt: text, token ids, a compressed context, or ``None``. Equal ones are compressed
            once, or once for each prompt by a compressor that reads it.
        compressor: compresses texts and token ids.

    Raises:
        ValueError: there is not one for each prompt, one has no tokens, or there is no compressor.
    """

    def __init__(
        self, engine: Any, prompts: Sequence[Any], contexts: Sequence[Context], compressor: Compressor | None
    ) -> None:
        check_same_length(prompts=prompts, contexts=contexts)
        self.tokenizer = engine.tokenizer
        self._engine = engine
        self._keys: list[int] = []  # of each prompt's context: below 0, or 0 for none
        self.table: dict[int, CompressedContext] = {}

        known: dict[Any, int] = {}
        waiting: dict[int, tuple[list[int], list[int]]] = {}  # tokens of contexts, and of prompts
        for number, context in enumerate(contexts):
            if context is None:
                self._keys.append(0)
                continue
            if isinstance(context, CompressedContext):
                key = known.setdefault(id(context), -1 - len(known))
                self.table[key] = context
            else:
                tokens, query = self._tokens(context, number), self._following(prompts[number], number)
                content = (tokens, tuple(query) if getattr(compressor, "reads_query", False) else ())
                key = known.setdefault(content, -1 - len(known))
                waiting.setdefault(key, (list(tokens), query))
            self._keys.append(key)
        if waiting and compressor is None:
            raise ValueError("contexts are given as tokens, and the engine has no compressor: give it compressor=")
        if waiting and compressor is not None:
            pairs = list(waiting.values())
            found = compressor.compress([tokens for tokens, _ in pairs], [query for _, query in pairs])
            self.table |= dict(zip(waiting, found, strict=True))

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        ends: frozenset[int] = self._engine.end_token_ids
        return ends

    def encode(self, prompt: str | Sequence[int], number: int = 0) -> tuple[int, ...]:
        """Encodes a prompt after the entries of its context; a string without the tokens that open every text."""
        key = self._keys[number]
        if key == 0:
            alone: tuple[int, ...] = self._engine.encode(prompt, number)
            return alone
        return (*[key] * self.table[key].size, *self._following(prompt, number))

    def token_limit(self, prompt: tuple[int, ...], requested: int) -> int:
        """Returns the maximum number of new tokens, by the positions after the context and the prompt."""
        context = self.table.get(prompt[0])
        skipped = 0 if context is None else context.position - context.size
        # A prompt of that many tokens has the same last position.
        limit: int = self._engine.token_limit((*[0] * skipped, *prompt), requested)
        return limit

    def _tokens(self, context: str | Sequence[int], number: int) -> tuple[int, ...]:
        if not isinstance(context, str):
            return tuple(int(token) for token in context)
        if self.tokenizer is None:
            raise ValueError(f"context {number} is the string {context[:40]!r}: without a tokenizer, give token ids")
        return tuple(prompt_tokens(self.tokenizer, context)) if context else ()

    def _following(self, prompt: str | Sequence[int], number: int) -> list[int]:
        tokens = list(self._engine.encode(prompt, number))
        opening = opening_tokens(self.tokenizer) if isinstance(prompt, str) else []
        opened = len(tokens) > len(opening) and tokens[: len(opening)] == opening
        return tokens[len(opening) :] if opened else tokens
