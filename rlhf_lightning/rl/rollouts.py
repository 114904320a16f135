"""Rollouts of one iteration, and their training examples: trees of a prompt with its completions as branches.

Per-token quantities that are constant during the updates (advantages, log-probs under the sampling policy and the
reference) are stored in ``Example.fields``: one flat array per tree, aligned with its scored tokens, which are the
tokens of its completions one after the other, those of a shared branch once for each completion.

Legend: E prompts, S completions of all prompts, K reward functions, N tokens of the trained completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.micro_batching import row_keys
from ..inference import Completion
from ..sequences import Example, Segment, SequenceBatch
from .branches import Branch, branch_line
from .step_rewards import StepsAtTokens


@dataclass
class Rollouts:
    """Completions of one rank's prompts, and their rewards.

    Args:
        prompts: E prompts, with the rows' other columns.
        completions: the completions of each prompt, any number of them.
        rewards_SK: rewards of all completions, prompt after prompt, by each function, in fp64 in host memory; NaN
            where it could not score.
        failures: number of samples on which each function raised, timed out or returned an invalid value.
        errors: first message of each function that failed.
        steps: for every completion, the tokens at which its steps end, with their rewards; empty without a process
            reward.
    """

    prompts: list[Example]
    completions: list[list[Completion]]
    rewards_SK: Tensor
    failures: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    steps: list[list[StepsAtTokens]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Number of completions of each prompt."""
        return [len(group) for group in self.completions]

    @property
    def samples(self) -> list[Completion]:
        """All completions, prompt after prompt."""
        return [completion for group in self.completions for completion in group]

    def replace(self, places: Sequence[int], other: Rollouts) -> None:
        """Replaces the groups at some places by those of other rollouts, and adds their failures."""
        # Rewards first: their split needs the sizes of the old groups.
        rewards = list(self.rewards_SK.split(self.sizes))
        for place, group in zip(places, other.rewards_SK.split(other.sizes), strict=True):
            rewards[place] = group
        self.rewards_SK = torch.cat([self.rewards_SK[:0], *rewards])  # the empty part: torch.cat refuses an empty list

        for place, prompt, completions in zip(places, other.prompts, other.completions, strict=True):
            self.prompts[place], self.completions[place] = prompt, completions
        for place, steps in zip(places, other.steps, strict=False):  # empty without a process reward
            self.steps[place] = steps

        self.failures = {name: count + other.failures.get(name, 0) for name, count in self.failures.items()}
        self.errors = {**other.errors, **self.errors}  # the first message of a function stays

    def keys_S(self) -> Tensor:
        """Returns the hash of its prompt's row for every completion: ``(S,)``.

        Sorted by it, completions of one prompt stay together and in their order.
        """
        return torch.from_numpy(np.repeat(row_keys(self.prompts), np.array(self.sizes, np.int64)))

    def first_S(self) -> Tensor:
        """Marks the first completion of each prompt: ``(S,)``."""
        return self._per_completion([n == 0 for group in self.completions for n, _ in enumerate(group)])

    def lengths_S(self) -> Tensor:
        """Counts the tokens of each completion: ``(S,)``."""
        return self._per_completion([len(completion.token_ids) for completion in self.samples])

    def ended_S(self) -> Tensor:
        """Returns 1 where a completion ended before the length limit, else 0: ``(S,)``."""
        return self._per_completion([completion.finish_reason == "stop" for completion in self.samples])

    def _per_completion(self, values: list[int] | list[bool]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)


def reward_columns(samples: Sequence[tuple[Example, Completion]]) -> dict[str, list[Any]]:
    """Returns the columns that reward functions get: those of the rows, and the tokens, one value per sample.

    Args:
        samples: completions with their prompts.
    """
    names = sorted({name for prompt, _ in samples for name in prompt.fields} - {"prompt"})
    columns: dict[str, list[Any]] = {name: [prompt.fields.get(name) for prompt, _ in samples] for name in names}
    columns["prompt_ids"] = [prompt.root.tokens.tolist() for prompt, _ in samples]
    columns["completion_ids"] = [sample.token_ids for _, sample in samples]
    return columns


def group_index(first_S: Tensor) -> Tensor:
    """Numbers the groups of completions whose first ones are marked: ``(S,)``.

    Example:
        >>> group_index(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])).tolist()
        [0, 0, 1, 1, 1]
    """
    return first_S.long().cumsum(0) - 1


def build_trees(rollouts: Rollouts, kept_S: Tensor, *, budget: int, share_prefix: bool = True) -> list[Example]:
    """Builds one tree per prompt from the kept completions, or several if they exceed the token budget.

    Completions of a search share their branches; a branch is in every tree that holds a completion through it.

    A tree has the fields ``prompt_id``, the id of its row; ``places``, the numbers of its completions among all; and
    ``num_completions``, which for the first tree of a prompt includes the completions not kept.

    Args:
        rollouts: this rank's rollouts.
        kept_S: which completions to train on.
        budget: tokens per micro-batch; affects memory, not results.
        share_prefix: whether prompts and branches cost their tokens once or once per completion.
    """
    trees = []
    kept, place = kept_S.tolist(), 0  # place: number of the prompt's first completion among all
    for prompt, completions in zip(rollouts.prompts, rollouts.completions, strict=True):
        lines = {place + n: branch_line(c) for n, c in enumerate(completions) if kept[place + n]}
        dropped = len(completions) - len(lines)
        place += len(completions)

        # Only the first tree counts the dropped completions, so that sums over trees count each once.
        for number, part in enumerate(_within_budget(prompt.root.num_own, lines, budget, share_prefix)):
            children, places = _grow(part)
            fields = {
                "prompt_id": prompt.row_id,
                "places": places,
                "num_completions": len(places) + (dropped if number == 0 else 0),
            }
            root = Segment(prompt.root.tokens, children=children, after=prompt.root.after)
            trees.append(Example(f"{prompt.row_id}/{number}", root, fields))
    return trees


_Lines = dict[int, list[Branch]]  # place of a completion -> its branches


def _within_budget(prompt_cost: int, lines: _Lines, budget: int, share_prefix: bool) -> list[_Lines]:
    """Fills trees in order, each with its own copies of the prompt and of shared branches."""
    parts: list[_Lines] = [{}]
    held: set[Branch] = set()
    used = prompt_cost
    for place, line in lines.items():
        # Branches that the tree holds already cost nothing, unless every completion is laid out alone.
        new = [branch for branch in line if not (share_prefix and branch in held)]
        cost = sum(len(branch.token_ids) for branch in new)
        if parts[-1] and not share_prefix:
            cost += prompt_cost

        # A new tree begins with a prompt of its own, and shares no branches with the one before.
        if parts[-1] and used + cost > budget:
            parts.append({})
            held, used = set(), prompt_cost
            cost = sum(len(branch.token_ids) for branch in line)

        parts[-1][place] = line
        held.update(line)
        used += cost
    return parts


def _grow(lines: _Lines) -> tuple[list[Segment], list[int]]:
    """Makes the segments below a prompt, and lists the places of completions in the order of their paths."""
    # The children of every branch, in order of their first completion; those of None are below the prompt.
    below: dict[Branch | None, list[Branch]] = {None: []}
    ends: dict[Branch, int] = {}
    for place, line in lines.items():
        for above, branch in zip((None, *line), line, strict=False):
            if branch not in below:
                below[branch] = []
                below[above].append(branch)
        ends[line[-1]] = place

    # Depth first, as Segment.paths walks: the n-th path of the tree is the completion at places[n].
    places: list[int] = []

    def segment(branch: Branch) -> Segment:
        children = [segment(child) for child in below[branch]]
        if not children:
            places.append(ends[branch])
        return Segment(branch.token_ids, np.ones(len(branch.token_ids), np.float32), children)

    return [segment(branch) for branch in below[None]], places


def path_lengths(tree: Example) -> list[int]:
    """Counts the tokens of each completion of a tree."""
    if not tree.root.children:
        return []
    return [sum(len(segment.tokens) for segment in path[1:]) for path in tree.root.paths()]


def num_tokens(tree: Example) -> int:
    """Counts the tokens of a tree's completions, those of a shared branch once for each."""
    return sum(path_lengths(tree))


def flat_indices(trees: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Maps the completions and tokens of trees back to their rollouts.

    Returns:
        ``(S,)`` place of each completion in its rollouts, and ``(N,)`` index into S of each token.
    """
    places = [place for tree in trees for place in tree.fields["places"]]
    return torch.tensor(places, dtype=torch.long), sequence_index(trees)[1]


def drawn_logprobs(rollouts: Rollouts, completion_index_S: Tensor) -> Tensor:
    """Returns the log-prob of each token under the distribution that it was drawn from: ``(N,)``.

    Args:
        rollouts: this rank's rollouts.
        completion_index_S: numbers of the trained completions, as in ``flat_indices``.
    """
    samples = rollouts.samples
    drawn = [logprob for place in completion_index_S.tolist() for logprob in samples[place].logprobs]
    return torch.tensor(drawn, dtype=torch.float64)


def sequence_index(trees: Sequence[Example]) -> tuple[int, Tensor]:
    """Returns the number of completions of trees, and the completion of each token: ``(N,)``."""
    lengths_S = torch.tensor([n for tree in trees for n in path_lengths(tree)], dtype=torch.long)
    return len(lengths_S), torch.arange(len(lengths_S)).repeat_interleave(lengths_S)


def attach_token_fields(trees: Sequence[Example], values: Mapping[str, Tensor]) -> list[Example]:
    """Splits ``(N,)`` tensors of host memory by tree and stores the parts as arrays in the trees' fields."""
    sizes = [num_tokens(tree) for tree in trees]
    parts = {name: value.detach().split(sizes) for name, value in values.items()}
    return [
        Example(tree.row_id, tree.root, {**tree.fields, **{name: part[n].numpy() for name, part in parts.items()}})
        for n, tree in enumerate(trees)
    ]


def stored_field(trees: Sequence[Example], name: str) -> Tensor:
    """Reads a field of ``attach_token_fields`` back from all trees, in fp64: ``(N,)``."""
    arrays = [np.asarray(tree.fields[name], dtype=np.float64) for tree in trees]
    return torch.from_numpy(np.concatenate([np.empty(0), *arrays]))


def token_arrays(trees: Sequence[Example]) -> dict[str, np.ndarray]:
    """Joins the fields of ``attach_token_fields`` that all trees have: ``{name: (N,)}``."""
    first = trees[0].fields if trees else {}
    names = [name for name, value in first.items() if isinstance(value, np.ndarray)]
    return {
        name: np.concatenate([tree.fields[name] for tree in trees])
        for name in names
        if all(name in tree.fields for tree in trees)
    }


def token_field(fields: Mapping[str, Tensor], name: str, like_N: Tensor) -> Tensor | None:
    """Returns one of ``token_arrays`` in the dtype of other tokens, or ``None`` if it is missing."""
    return fields[name].to(like_N.dtype) if name in fields else None


def tree_sums(batch: SequenceBatch, values_S: Tensor) -> Tensor:
    """Sums values of sequences per tree: ``(S,) -> (E,)``."""
    return values_S.new_zeros(batch.num_examples).index_add(0, batch.example_index, values_S)


def tree_extremes(batch: SequenceBatch, values_S: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
    """Returns the smallest or largest value of each tree's sequences: ``(S,) -> (E,)``."""
    start_E = values_S.new_zeros(batch.num_examples)
    return start_E.scatter_reduce(0, batch.example_index, values_S, reduce, include_self=False)
