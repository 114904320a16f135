"""Rollouts of one iteration, and their training examples: trees of a prompt with its completions as branches.

Per-token quantities that are constant during the updates (advantages, log-probs under the sampling policy and the
reference) are stored in ``Example.fields``: one flat array per tree, aligned with its scored tokens, which are the
tokens of its completions one after the other.

Legend: E prompts, G completions of each, K reward functions, S trained completions, N their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..inference import Completion
from ..sequences import Example, Segment, SequenceBatch
from .step_rewards import StepsAtTokens


@dataclass
class Rollouts:
    """Completions of one rank's prompts, and their rewards.

    Args:
        prompts: E prompts, with the rows' other columns.
        completions: E lists of G completions.
        rewards_EGK: rewards by each function, in fp64; NaN where it could not score.
        failures: number of samples on which each function raised, timed out or returned an invalid value.
        errors: first message of each function that failed.
        steps: for every completion, the tokens at which its steps end, with their rewards; empty without a process
            reward.
    """

    prompts: list[Example]
    completions: list[list[Completion]]
    rewards_EGK: Tensor
    failures: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    steps: list[list[StepsAtTokens]] = field(default_factory=list)

    def replace(self, places: Sequence[int], other: Rollouts) -> None:
        """Replaces the groups at some places by those of other rollouts, and adds their failures."""
        for place, prompt, completions in zip(places, other.prompts, other.completions, strict=True):
            self.prompts[place], self.completions[place] = prompt, completions
        for place, steps in zip(places, other.steps, strict=False):
            self.steps[place] = steps
        self.rewards_EGK[list(places)] = other.rewards_EGK
        self.failures = {name: count + other.failures.get(name, 0) for name, count in self.failures.items()}
        self.errors = {**other.errors, **self.errors}

    def lengths_EG(self) -> Tensor:
        """Counts the tokens of each completion."""
        return self._per_completion([[len(c.token_ids) for c in group] for group in self.completions])

    def ended_EG(self) -> Tensor:
        """Returns 1 where a completion ended before the length limit, else 0."""
        return self._per_completion([[c.finish_reason == "stop" for c in group] for group in self.completions])

    def _per_completion(self, values: list[list[int]] | list[list[bool]]) -> Tensor:
        shape = self.rewards_EGK.shape[:2]
        return torch.tensor(values, dtype=torch.float64, device=self.rewards_EGK.device).reshape(shape)


def build_trees(rollouts: Rollouts, kept_EG: Tensor, *, budget: int, share_prefix: bool = True) -> list[Example]:
    """Builds one tree per prompt from the kept completions, or several if they exceed the token budget.

    A tree has the fields ``prompt_id``, the id of its row; ``places``, the numbers ``prompt * G + completion`` of its
    completions; and ``num_completions``, which for the first tree of a group includes the completions not kept.

    Args:
        rollouts: this rank's rollouts.
        kept_EG: which completions to train on.
        budget: tokens per micro-batch; affects memory, not results.
        share_prefix: whether a prompt costs its tokens once or once per completion.
    """
    group_size = kept_EG.shape[1]
    trees = []
    kept = kept_EG.tolist()
    for number, (prompt, completions) in enumerate(zip(rollouts.prompts, rollouts.completions, strict=True)):
        # Fill trees in order, each with its own copy of the prompt.
        members = [n for n in range(group_size) if kept[number][n]]
        prompt_cost = len(prompt.root.tokens)
        first_cost, later_cost = prompt_cost, 0 if share_prefix else prompt_cost
        parts: list[list[int]] = [[]]
        used = 0
        for member in members:
            cost = len(completions[member].token_ids)
            if parts[-1] and used + later_cost + cost > budget:
                parts.append([])
            used = used + later_cost + cost if parts[-1] else first_cost + cost
            parts[-1].append(member)
        for part_number, part in enumerate(parts):
            children = tuple(
                Segment(completions[n].token_ids, np.ones(len(completions[n].token_ids), np.float32)) for n in part
            )
            fields = {
                "prompt_id": prompt.row_id,
                "places": [number * group_size + n for n in part],
                "num_completions": len(part) + (group_size - len(members) if part_number == 0 else 0),
            }
            root = Segment(prompt.root.tokens, children=children)
            trees.append(Example(f"{prompt.row_id}/{part_number}", root, fields))
    return trees


def num_tokens(tree: Example) -> int:
    """Counts the tokens of a tree's completions."""
    return sum(len(child.tokens) for child in tree.root.children)


def flat_indices(trees: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Maps the completions and tokens of trees back to their rollouts.

    Returns:
        ``(S,)`` place of each completion in its rollouts, and ``(N,)`` index into S of each token.
    """
    places = [place for tree in trees for place in tree.fields["places"]]
    lengths = [len(child.tokens) for tree in trees for child in tree.root.children]
    lengths_S = torch.tensor(lengths, dtype=torch.long, device=device)
    completion_index_S = torch.tensor(places, dtype=torch.long, device=device)
    return completion_index_S, torch.arange(len(lengths), device=device).repeat_interleave(lengths_S)


def attach_token_fields(trees: Sequence[Example], values: Mapping[str, Tensor]) -> list[Example]:
    """Splits ``(N,)`` tensors by tree and stores the parts as arrays in the trees' fields."""
    sizes = [num_tokens(tree) for tree in trees]
    parts = {name: value.detach().cpu().split(sizes) for name, value in values.items()}
    return [
        Example(tree.row_id, tree.root, {**tree.fields, **{name: part[n].numpy() for name, part in parts.items()}})
        for n, tree in enumerate(trees)
    ]


def token_field(batch: SequenceBatch, name: str, like_N: Tensor) -> Tensor | None:
    """Reads a field of ``attach_token_fields`` from a batch of trees: ``(N,)``, or ``None`` if it is missing."""
    arrays = [example.fields[name] for example in batch.examples if name in example.fields]
    if len(arrays) < batch.num_examples:
        return None
    return torch.from_numpy(np.concatenate(arrays)).to(device=like_N.device, dtype=like_N.dtype)


def tree_sums(batch: SequenceBatch, values_S: Tensor) -> Tensor:
    """Sums values of sequences per tree: ``(S,) -> (E,)``."""
    return values_S.new_zeros(batch.num_examples).index_add(0, batch.example_index, values_S)


def tree_extremes(batch: SequenceBatch, values_S: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
    """Returns the smallest or largest value of each tree's sequences: ``(S,) -> (E,)``."""
    start_E = values_S.new_zeros(batch.num_examples)
    return start_E.scatter_reduce(0, batch.example_index, values_S, reduce, include_self=False)
