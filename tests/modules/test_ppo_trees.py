"""PPO on search trees against recursions over their branches; where nothing is shared it is PPO, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import PPOModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.rl.branches import Branch, TreeCompletion
from rlhf_lightning.sequences import Example, pack

from ..helpers import save_tiny_model
from ..rl.fixed_rollouts import FixedPPO, options, picky, prompts, remainder
from ..rl.fixed_trees import FixedTreePPO, fixed_tree, tree_completion
from .naive import naive_model, step
from .test_ppo import GAMMA, KL_COEF, LAMBDA, VF_COEF, Naive, compare, made

ROWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    return naive_model(folder, moved=0.05)


@pytest.fixture(scope="module")
def head() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 8


class Node:
    """A branch of a row with what was computed of its tokens, and the branches below it."""

    def __init__(self, branch: Branch) -> None:
        self.draws = branch.draws
        self.drawn = torch.tensor(branch.logprobs, dtype=torch.float64)
        self.below: list[Node] = []
        self.score: float | None = None
        self.logprobs = self.entropies = self.values = self.rewards = self.advantages = torch.empty(0)

    def estimate(self) -> None:
        """The recursion of GAE, from the ends of completions to the prompt."""
        for node in self.below:
            node.estimate()
        draws = sum(node.draws for node in self.below)
        last = sum(node.draws * float(node.advantages[0]) for node in self.below) / max(draws, 1)
        after = float(self.below[0].values[0]) if self.below else 0.0
        self.advantages = torch.zeros_like(self.rewards)
        for t in reversed(range(len(self.rewards))):
            value = float(self.values[t])
            last = float(self.rewards[t]) + GAMMA * after - value + GAMMA * LAMBDA * last
            self.advantages[t], after = last, value


def score_of(tokens: list[int], only_picky: bool) -> float | None:
    second = picky([tokens])[0]
    return second if only_picky else remainder([tokens])[0] + 0.5 * (second or 0.0)


def naive_nodes(naive: Naive, reference: Any, only_picky: bool = False) -> list[Node]:
    """All branches with a completion that could be scored, each computed along one path through it."""
    ref, found = Naive(reference, naive.head.detach()), []
    for row in prompts(ROWS):
        nodes: dict[Branch, Node] = {}
        for completion in fixed_tree(row.row_id):
            score = score_of(completion.token_ids, only_picky)
            if score is None:
                continue
            prompt, start = row.root.tokens.tolist(), 0
            logprobs, entropies, values = naive.look(prompt, completion.token_ids)
            with torch.no_grad():
                gap = logprobs - ref.look(prompt, completion.token_ids)[0]
            line = completion.branch.line
            for above, branch in zip([None, *line], line, strict=False):
                part = slice(start, start + len(branch.token_ids))
                start = part.stop
                if branch in nodes:
                    continue
                node = nodes[branch] = Node(branch)
                node.logprobs, node.entropies, node.values = logprobs[part], entropies[part], values[part]
                node.rewards = -KL_COEF * gap[part].detach()
                if above is not None:
                    nodes[above].below.append(node)
            nodes[line[-1]].rewards[-1] += score
        for branch, node in nodes.items():
            if branch.parent is None:
                node.estimate()
        found += nodes.values()
    return found


def naive_loss(nodes: Sequence[Node], bound: float | None = None) -> Tensor:
    """The first update, in which ratios are 1 and values are old ones; a token counts once for each draw."""
    every = torch.cat([node.advantages for node in nodes for _ in range(node.draws)])
    policy, value = [], []
    for node in nodes:
        advantages = (node.advantages - every.mean()) / torch.sqrt(every.var() + 1e-8)
        returns = node.advantages + node.values.detach()
        weight = 1.0 if bound is None else (node.logprobs.detach() - node.drawn).exp().clamp(max=bound)
        policy.append(-node.draws * ((node.logprobs - node.logprobs.detach()).exp() * advantages * weight).sum())
        value.append(node.draws * ((node.values - returns).square() / 2).sum())
    return (torch.stack(policy).sum() + VF_COEF * torch.stack(value).sum()) / len(every)


def tree_ppo(folder: str, head: Tensor, **given: Any) -> PPOModule:
    """The module of ``made``, on the trees of ``fixed_tree``."""
    module = made(folder, head, **given)
    module.explore = FixedTreePPO.explore.__get__(module)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("only_picky", [False, True])
def test_a_tree_is_the_recursion_over_its_branches(only_picky: bool, folder: str, policy: Any, head: Tensor) -> None:
    given: dict[str, Any] = {"rewards": [picky], "reward_weights": None} if only_picky else {}
    found = step(tree_ppo(folder, head, **given), prompts(ROWS), policy)
    naive = Naive(copy.deepcopy(policy), head)
    nodes = naive_nodes(naive, naive_model(folder), only_picky)
    assert any(len(node.below) > 1 for node in nodes)
    assert any(node.draws > 1 for node in nodes)
    compare(found, naive, naive_loss(nodes))


def test_importance_weights_of_the_draws(folder: str, policy: Any, head: Tensor) -> None:
    found = step(tree_ppo(folder, head, off_policy={"correction": "token_truncate"}), prompts(ROWS), policy)
    naive = Naive(copy.deepcopy(policy), head)
    nodes = naive_nodes(naive, naive_model(folder))
    compare(found, naive, naive_loss(nodes, bound=3.0))
    weights = torch.cat([(node.logprobs.detach() - node.drawn).exp().clamp(max=3.0) for node in nodes])
    assert found.metrics["train/sampling/importance_sampling_ratio/mean"] == pytest.approx(float(weights.mean()))


@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
@pytest.mark.parametrize("budget", [1, 25])
def test_a_tree_above_the_budget_is_split(budget: int, folder: str, policy: Any, head: Tensor) -> None:
    whole = step(tree_ppo(folder, head), prompts(ROWS), policy)
    split = step(tree_ppo(folder, head, micro_batch_tokens=budget), prompts(ROWS), policy)
    for name, expected in whole.gradient.items():
        assert float((split.gradient[name] - expected).norm()) <= 1e-12 + 1e-10 * float(expected.norm())
    assert split.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-6)


def test_each_token_counts_once_for_each_draw(folder: str, head: Tensor) -> None:
    module = tree_ppo(folder, head)
    module.configure_model()
    module.double()
    trees, _ = module.prepare(module.rollout(prompts(2)))
    branches = {b for row in prompts(2) for c in fixed_tree(row.row_id) for b in c.branch.line}
    assert module.normalizers(trees)["tokens"] == pytest.approx(sum(len(b.token_ids) * b.draws for b in branches))
    flattened = sum(len(c.token_ids) for row in prompts(2) for c in fixed_tree(row.row_id))
    assert pack(trees).num_tokens < flattened


def test_depth_one_is_ppo(folder: str, policy: Any, head: Tensor) -> None:
    """As trees of one branch for each completion, to the bit."""

    class Flat(FixedPPO):
        def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[TreeCompletion]]:
            return [
                [tree_completion(Branch(tuple(c.token_ids), tuple(c.logprobs)), c.finish_reason) for c in group]
                for group in self.generate(prompts, seeds)
            ]

    expected, module = made(folder, head, num_generations=3), made(folder, head, num_generations=3)
    module.explore = Flat.explore.__get__(module)  # type: ignore[method-assign]
    wanted, found = step(expected, prompts(ROWS), policy), step(module, prompts(ROWS), policy)
    assert all(torch.equal(found.gradient[name], gradient) for name, gradient in wanted.gradient.items())
    assert found.metrics == wanted.metrics


def test_a_strategy_of_plain_samples_is_ppo_on_them(folder: str) -> None:
    given = options(num_generations=3, kl_coef=0.1, num_updates=2, max_completion_length=6)
    drawn: list[list[list[Completion]]] = []

    class Voting(PPOModule):
        def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
            drawn.append(super().explore(prompts, seeds))
            return drawn[-1]

    class Told(PPOModule):
        def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
            return drawn[0]

    vote = {"class_path": "MajorityVote", "init_args": {"n": 3}}
    found = step(Voting(folder, **given, tree={"rollouts": vote}), prompts(ROWS))
    expected = step(Told(folder, **given), prompts(ROWS))
    assert [len(group) for group in drawn[0]] == [3] * ROWS
    assert any(float(gradient.norm()) > 0 for gradient in expected.gradient.values())
    assert all(torch.equal(found.gradient[name], gradient) for name, gradient in expected.gradient.items())
    own = {name: value for name, value in found.metrics.items() if not name.startswith("train/tree/")}
    assert own == expected.metrics
    assert found.metrics["train/tree/shared"] == 0


def test_searches_do_not_see_compressed_contexts(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^compressor is given with searches in tree\.rollouts, which keep prompts"):
        PPOModule(folder, **options(tree={"rollouts": "mcts"}, compressor="nowhere"))
