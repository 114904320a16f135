"""Answers prompts with an engine or a strategy: a row for every answer, as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from ..inference import Completion, EnsemblePolicy, LocalEngine, SearchResult, Strategy, derive_seed
from ..inference.answering import takes_tokens
from ..inference.candidates import columns_of
from ..inference.completion import Request
from ..inference.telemetry import Telemetry
from ..sequences import Example
from .options import GenerateOptions
from .output import Key

Row: TypeAlias = dict[str, Any]
Emit: TypeAlias = Callable[[Row], object]

_NAMES = (
    *("index", "sample", "prompt", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "tokens"),
    *("score", "scorer_tokens", "expansions", "stopped_by", "seconds", "candidates", "thought"),
)


class RowMaker:
    """Makes the rows of prompts.

    Args:
        options: model, strategy and settings.
        examples: the prompts.

    Raises:
        ValueError: something cannot be loaded, or a prompt leaves no room for an answer.
    """

    def __init__(self, options: GenerateOptions, examples: Sequence[Example]) -> None:
        self.options, self.examples = options, examples
        self.engine = options.engine()
        self._takes_ids = takes_tokens(self.engine)
        ask = getattr(self.engine, "longest_prompt", None)
        longest = ask(options.sampling) if callable(ask) and self._takes_ids else None
        for example in examples:
            if longest is not None and len(example.root.tokens) > longest:
                raise ValueError(
                    f"{example.row_id}: the prompt has {len(example.root.tokens)} tokens, and the model has room for "
                    f"{longest} before an answer: shorten or remove it"
                )

    def telemetry(self) -> Telemetry:
        """Tells what the rows so far have cost."""
        return Telemetry.of(self.engine)

    def make(self, keys: Sequence[Key], emit: Emit) -> None:
        """Makes the rows of some samples, and passes each on when it is finished."""
        for part in _parts(keys, self.options.prompts_at_once):
            if isinstance(self.engine, Strategy):
                self._search(self.engine, part, emit)
            else:
                self._sample(part, emit)

    def _sample(self, keys: Sequence[Key], emit: Emit) -> None:
        start, finished = time.perf_counter(), set()

        def finish(number: int, completion: Completion) -> None:
            if number not in finished:
                finished.add(number)
                emit(self._sampled(keys[number], completion, time.perf_counter() - start))

        def watch(request: Request) -> None:
            if request.finish_reason is not None:
                finish(request.position[0], request.completion())

        # A server's answers come all at once.
        watched: dict[str, Any] = {"watch": watch} if isinstance(self.engine, LocalEngine | EnsemblePolicy) else {}
        prompts = [self._tokens(key) if self._takes_ids else self._prompt(key) for key in keys]
        seeds = [[self._seed(key)] for key in keys]
        groups = self.engine.generate(prompts, 1, self.options.sampling, seeds=seeds, **watched)
        for number, group in enumerate(groups):
            finish(number, group[0])

    def _search(self, strategy: Strategy, keys: Sequence[Key], emit: Emit) -> None:
        strategy.search(
            [self._prompt(key) for key in keys],
            [self._seed(key) for key in keys],
            sampling=self.options.sampling,
            columns=columns_of([self.examples[index].fields for index, _ in keys]),
            encoded=[self._tokens(key) for key in keys] if self._takes_ids else None,
            watch=lambda number, result: emit(self._searched(keys[number], result)),
        )

    def _seed(self, key: Key) -> int:
        return derive_seed(self.options.seed, *key)

    def _tokens(self, key: Key) -> list[int]:
        tokens: list[int] = self.examples[key[0]].root.tokens.tolist()
        return tokens

    def _prompt(self, key: Key) -> Any:
        return self.examples[key[0]].fields["prompt"]

    # Rows.

    def _begun(self, key: Key, text: str) -> Row:
        fields = self.examples[key[0]].fields
        others = {f"given_{name}" if name in _NAMES else name: v for name, v in fields.items() if name != "prompt"}
        return {"index": key[0], "sample": key[1], "prompt": fields["prompt"], "completion": text, **others}

    def _sampled(self, key: Key, completion: Completion, seconds: float) -> Row:
        count = len(completion.token_ids)
        return self._begun(key, completion.text) | {
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(self._tokens(key)),
            "completion_tokens": count,
            "tokens": count,
            "seconds": round(seconds, 4),
        }

    def _searched(self, key: Key, result: SearchResult) -> Row:
        row = self._begun(key, result.text) | {
            "finish_reason": result.best.finish_reason,
            "prompt_tokens": len(self._tokens(key)),
            "completion_tokens": len(result.token_ids),
            "tokens": result.tokens,
            "score": result.score,
            "scorer_tokens": result.scorer_tokens,
            "expansions": result.expansions,
            "stopped_by": result.stopped_by,
            "seconds": round(result.seconds, 4),
        }
        if result.thought is not None:
            row["thought"] = result.thought.text
        if self.options.candidates:
            row["candidates"] = [
                {
                    "text": candidate.text,
                    "score": candidate.score,
                    "finish_reason": candidate.finish_reason,
                    "tokens": len(candidate.token_ids),
                }
                for candidate in result.candidates
            ]
        return row


def _parts(keys: Sequence[Key], prompts: int) -> Iterator[list[Key]]:
    """Splits keys into parts of at most so many prompts; a prompt's samples stay together."""
    part: list[Key] = []
    seen: set[int] = set()
    for key in keys:
        if key[0] not in seen and len(seen) == prompts:
            yield part
            part, seen = [], set()
        part.append(key)
        seen.add(key[0])
    if part:
        yield part
