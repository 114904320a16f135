"""Seeds and limits of the samples of one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sampling import SamplingParams, derive_seed


def sample_seeds(
    seeds: Sequence[Sequence[int]] | None, num_prompts: int, num_samples: int, params: SamplingParams
) -> list[list[int]]:
    """Returns the seed of every sample: the given ones, or those derived from (seed, prompt number, sample number).

    Raises:
        ValueError: ``seeds`` does not hold one per sample.
    """
    if seeds is None:
        seed = int(torch.randint(2**62, ())) if params.seed is None and not params.greedy else params.seed or 0
        return [[derive_seed(seed, row, column) for column in range(num_samples)] for row in range(num_prompts)]
    shape = sorted({len(row) for row in seeds})
    if len(seeds) != num_prompts or any(length != num_samples for length in shape):
        raise ValueError(
            f"seeds has {len(seeds)} rows of lengths {shape}: it must have one row per prompt ({num_prompts}) and one"
            f" seed per sample ({num_samples})"
        )
    return [list(row) for row in seeds]


def new_token_limits(limits: Sequence[int] | None, num_prompts: int, params: SamplingParams) -> list[int]:
    """Returns the maximum number of new tokens of every prompt: the settings', or a lower one of its own.

    Raises:
        ValueError: ``limits`` does not hold one number of at least 1 for each prompt.
    """
    if limits is None:
        return [params.max_new_tokens] * num_prompts
    if len(limits) != num_prompts or any(limit < 1 for limit in limits):
        raise ValueError(
            f"limits is {list(limits)}: it must have one number of at least 1 for each prompt ({num_prompts})"
        )
    return [min(limit, params.max_new_tokens) for limit in limits]
