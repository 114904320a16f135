"""Advantages of branches: numbers derived by hand, loops over paths, and GRPO's own on trees of depth one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from rlhf_lightning.rl import RelativeAdvantage
from rlhf_lightning.rl.advantages import group_advantages
from rlhf_lightning.rl.branches import Branch, Branches, TreeCompletion, branch_lengths, copies, shared_mean
from rlhf_lightning.rl.tree_advantages import TreeAdvantage, branch_advantages, branch_preferences, visit_weights

from .fixed_trees import fixed_tree, tree_completion

NAN = math.nan


def by_hand() -> tuple[list[TreeCompletion], list[Branch]]:
    """Prompt -> a, b; a -> c, d; b -> e, f, g: five completions."""
    a, b = Branch((5, 6), (-1.0, -2.0)), Branch((7,), (-0.5,), draws=2)
    ends = [Branch((8,), (-1.5,), a), Branch((9, 9), (-1.0, -1.0), a, visits=3)]
    ends += [Branch((10 + n,), (-0.1,), b) for n in range(3)]
    return [tree_completion(end) for end in ends], [a, ends[0], ends[1], b, *ends[2:]]


RETURNS = torch.tensor([1.0, 0.0, 1.0, 1.0, NAN], dtype=torch.float64)


def advantages(comparison: str, scores: torch.Tensor = RETURNS, **given: object) -> list[float]:
    group, order = by_hand()
    branches = Branches([group])
    relative = RelativeAdvantage(**{"scale_rewards": "none", **given.pop("relative", {})})
    own = relative(scores[:, None], scores_S=scores, weights_K=torch.ones(1), group_index_S=branches.group_S)
    found = TreeAdvantage(comparison=comparison, **given)(
        branches, scores_S=scores, advantages_S=own.advantages_S, relative=relative
    )
    assert len(order) == len(found)
    return found.tolist()


class TestBranches:
    def test_numbers(self) -> None:
        group, _ = by_hand()
        branches = Branches([group, group[:0]])
        assert len(branches) == 7
        assert branches.parent_B.tolist() == [7, 0, 0, 7, 3, 3, 3]
        assert branches.depth_B.tolist() == [0, 1, 1, 0, 1, 1, 1]
        assert branches.draws_B.tolist() == [1, 1, 1, 2, 1, 1, 1]
        assert branches.visits_S.tolist() == [1, 3, 1, 1, 1]
        assert branches.depth_S.tolist() == [1] * 5
        assert branches.pair_B.tolist() == [0, 1, 0, 2, 3, 4, 3, 5, 3, 6]
        assert branch_lengths([group]) == [2, 1, 2, 1, 1, 1, 1]

    def test_tokens(self) -> None:
        group, _ = by_hand()
        tokens = Branches([group]).tokens([0, 1, 4])
        assert tokens.branch_N.tolist() == [0, 0, 1, 0, 0, 2, 2, 3, 6]
        assert tokens.token_N.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 8]
        first, which = copies(tokens.token_N)
        assert first.tolist() == [0, 1, 2, 5, 6, 7, 8]
        assert which.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]

    def test_shares_of_copies_add_up_to_draws(self) -> None:
        group, _ = by_hand()
        branches = Branches([group])
        kept = torch.tensor([True, True, True, False, True])
        assert branches.shares(kept)[[0, 1, 2, 3, 4, 6]].tolist() == [0.5, 1, 1, 1.0, 1, 1]

    def test_completions_of_samples_are_branches(self) -> None:
        plain = [TreeCompletion([3, 4], "", [-1.0, -1.0], "stop"), TreeCompletion([3, 4], "", [-1.0, -1.0], "stop")]
        branches = Branches([plain])
        assert branches.parent_B.tolist() == [2, 2]
        assert branches.tokens([0, 1]).token_N.tolist() == [0, 1, 2, 3]

    def test_means_of_copies(self) -> None:
        group, _ = by_hand()
        tokens = Branches([group]).tokens([0, 1])
        values = torch.tensor([1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
        weights = torch.tensor([1.0, 1, 1, 3, 3, 3, 3])
        assert shared_mean(values, tokens=tokens, weights_N=weights).tolist() == [4.0, 5.0, 3.0, 4.0, 5.0, 7.0, 8.0]


class TestByHand:
    """Returns 1, 0 below a (visited once and three times), 1, 1 and none below b."""

    def test_global(self) -> None:
        # Advantages of completions: 1 - 3/4, 0 - 3/4, 1/4, 1/4.
        assert advantages("global") == [-0.25, 0.25, -0.75, 0.25, 0.25, 0.25, 0.0]

    def test_global_with_visits_and_discount(self) -> None:
        found = advantages("global", visit_weights="linear", depth_discount=0.5)
        assert found == [0.5 * (0.25 - 3 * 0.75) / 4, 0.25, -0.75, 0.125, 0.25, 0.25, 0.0]

    def test_subtree(self) -> None:
        # a: 1/2 - 3/4; below it 1 - 1/2 and 0 - 1/2; b: 1 - 3/4; below it 1 - 1.
        assert advantages("subtree") == [-0.25, 0.5, -0.5, 0.25, 0.0, 0.0, 0.0]

    def test_subtree_leave_one_out(self) -> None:
        found = advantages("subtree", relative={"baseline": "leave_one_out"})
        assert found == [0.5 - 1.0, 1.0, -1.0, 1.0 - 0.5, 0.0, 0.0, 0.0]

    def test_subtree_of_discounted_returns(self) -> None:
        # a: 0.5 (1/2) - 0.5 (3/4): the baseline is discounted to the same depth.
        assert advantages("subtree", depth_discount=0.5) == [-0.125, 0.5, -0.5, 0.125, 0.0, 0.0, 0.0]

    def test_sibling(self) -> None:
        # a once (1/2) and b twice (1): the mean of three draws is 5/6.
        found = advantages("sibling")
        assert found == pytest.approx([1 / 2 - 5 / 6, 0.5, -0.5, 1 - 5 / 6, 0.0, 0.0, 0.0], abs=1e-15)

    def test_sibling_divided_by_the_deviation(self) -> None:
        found = advantages("sibling", relative={"scale_rewards": "group"})
        top, below = math.sqrt(((1 / 3) ** 2 + 2 * (1 / 6) ** 2) / 2) + 1e-4, math.sqrt(0.5) + 1e-4
        assert found[:4] == pytest.approx([-1 / 3 / top, 0.5 / below, -0.5 / below, 1 / 6 / top], abs=1e-14)

    def test_preference(self) -> None:
        scores = [0.0, math.log(3), None, math.log(3)]
        group = [tree_completion(Branch((3 + n,), score=score)) for n, score in enumerate(scores)]
        # Against 0 with 3/4, against its equal with 1/2.
        assert branch_preferences(Branches([group])).tolist() == pytest.approx([-0.25, 0.125, 0.0, 0.125])
        alone = [tree_completion(Branch((3,), score=1.0)), tree_completion(Branch((4,)))]
        assert branch_preferences(Branches([alone])).tolist() == [0.0, 0.0]

    def test_weights(self) -> None:
        visits = torch.tensor([1, 3])
        assert visit_weights(visits, "none").tolist() == [1, 1]
        assert visit_weights(visits, "linear").tolist() == [1, 3]
        assert visit_weights(visits, "log").tolist() == pytest.approx([math.log(2), math.log(4)])

    @pytest.mark.parametrize("comparison", ["global", "subtree", "sibling"])
    @pytest.mark.parametrize("scale", ["none", "group", "batch"])
    def test_equal_returns_teach_nothing(self, comparison: str, scale: str) -> None:
        third = torch.full((5,), 1 / 3, dtype=torch.float64) * torch.tensor([1, 1 + 2e-16, 1, 1, 1])
        assert advantages(comparison, third, relative={"scale_rewards": scale}) == [0.0] * 7


def test_along_a_completion_subtree_advantages_add_up_to_its_own() -> None:
    group = fixed_tree("rows:4")
    branches = Branches([group])
    scores = torch.randn(len(group), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = branch_advantages(
        branches,
        scores_S=scores,
        advantages_S=scores,
        relative=RelativeAdvantage(scale_rewards="none"),
        comparison="subtree",
        weights_S=torch.ones(len(group)),
    )
    sums = torch.zeros(len(group), dtype=torch.float64).index_add(0, branches.pair_S, found[branches.pair_B])
    torch.testing.assert_close(sums, scores - scores.mean(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("comparison", ["global", "subtree", "sibling"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_depth_one_is_grpo(comparison: str, scale: str, baseline: str) -> None:
    groups = [[TreeCompletion([3], "", [-1.0], "stop") for _ in range(size)] for size in (4, 1, 5)]
    branches = Branches(groups)
    scores = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[[2, 4]] = NAN
    relative = RelativeAdvantage(scale_rewards=scale, baseline=baseline)
    expected = group_advantages(
        scores, group_index_S=branches.group_S, num_groups=3, scale_rewards=scale, baseline=baseline
    ).advantages_S
    tree = TreeAdvantage(comparison=comparison, depth_discount=0.7, visit_weights="log")
    found = tree(branches, scores_S=scores, advantages_S=expected, relative=relative)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def below(branch: Branch, group: Sequence[TreeCompletion]) -> list[int]:
    return [n for n, completion in enumerate(group) if branch in completion.branch.line]


def naive(
    groups: list[list[TreeCompletion]], scores: list[list[float]], comparison: str, scale: str, discount: float
) -> dict[Branch, float]:
    """Loops over branches and completions; log visits as weights."""

    def deviation(values: Sequence[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        mean = sum(known) / len(known)
        return math.sqrt(sum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1))

    def mean(members: Sequence[int], depth: int) -> float:
        members = [n for n in members if not math.isnan(own[n])]
        if not members:
            return NAN
        weights = [math.log1p(group[n].branch.visits) for n in members]
        gaps = [len(group[n].branch.line) - 1 - depth for n in members]
        values = [w * discount**gap * own[n] for n, w, gap in zip(members, weights, gaps, strict=True)]
        return sum(values) / sum(weights)

    found: dict[Branch, float] = {}
    values: dict[Branch, float] = {}
    for group, own in zip(groups, scores, strict=True):
        branches = list(dict.fromkeys(b for c in group for b in c.branch.line))
        for branch in branches:
            values[branch] = mean(below(branch, group), len(branch.line) - 1)
        for branch in branches:
            siblings = [b for b in branches if b.parent is branch.parent]
            if comparison == "subtree":
                members = list(itertools.chain(*(below(b, group) for b in siblings)))
                size = {"none": 1.0, "group": deviation(own) + 1e-4}.get(scale, NAN)
                if scale == "batch":
                    size = deviation(list(itertools.chain(*scores))) + 1e-4
                found[branch] = (values[branch] - mean(members, len(branch.line) - 1)) / size
            else:
                drawn = [values[b] for b in siblings for _ in range(b.draws)]
                known = [value for value in drawn if not math.isnan(value)]
                size = 1.0 if scale == "none" else deviation(drawn) + 1e-4 if known else 1.0
                centre = sum(known) / len(known) if known else NAN
                found[branch] = (values[branch] - centre) / size
    if comparison == "sibling" and scale == "batch":
        raise AssertionError("not for this loop")
    return {branch: 0.0 if math.isnan(value) else value for branch, value in found.items()}


@pytest.mark.parametrize(
    ("comparison", "scale"),
    [("subtree", "none"), ("subtree", "group"), ("subtree", "batch"), ("sibling", "none"), ("sibling", "group")],
)
def test_against_loops(comparison: str, scale: str) -> None:
    groups = [fixed_tree(f"rows:{n}") for n in range(4)]
    rng = torch.Generator().manual_seed(1)
    scores = [torch.randn(len(group), generator=rng, dtype=torch.float64).tolist() for group in groups]
    scores[0][1] = scores[2][0] = NAN
    branches = Branches(groups)
    flat = torch.tensor(list(itertools.chain(*scores)), dtype=torch.float64)
    found = branch_advantages(
        branches,
        scores_S=flat,
        advantages_S=flat,
        relative=RelativeAdvantage(scale_rewards=scale),
        comparison=comparison,
        weights_S=visit_weights(branches.visits_S, "log"),
        discount=0.9,
    )
    expected = naive(groups, scores, comparison, scale, 0.9)
    order = list(dict.fromkeys(b for group in groups for c in group for b in c.branch.line))
    assert max(len(branch.line) for branch in order) == 3
    assert found.tolist() == pytest.approx([expected[branch] for branch in order], abs=1e-13)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"tree\.comparison is 'siblings'.*did you mean 'sibling'"):
        TreeAdvantage(comparison="siblings")
    with pytest.raises(ValueError, match=r"tree\.depth_discount is 0\.0; it must be in \(0, 1\]"):
        TreeAdvantage(depth_discount=0.0)
    with pytest.raises(ValueError, match=r"tree\.preference is -1\.0; it must be at least 0"):
        TreeAdvantage(preference=-1.0)
    with pytest.raises(ValueError, match="'subtree', which compares sums of rewards"):
        TreeAdvantage(comparison="subtree").check(RelativeAdvantage(multi_objective_aggregation="normalize_then_sum"))
