"""GRPO and PPO on given trees, functions of the row alone, on searches of what a seed decides, and on old ones."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import count
from typing import Any

import numpy as np

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.inference import Completion, SamplingParams
from rlhf_lightning.rl.branches import Branch, TreeCompletion
from rlhf_lightning.rl.replay_buffer import Record
from rlhf_lightning.sequences import Example

from ..helpers import EOS_ID
from ..inference.toy import Characters
from .fixed_rollouts import VOCAB, FixedGRPO, FixedPPO, fixed_completions


def tree_completion(branch: Branch, finish_reason: str = "stop") -> TreeCompletion:
    """The completion that ends with a branch."""
    tokens = [token for part in branch.line for token in part.token_ids]
    logprobs = [logprob for part in branch.line for logprob in part.logprobs]
    return TreeCompletion(tokens, str(tokens), logprobs, finish_reason, branch=branch)


def fixed_tree(row_id: str) -> list[TreeCompletion]:
    """A tree of one to three levels with 2 to 3 branches below each; some branches repeat a sibling's tokens."""
    seed = int.from_bytes(blake2b(b"tree" + row_id.encode(), digest_size=4).digest(), "big")
    rng = np.random.default_rng(seed)
    numbers = count()

    def below(parent: Branch | None, depth: int) -> list[TreeCompletion]:
        found = []
        for _ in range(int(rng.integers(2, 4))):
            tokens = rng.integers(3, VOCAB, size=int(rng.integers(1, 5))).tolist()
            logprobs = (-3 * rng.random(len(tokens))).tolist()
            leaf = depth == 2 or rng.random() < 0.4
            branch = Branch(
                tuple(tokens),
                tuple(logprobs),
                parent,
                draws=1 if leaf else int(rng.integers(1, 3)),
                visits=int(rng.integers(1, 6)),
                score=None if next(numbers) % 5 == 4 else float(rng.normal()),
            )
            if not leaf:
                found += below(branch, depth + 1)
                continue
            found.append(tree_completion(branch, "length" if rng.random() < 0.25 else "stop"))
            if rng.random() < 0.2:  # the same tokens again
                twin = Branch(branch.token_ids, branch.logprobs, parent, visits=2, score=branch.score)
                found.append(tree_completion(twin))
        return found

    return below(None, 0)


class FixedTreeGRPO(FixedGRPO):
    """GRPO on the trees of ``fixed_tree``."""

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[TreeCompletion]]:
        return [fixed_tree(prompt.row_id) for prompt in prompts]


class FlatTreeGRPO(FixedGRPO):
    """GRPO on fixed completions, given as trees of depth one."""

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[TreeCompletion]]:
        return [
            [tree_completion(Branch(tuple(c.token_ids), tuple(c.logprobs)), c.finish_reason) for c in group]
            for group in self.generate(prompts, seeds)
        ]


class FixedTreePPO(FixedPPO):
    """PPO on the trees of ``fixed_tree``."""

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[TreeCompletion]]:
        return [fixed_tree(prompt.row_id) for prompt in prompts]


class SeededEngine:
    """Samples whose tokens and log-probs are a function of their seed alone, as long as the settings allow."""

    tokenizer = Characters()
    end_token_ids = frozenset({EOS_ID})

    def encode(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return tuple(prompt)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        contexts: None = None,
    ) -> list[list[Completion]]:
        assert sampling is not None
        assert contexts is None
        most = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
        return [[self._one(seed, limit) for seed in row] for row, limit in zip(seeds or [], most, strict=True)]

    def _one(self, seed: int, limit: int) -> Completion:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, VOCAB, size=int(rng.integers(1, 10))).tolist()
        tokens = [*tokens, EOS_ID][:limit]
        logprobs = (-3 * rng.random(len(tokens))).tolist()
        return Completion(tokens, str(tokens), logprobs, "stop" if tokens[-1] == EOS_ID else "length")


class FixedSearchGRPO(GRPOModule):
    """GRPO that searches with a ``SeededEngine``."""

    @property
    def engine(self) -> Any:
        return SeededEngine()


class FixedSearchPPO(PPOModule):
    """PPO that searches with a ``SeededEngine``."""

    @property
    def engine(self) -> Any:
        return SeededEngine()


class FixedReplayGRPO(FixedTreeGRPO):
    """GRPO on the trees of ``fixed_tree``, and on completions of other rows that are in its buffer from the start."""

    def on_train_start(self) -> None:
        super().on_train_start()
        rng = np.random.default_rng(7)
        for number in range(9):
            (completion, *_) = fixed_completions(f"old:{number}", 1)
            values = (rng.normal(size=len(completion.token_ids)), 0.5 + rng.random(len(completion.token_ids)))
            prompt, tokens = rng.integers(3, VOCAB, size=1 + number), np.array(completion.token_ids)
            given = (prompt, tokens, np.array(completion.logprobs), *values)
            self.replay.add([Record(f"old:{number}", -1, 1.0 + number, *given)])
