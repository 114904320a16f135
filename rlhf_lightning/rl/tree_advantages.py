r"""Advantages of branches from the returns of the completions below them.

With R_i the return of completion i (its score), n_i its weight, d_i its depth and gamma the depth discount, a branch v
of depth d has the value

.. math:: V(v) = \frac{\sum_{i \ni v} n_i\, \gamma^{d_i - d} R_i}{\sum_{i \ni v} n_i}

over the completions that pass through it and could be scored. On a tree of depth one, where each completion is a branch
of its own, all three comparisons give the advantages of GRPO.

Papers: TreeRL (Hou et al., 2025, arXiv:2506.11902) for ``global`` and ``subtree``, its global and local advantage;
TreeRPO (Yang et al., 2025, arXiv:2506.05183) for ``sibling``; Tree-GRPO (Ji et al., 2025, arXiv:2509.21240) compares
completions within and between trees of a prompt, which here are one tree. Departure: TreeRL adds both of its
advantages and divides by the root of the number of leaves; here one is chosen, and a token counts once anyway.

Legend: S completions, B branches, E prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, get_args

import torch
from torch import Tensor

from ..distributed.collectives import gather_rows
from ..utils.option_groups import OptionGroup
from ..utils.validation import check_choice, check_not_negative
from .advantages import RelativeAdvantage, group_advantages
from .branches import Branches

Comparison = Literal["global", "subtree", "sibling"]
VisitWeights = Literal["none", "log", "linear"]

COMPARISONS: Final[tuple[Comparison, ...]] = get_args(Comparison)
_EPS: Final = 1e-4  # as in group_advantages


def visit_weights(visits_S: Tensor, kind: VisitWeights) -> Tensor:
    """Computes the weight n of completions from their visits: 1, log(1 + visits), or visits.

    Args:
        visits_S: at least 1 each.
        kind: ``none``, ``log`` or ``linear``.

    Example:
        >>> visit_weights(torch.tensor([1, 3]), "linear")
        tensor([1., 3.], dtype=torch.float64)
    """
    if kind == "none":
        return torch.ones_like(visits_S, dtype=torch.float64)
    return visits_S.double().log1p() if kind == "log" else visits_S.double()


def branch_advantages(
    branches: Branches,
    *,
    scores_S: Tensor,
    advantages_S: Tensor,
    relative: RelativeAdvantage,
    comparison: Comparison = "global",
    weights_S: Tensor,
    discount: float = 1.0,
) -> Tensor:
    r"""Computes the advantage of each branch, which all of its tokens have; every rank calls it.

    - ``global``: the mean over the completions below, weighted by n and discounted like V, of their advantages over all
      completions of the prompt.
    - ``subtree``: V(v) - V(u), where u is the branch before and its V is discounted to the depth of v:
      :math:`\sum_{i \ni u} n_i \gamma^{d_i - d} R_i / \sum_{i \ni u} n_i`. Without discount the advantages along
      a completion add up to its return less that of the prompt. With ``baseline='leave_one_out'`` the sum over u leaves
      out what is below v. It is divided by the deviation of the returns of all completions of the prompt
      (``scale_rewards='group'``), of the global batch, or not at all.
    - ``sibling``: V(v) normalised over the branches that continue the same one, each as often as it was drawn, with the
      baseline and the scale of GRPO: the ``group`` are the siblings, and the ``batch`` all branches.

    A branch below which nothing could be scored, or nothing differs from what it is compared with, has advantage 0.

    Args:
        branches: this rank's.
        scores_S: returns, NaN where a completion could not be scored.
        advantages_S: those of completions over all of their prompt, for ``global``.
        relative: scale and baseline.
        comparison: ``global``, ``subtree`` or ``sibling``.
        weights_S: n, above 0.
        discount: gamma, in (0, 1].

    Returns:
        ``(B,)`` in fp64.
    """
    check_choice("comparison", comparison, COMPARISONS)
    if comparison == "global":
        known_S = advantages_S.double().masked_fill(scores_S.isnan(), torch.nan)
        return branches.mean_below(known_S, weights_S=weights_S, discount=discount).nan_to_num(nan=0.0)
    total_B, weight_B = branches.sums_below(scores_S, weights_S=weights_S, discount=discount)
    if comparison == "sibling":
        return _over_siblings(branches, total_B / weight_B.masked_fill(weight_B == 0, torch.nan), relative)
    return _over_parent(branches, scores_S.double(), total_B, weight_B, relative)


def _over_siblings(branches: Branches, values_B: Tensor, relative: RelativeAdvantage) -> Tensor:
    """Normalises values over siblings, each as often as it was drawn."""
    which = torch.arange(len(branches), device=values_B.device).repeat_interleave(branches.draws_B)
    drawn = values_B[which]
    found = group_advantages(
        drawn,
        group_index_S=branches.parent_B[which],
        num_groups=len(branches) + branches.num_groups,
        scale_rewards="group" if relative.scale_rewards == "group" else "none",
        baseline=relative.baseline,
        eps=_EPS,
    ).advantages_S
    if relative.scale_rewards == "batch":
        found = found / (_deviation(drawn) + _EPS)
    return torch.zeros_like(values_B).index_copy(0, which, found)  # equal draws have equal advantages


def _over_parent(
    branches: Branches, scores_S: Tensor, total_B: Tensor, weight_B: Tensor, relative: RelativeAdvantage
) -> Tensor:
    """Subtracts from each value that of the branch before, discounted to the same depth."""
    zeros = total_B.new_zeros(len(branches) + branches.num_groups)
    total_above = zeros.index_add(0, branches.parent_B, total_B)[branches.parent_B]
    weight_above = zeros.index_add(0, branches.parent_B, weight_B)[branches.parent_B]
    if relative.baseline == "leave_one_out":
        total_above, weight_above = total_above - total_B, weight_above - weight_B
    found_B = total_B / weight_B - total_above / weight_above

    # Where returns of a prompt agree up to rounding, there is nothing to learn.
    groups = group_advantages(scores_S, group_index_S=branches.group_S, num_groups=branches.num_groups)
    teaches_B = groups.has_signal_G[branches.group_B] & found_B.isfinite()
    if relative.scale_rewards == "group":
        found_B = found_B / (groups.std_G + _EPS)[branches.group_B]
    elif relative.scale_rewards == "batch":
        found_B = found_B / (_deviation(scores_S) + _EPS)
    return torch.where(teaches_B, found_B, torch.zeros_like(found_B))


def _deviation(values: Tensor) -> Tensor:
    """Returns the standard deviation of the values of all ranks, without NaN."""
    global_values = gather_rows({"values": values})["values"]
    known = global_values[~global_values.isnan()]
    return known.std() if len(known) > 1 else values.new_zeros(())


def branch_preferences(branches: Branches) -> Tensor:
    r"""Computes how much a scorer prefers each branch to its siblings.

    With s the scores of a process reward model, and the Bradley-Terry probability that one step is better than another,
    it is the mean over the other scored siblings of :math:`\sigma(s_v - s_u) - 1/2`: between -1/2 and 1/2, and 0
    without scores to compare.

    Args:
        branches: with their scores.

    Returns:
        ``(B,)``.

    Example:
        >>> from rlhf_lightning.rl.branches import Branch, TreeCompletion
        >>> steps = [Branch((5,), score=0.0), Branch((6,), score=float(torch.tensor(3.0).log()))]
        >>> group = [TreeCompletion(list(step.token_ids), "", [], "stop", branch=step) for step in steps]
        >>> [round(value, 6) for value in branch_preferences(Branches([group])).tolist()]
        [-0.25, 0.25]
    """
    found = torch.zeros_like(branches.scores_B)
    scored = branches.scores_B.isfinite()
    for parent in branches.parent_B[scored].unique():
        siblings = ((branches.parent_B == parent) & scored).nonzero().flatten()
        if len(siblings) > 1:
            scores = branches.scores_B[siblings]
            # The comparison with itself is 1/2 - 1/2.
            wins = (torch.sigmoid(scores[:, None] - scores[None, :]) - 0.5).sum(dim=1)
            found[siblings] = wins / (len(siblings) - 1)
    return found


@dataclass(frozen=True, kw_only=True)
class TreeAdvantage(OptionGroup):
    r"""The advantages of the branches of a search tree.

    ``branch_advantages`` has the formulas. They are GRPO's where completions share nothing, whatever the options, but
    for ``preference``.

    Args:
        comparison: a branch's completions with all of the prompt (``global``), its value with that of the branch before
            (``subtree``), or with its siblings (``sibling``).
        depth_discount: factor of a return for each step between it and a branch, in (0, 1].
        visit_weights: weight of a completion in the mean of a branch: 1 (``none``), log(1 + visits) (``log``), or the
            visits of its last step in the search (``linear``).
        preference: weight, at least 0, of how much the search's scorer prefers a branch to its siblings; added to the
            advantage (``branch_preferences``).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> TreeAdvantage(comparison="subtree", depth_discount=0.95).visit_weights
        'none'
    """

    group: ClassVar[str] = "tree"

    comparison: Comparison = "global"
    depth_discount: float = 1.0
    visit_weights: VisitWeights = "none"
    preference: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.depth_discount <= 1:
            raise ValueError(
                f"tree.depth_discount is {self.depth_discount!r}; it must be in (0, 1] (1.0 is off, 0.95 is usual)"
            )
        check_not_negative("tree.preference", self.preference, "0 is off")

    def check(self, relative: RelativeAdvantage) -> None:
        """Checks the options against those of the completions' advantages.

        Raises:
            ValueError: they exclude each other.
        """
        if relative.normalizes_each_reward and self.comparison != "global":
            raise ValueError(
                f"tree.comparison is {self.comparison!r}, which compares sums of rewards, but advantages."
                "multi_objective_aggregation 'normalize_then_sum' has none: leave one of them at its default"
            )

    def weights(self, branches: Branches) -> Tensor:
        """Computes the weight of each completion in the means of its branches: ``(S,)``."""
        return visit_weights(branches.visits_S, self.visit_weights)

    def __call__(
        self, branches: Branches, *, scores_S: Tensor, advantages_S: Tensor, relative: RelativeAdvantage
    ) -> Tensor:
        """Computes the advantages of branches, ``(B,)``; every rank calls it.

        Args:
            branches: this rank's.
            scores_S: returns of completions, NaN where one could not be scored.
            advantages_S: advantages of completions.
            relative: baseline and scale.
        """
        found_B = branch_advantages(
            branches,
            scores_S=scores_S,
            advantages_S=advantages_S,
            relative=relative,
            comparison=self.comparison,
            weights_S=self.weights(branches),
            discount=self.depth_discount,
        )
        return found_B + self.preference * branch_preferences(branches) if self.preference else found_B
