"""GRPO on search trees against flattened paths, computed one at a time; on trees of depth one it is GRPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.rl.branches import Branch, TreeCompletion
from rlhf_lightning.sequences import Example, pack

from ..helpers import save_tiny_model
from ..rl.fixed_rollouts import FixedGRPO, options, picky, prompts, remainder
from ..rl.fixed_trees import FixedTreeGRPO, FlatTreeGRPO, fixed_tree
from .naive import assert_gradient, naive_model, step
from .test_grpo import look, mean_and_std

ROWS = 4
COMPARISONS = ("global", "subtree", "sibling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    return naive_model(folder, moved=0.05)


def returns(group: list[TreeCompletion]) -> list[float]:
    ids = [completion.token_ids for completion in group]
    return [first + 0.5 * (second or 0.0) for first, second in zip(remainder(ids), picky(ids), strict=True)]


def naive_advantages(group: list[TreeCompletion], comparison: str) -> dict[Branch, float]:
    """Mean returns below, over those of the parent, of siblings, or of all; divided by the deviation."""
    own = returns(group)
    mean, std = mean_and_std(own)
    lines = [completion.branch.line for completion in group]
    branches = list(dict.fromkeys(branch for line in lines for branch in line))

    def value(wanted: list[Branch]) -> float:
        found = [score for score, line in zip(own, lines, strict=True) for branch in line if branch in wanted]
        return sum(found) / len(found)

    found = {}
    for branch in branches:
        siblings = [other for other in branches if other.parent is branch.parent]
        if comparison == "global":
            found[branch] = (value([branch]) - mean) / (std + 1e-4)
        elif comparison == "subtree":
            found[branch] = (value([branch]) - value(siblings)) / (std + 1e-4)
        else:
            centre, spread = mean_and_std([value([other]) for other in siblings for _ in range(other.draws)])
            found[branch] = (value([branch]) - centre) / (spread + 1e-4) if spread > 1e-12 else 0.0
    return found


def flattened(
    rows: list[Example], policy: Any, comparison: str, loss_type: str, reference: Any = None
) -> tuple[Tensor, float]:
    """The loss over all paths, each token with 1 / (paths through it) for each draw; and the sum of these weights."""
    per_path, weights = [], []
    for row in rows:
        group = fixed_tree(row.row_id)
        advantages = naive_advantages(group, comparison)
        lines = [completion.branch.line for completion in group]
        for completion, line in zip(group, lines, strict=True):
            logprobs, entropy = look(policy, row.root.tokens.tolist(), completion.token_ids)
            tokens = [branch for branch in line for _ in branch.token_ids]
            advantage = torch.tensor([advantages[branch] for branch in tokens], dtype=torch.float64)
            weight = [branch.draws / sum(branch in other for other in lines) for branch in tokens]
            if loss_type == "luspo":
                ratio = (logprobs - logprobs.detach()).mean().exp()
            else:
                ratio = (logprobs - logprobs.detach()).exp()
            loss = -advantage * ratio - 0.1 * entropy * (loss_type == "dapo")
            if reference is not None:
                with torch.no_grad():
                    gap = look(reference, row.root.tokens.tolist(), completion.token_ids)[0]
                gap = gap - logprobs
                loss = loss + 0.3 * (gap.exp() - 1 - gap) * ratio
            per_path.append(loss * torch.tensor(weight, dtype=torch.float64))
            weights.append(sum(weight))
    total = torch.stack([path.sum() for path in per_path])
    if loss_type == "dapo":
        return total.sum() / sum(weights), sum(weights)
    if loss_type == "grpo":
        return (total / torch.tensor(weights, dtype=torch.float64)).mean(), sum(weights)
    return total.mean() / (10 if loss_type == "dr_grpo" else 1), sum(weights)


def tree_grpo(folder: str, comparison: str, loss_type: str, **given: Any) -> FixedTreeGRPO:
    entropy = {"coef": 0.1} if loss_type == "dapo" else {}
    loss, tree = {"loss_type": loss_type}, {"comparison": comparison}
    return FixedTreeGRPO(folder, **options(num_generations=2, loss=loss, tree=tree, entropy=entropy, **given))


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_a_tree_is_its_paths(comparison: str, loss_type: str, folder: str, policy: Any) -> None:
    rows = prompts(ROWS)
    found = step(tree_grpo(folder, comparison, loss_type), rows, policy)
    policy.zero_grad()
    loss, _ = flattened(rows, policy, comparison, loss_type)
    loss.backward()
    assert_gradient(found.gradient, policy)
    assert found.metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    policy.zero_grad()


def test_the_divergence_counts_once(folder: str, policy: Any) -> None:
    rows = prompts(ROWS)
    found = step(tree_grpo(folder, "subtree", "dapo", beta=0.3), rows, policy)
    policy.zero_grad()
    loss, _ = flattened(rows, policy, "subtree", "dapo", naive_model(folder))
    loss.backward()
    assert_gradient(found.gradient, policy)
    policy.zero_grad()


@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
@pytest.mark.parametrize("budget", [1, 25])
def test_a_tree_above_the_budget_is_split(budget: int, folder: str, policy: Any) -> None:
    rows = prompts(ROWS)
    whole = step(tree_grpo(folder, "sibling", "grpo"), rows, policy)
    split = step(tree_grpo(folder, "sibling", "grpo", micro_batch_tokens=budget), rows, policy)
    for name, expected in whole.gradient.items():
        assert float((split.gradient[name] - expected).norm()) <= 1e-12 + 1e-10 * float(expected.norm())


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_depth_one_is_grpo(comparison: str, folder: str, policy: Any) -> None:
    given = options(num_generations=5, loss={"loss_type": "grpo"})
    expected = step(FixedGRPO(folder, **given), prompts(ROWS), policy)
    tree = {"comparison": comparison, "depth_discount": 0.8, "visit_weights": "log"}
    found = step(FlatTreeGRPO(folder, **given, tree=tree), prompts(ROWS), policy)
    for name, gradient in expected.gradient.items():
        assert float((found.gradient[name] - gradient).norm()) <= 1e-10 * float(gradient.norm())
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)


def test_each_token_is_computed_once(folder: str) -> None:
    module = tree_grpo(folder, "global", "dapo")
    module.configure_model()
    module.double()
    rows = prompts(2)
    trees, _ = module.prepare(module.rollout(rows))
    batch = pack(trees)
    groups = [fixed_tree(row.row_id) for row in rows]
    branches = [list(dict.fromkeys(b for c in group for b in c.branch.line)) for group in groups]
    # Twins have the same tokens after the same prefix: laid out once, trained twice.
    distinct = [
        {
            (tuple(token for part in b.parent.line for token in part.token_ids) if b.parent else (), b.token_ids)
            for b in all_
        }
        for all_ in branches
    ]
    unique = sum(len(tokens) for group in distinct for _, tokens in group)
    assert batch.num_tokens == sum(len(row.root.tokens) for row in rows) + unique
    counted = sum(len(b.token_ids) * b.draws for group in branches for b in group)
    assert module.normalizers(trees)["tokens"] == pytest.approx(counted, rel=1e-14)
    assert math.isclose(module.normalizers(trees)["completions"], sum(map(len, groups)))
