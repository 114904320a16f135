"""Rollouts of one iteration, and the trees that they are trained as: a prompt once, its completions as branches.

Per-token quantities of a rollout that stay as they are during its updates (advantages, log-probs of the policy that
sampled, of the reference) travel in ``Example.fields``: one flat array per tree, aligned with its scored tokens, which
are the tokens of its completions one after the other.

Legend: E prompts, G completions of each, K reward functions, S completions that are trained on, N their tokens.
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
    """What the policy wrote in answer to prompts, and what it was given for it; of one rank.

    Args:
        prompts: E prompts, with the rows' other columns.
        completions: E lists of G completions.
        rewards_EGK: what each reward function gave, in fp64; NaN where it could not score.
        failures: by reward function, on how many samples it raised, ran out of time or returned what is no reward.
        errors: by function that failed, its first message.
        steps: of every completion, the tokens at which its steps end, with their rewards; empty where there is no
            process reward.
    """

    prompts: list[Example]
    completions: list[list[Completion]]
    rewards_EGK: Tensor
    failures: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    steps: list[list[StepsAtTokens]] = field(default_factory=list)

    def replace(self, places: Sequence[int], other: Rollouts) -> None:
        """Puts the groups of other rollouts in some places; the failures add up."""
        for place, prompt, completions in zip(places, other.prompts, other.completions, strict=True):
            self.prompts[place], self.completions[place] = prompt, completions
        for place, steps in zip(places, other.steps, strict=False):
            self.steps[place] = steps
        self.rewards_EGK[list(places)] = other.rewards_EGK
        self.failures = {name: count + other.failures.get(name, 0) for name, count in self.failures.items()}
        self.errors = {**other.errors, **self.errors}

    def lengths_EG(self) -> Tensor:
        """Tokens of each completion."""
        return self._per_completion([[len(c.token_ids) for c in group] for group in self.completions])

    def ended_EG(self) -> Tensor:
        """Whether each completion ended by itself, and not at the limit."""
        return self._per_completion([[c.finish_reason == "stop" for c in group] for group in self.completions])

    def _per_completion(self, values: list[list[int]] | list[list[bool]]) -> Tensor:
        shape = self.rewards_EGK.shape[:2]
        return torch.tensor(values, dtype=torch.float64, device=self.rewards_EGK.device).reshape(shape)


def plant(rollouts: Rollouts, kept_EG: Tensor, *, budget: int, share_prefix: bool = True) -> list[Example]:
    """Makes trees of the completions that are kept; a group above the budget becomes several, each with the prompt.

    A tree has the fields ``prompt_id``, the row that it comes from; ``places``, the numbers ``prompt * G + completion``
    of its completions; and ``num_completions``, how many it stands for: those that were not kept count with the first
    tree of their group.

    Args:
        rollouts: of this rank.
        kept_EG: which completions to train on.
        budget: tokens per micro-batch; no result depends on it.
        share_prefix: whether a prompt costs its tokens once or once per completion.
    """
    group_size = kept_EG.shape[1]
    trees = []
    kept = kept_EG.tolist()
    for number, (prompt, completions) in enumerate(zip(rollouts.prompts, rollouts.completions, strict=True)):
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
    """Tokens of a tree's completions."""
    return sum(len(child.tokens) for child in tree.root.children)


def flat_places(trees: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the completions of trees come from.

    Returns:
        ``(S,)`` the number of each completion in its rollouts, and ``(N,)`` which of the S each token belongs to.
    """
    places = [place for tree in trees for place in tree.fields["places"]]
    lengths = [len(child.tokens) for tree in trees for child in tree.root.children]
    lengths_S = torch.tensor(lengths, dtype=torch.long, device=device)
    places_S = torch.tensor(places, dtype=torch.long, device=device)
    return places_S, torch.arange(len(lengths), device=device).repeat_interleave(lengths_S)


def attach(trees: Sequence[Example], values: Mapping[str, Tensor]) -> list[Example]:
    """Gives trees their share of ``(N,)`` tensors, as arrays in their fields."""
    sizes = [num_tokens(tree) for tree in trees]
    parts = {name: value.detach().cpu().split(sizes) for name, value in values.items()}
    return [
        Example(tree.row_id, tree.root, {**tree.fields, **{name: part[n].numpy() for name, part in parts.items()}})
        for n, tree in enumerate(trees)
    ]


def token_field(batch: SequenceBatch, name: str, like_N: Tensor) -> Tensor | None:
    """``(N,)`` a quantity that ``attach`` gave to the trees of a batch; ``None`` where it did not."""
    arrays = [example.fields[name] for example in batch.examples if name in example.fields]
    if len(arrays) < batch.num_examples:
        return None
    return torch.from_numpy(np.concatenate(arrays)).to(device=like_N.device, dtype=like_N.dtype)


def tree_sums(batch: SequenceBatch, values_S: Tensor) -> Tensor:
    """Adds values of sequences up per tree: ``(S,) -> (E,)``."""
    return values_S.new_zeros(batch.num_examples).index_add(0, batch.example_index, values_S)


def tree_extremes(batch: SequenceBatch, values_S: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
    """The smallest or largest value of each tree's sequences: ``(S,) -> (E,)``."""
    start_E = values_S.new_zeros(batch.num_examples)
    return start_E.scatter_reduce(0, batch.example_index, values_S, reduce, include_self=False)
