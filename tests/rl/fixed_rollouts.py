"""Modules that write what they are told to: completions that are a function of the row alone, and rewards of them.

With them every step after sampling can be compared with a naive computation, and between ranks, budgets and layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.sequences import Example, Segment

from ..helpers import nested

VOCAB = 60


def fixed_completions(row_id: str, count: int) -> list[Completion]:
    """Completions of 1 to 9 tokens; about one in four was cut off by a limit."""
    seed = int.from_bytes(blake2b(row_id.encode(), digest_size=4).digest(), "big")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = rng.integers(3, VOCAB, size=int(rng.integers(1, 10))).tolist()
        logprobs = (-3 * rng.random(len(tokens))).tolist()
        found.append(Completion(tokens, str(tokens), logprobs, "length" if rng.random() < 0.25 else "stop"))
    return found


class _Fixed:
    num_generations: int

    def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        return [fixed_completions(prompt.row_id, self.num_generations) for prompt in prompts]


class FixedGRPO(_Fixed, GRPOModule):
    """GRPO on given completions."""


class FixedPPO(_Fixed, PPOModule):
    """PPO on given completions."""


def remainder(completion_ids: Sequence[list[int]]) -> list[float]:
    """0, 1 or 2: the sum of the tokens modulo 3."""
    return [float(sum(tokens) % 3) for tokens in completion_ids]


def picky(completion_ids: Sequence[list[int]]) -> list[float | None]:
    """Half the first token modulo 5; nothing to say about completions of 4 tokens."""
    return [None if len(tokens) == 4 else tokens[0] % 5 / 2 for tokens in completion_ids]


def by_step(completions: Sequence[str]) -> list[list[float]]:
    """A tenth of the length of every step: the numbers that a completion's text shows."""
    return [[len(step) / 10 for step in completion.split(by_step.step_separator)] for completion in completions]


by_step.step_separator = ", "


def prompts(count: int) -> list[Example]:
    """Prompts of 1 to 8 tokens."""
    rng = np.random.default_rng(3)
    return [Example(f"rows:{n}", Segment(rng.integers(3, VOCAB, size=int(rng.integers(1, 9))))) for n in range(count)]


def options(**given: Any) -> dict[str, Any]:
    """The smallest set of options, with both rewards."""
    common = {"rewards": [remainder, picky], "reward_weights": [1.0, 0.5], "max_completion_length": 10}
    return nested(common | given)
