"""Trees of groups: what is split, what is dropped, and what is attached to which token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_lightning.inference import Completion
from rlhf_lightning.rl.rollouts import (
    Rollouts,
    attach_token_fields,
    build_trees,
    flat_indices,
    num_tokens,
    token_arrays,
    token_field,
    tree_extremes,
    tree_sums,
)
from rlhf_lightning.sequences import Example, Segment, example_cost, pack

PROMPTS = [Example("rows:0", Segment([9, 9, 9])), Example("rows:1", Segment([8]))]
LENGTHS = [[2, 1, 4], [3, 3, 1]]


def rollouts() -> Rollouts:
    """Completion n of prompt e has tokens 10 (3 e + n + 1), as many as LENGTHS says; one was cut off."""
    groups = [
        [
            Completion([10 * (3 * e + n + 1)] * length, "", [0.0] * length, "length" if (e, n) == (1, 1) else "stop")
            for n, length in enumerate(row)
        ]
        for e, row in enumerate(LENGTHS)
    ]
    return Rollouts(list(PROMPTS), groups, torch.zeros(6, 1, dtype=torch.float64), {"r": 1}, {"r": "first"})


def completions(trees: list[Example]) -> list[list[list[int]]]:
    return [[child.tokens.tolist() for child in tree.root.children] for tree in trees]


def test_a_group_is_one_tree() -> None:
    trees = build_trees(rollouts(), torch.ones(6, dtype=torch.bool), budget=100)
    assert completions(trees) == [[[10, 10], [20], [30] * 4], [[40] * 3, [50] * 3, [60]]]
    assert [tree.root.tokens.tolist() for tree in trees] == [[9, 9, 9], [8]]
    assert [tree.fields for tree in trees] == [
        {"prompt_id": "rows:0", "places": [0, 1, 2], "num_completions": 3},
        {"prompt_id": "rows:1", "places": [3, 4, 5], "num_completions": 3},
    ]
    assert all(child.weights.tolist() == [1.0] * len(child.tokens) for tree in trees for child in tree.root.children)


@pytest.mark.parametrize(
    ("share_prefix", "expected"),
    [(True, [[2, 1], [4], [3, 3], [1]]), (False, [[2], [1], [4], [3], [3, 1]])],
)
def test_a_group_above_the_budget_is_split(share_prefix: bool, expected: list[list[int]]) -> None:
    """Each part repeats the prompt: 3 + 2 + 1 and 3 + 4 fit into 7, 3 + 2 + 1 + 4 does not."""
    trees = build_trees(rollouts(), torch.ones(6, dtype=torch.bool), budget=7, share_prefix=share_prefix)
    assert [[len(tokens) for tokens in tree] for tree in completions(trees)] == expected
    assert all(example_cost(tree, share_prefix=share_prefix) <= 7 for tree in trees)
    assert [place for tree in trees for place in tree.fields["places"]] == list(range(6))
    assert len({tree.row_id for tree in trees}) == len(trees)
    assert sum(tree.fields["num_completions"] for tree in trees) == 6


def test_one_completion_above_the_budget_stays_whole() -> None:
    trees = build_trees(rollouts(), torch.ones(6, dtype=torch.bool), budget=1)
    assert [len(tree.root.children) for tree in trees] == [1] * 6


def test_what_is_dropped_still_counts() -> None:
    kept = torch.tensor([True, False, True, False, False, False])
    trees = build_trees(rollouts(), kept, budget=7)
    assert completions(trees) == [[[10, 10]], [[30] * 4], []]
    assert [tree.fields["num_completions"] for tree in trees] == [2, 1, 3]
    assert [num_tokens(tree) for tree in trees] == [2, 4, 0]
    completion_index_S, index_N = flat_indices(trees)
    assert completion_index_S.tolist() == [0, 2]
    assert index_N.tolist() == [0, 0, 1, 1, 1, 1]


def test_values_reach_their_tokens() -> None:
    """In any order of packing: what is attached is read with the token that it was attached for."""
    trees = build_trees(rollouts(), torch.ones(6, dtype=torch.bool), budget=7)
    tokens_N = torch.tensor([t for tree in completions(trees) for row in tree for t in row], dtype=torch.float64)
    attached = attach_token_fields(trees, {"twice": 2 * tokens_N})
    assert isinstance(attached[0].fields["twice"], np.ndarray)
    order = [attached[n] for n in (2, 0, 3, 1)]
    batch = pack(order, extra=token_arrays(order))
    found = token_field(batch.extra, "twice", torch.zeros(1, dtype=torch.float32))
    assert found is not None
    assert found.dtype == torch.float32
    assert found.tolist() == (2 * batch.target_ids).tolist()
    assert token_field(batch.extra, "absent", torch.zeros(1)) is None
    assert token_arrays([*attached, trees[0]]) == {}
    assert "twice" not in trees[0].fields


def test_values_of_trees() -> None:
    trees = build_trees(rollouts(), torch.ones(6, dtype=torch.bool), budget=100)
    batch = pack(trees)
    values_S = torch.tensor([1.0, -2.0, 4.0, 8.0, 16.0, 32.0])
    assert tree_sums(batch, values_S).tolist() == [3.0, 56.0]
    assert tree_extremes(batch, values_S, "amin").tolist() == [-2.0, 8.0]
    assert tree_extremes(batch, values_S, "amax").tolist() == [4.0, 32.0]


def test_lengths_and_ends() -> None:
    assert rollouts().lengths_S().tolist() == [2, 1, 4, 3, 3, 1]
    assert rollouts().ended_S().tolist() == [1, 1, 1, 1, 0, 1]


def test_replacing_a_group() -> None:
    both, other = rollouts(), rollouts()
    other.prompts, other.completions = [Example("rows:7", Segment([7]))], other.completions[1:]
    other.rewards_SK = torch.full((3, 1), 5.0, dtype=torch.float64)
    both.replace([0], other)
    assert [prompt.row_id for prompt in both.prompts] == ["rows:7", "rows:1"]
    assert both.rewards_SK[:, 0].tolist() == [5.0] * 3 + [0.0] * 3
    assert both.lengths_S().tolist() == LENGTHS[1] * 2
    assert (both.failures, both.errors) == ({"r": 2}, {"r": "first"})
