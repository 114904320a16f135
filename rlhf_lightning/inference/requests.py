"""From the arguments of one call of an engine to its samples, and back to completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .completion import Completion, Request
from .sample_numbers import new_token_limits, sample_seeds
from .sampling import SamplingParams


class Encoder(Protocol):
    """Parts of an engine that its samples are made with."""

    tokenizer: Any

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        ...

    def encode(self, prompt: str | Sequence[int], number: int = 0) -> tuple[int, ...]:
        """Encodes and checks a prompt."""
        ...

    def token_limit(self, prompt: tuple[int, ...], requested: int) -> int:
        """Returns the maximum number of new tokens."""
        ...


def make_requests(
    engine: Encoder,
    prompts: Sequence[Any],
    num_samples: int,
    params: SamplingParams,
    seeds: Sequence[Sequence[int]] | None,
    limits: Sequence[int] | None,
    watch: Callable[[Request], object] | None = None,
) -> tuple[list[Request], list[int]]:
    """Makes the samples of one call, and the tokens that end them.

    Greedy samples of a prompt are equal: one is made, which ``completions_by_prompt`` repeats.

    Args:
        engine: encodes prompts.
        prompts: strings, or token ids.
        num_samples: samples per prompt, at least 1.
        params: the sampling settings.
        seeds: one per prompt and sample, or ``None``.
        limits: maximum number of new tokens of each prompt, or ``None``.
        watch: called after each token with its sample.

    Raises:
        ValueError: an argument is not allowed.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is not allowed: it must be at least 1")
    if params.stop and engine.tokenizer is None:
        raise ValueError(f"stop={params.stop} needs text: give the engine a tokenizer, or use stop_token_ids")
    encoded = [engine.encode(prompt, number) for number, prompt in enumerate(prompts)]
    numbered = sample_seeds(seeds, len(encoded), num_samples, params)
    most = new_token_limits(limits, len(encoded), params)
    stop_ids = sorted(engine.end_token_ids | set(params.stop_token_ids))
    stops = frozenset(stop_ids)

    # Every sample has a seed of its own, so that neither batching nor order changes it.
    requests = [
        Request(
            prompt,
            (row, column),
            numbered[row][column],
            engine.token_limit(prompt, most[row]),
            params,
            stops,
            engine.tokenizer,
            watch,
        )
        for row, prompt in enumerate(encoded)
        for column in range(_distinct(num_samples, params))
    ]
    return requests, stop_ids


def completions_by_prompt(
    requests: Sequence[Request], num_samples: int, params: SamplingParams
) -> list[list[Completion]]:
    """Returns the completions of finished samples: one list per prompt, in order, with ``num_samples`` each."""
    distinct = _distinct(num_samples, params)
    completions = [request.completion() for request in requests]
    grouped = [completions[first : first + distinct] for first in range(0, len(completions), distinct)]
    return [group * (num_samples // distinct) for group in grouped]


def _distinct(num_samples: int, params: SamplingParams) -> int:
    return 1 if params.greedy else num_samples
