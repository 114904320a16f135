"""GRPO on given trees, which are a function of the row alone, and what is said of them by loops over their paths."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import count

import numpy as np

from rlhf_lightning.rl.branches import Branch, TreeCompletion
from rlhf_lightning.sequences import Example

from .fixed_rollouts import VOCAB, FixedGRPO


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
