"""Completions that share their beginnings: the branches of a prompt's tree, and sums over them.

A completion that was sampled in one piece is a branch of its own. The completions of a search are lines of branches,
its steps; a branch belongs to all completions that pass through it.

Legend: E prompts, S completions, B branches, P pairs of a completion and a branch on its line, N tokens of trained
completions one after the other, where a shared token occurs once for each completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..inference import Completion


@dataclass(frozen=True, eq=False)
class Branch:
    """A run of tokens that was sampled at once.

    Args:
        token_ids: its tokens, at least one.
        logprobs: of each token, under the distribution that it was sampled from.
        parent: the branch that it continues; ``None`` for the prompt.
        draws: number of samples that gave these same tokens here. Of the last branch of a completion it is 1: equal
            completions are branches of their own, as they are where nothing is searched.
        visits: how often a search came through, at least 1.
        score: a scorer's score of the solution up to here; ``None`` without.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    parent: Branch | None = None
    draws: int = 1
    visits: int = 1
    score: float | None = None

    @property
    def line(self) -> list[Branch]:
        """The branches from the prompt to this one."""
        found: list[Branch] = []
        branch: Branch | None = self
        while branch is not None:
            found.append(branch)
            branch = branch.parent
        return found[::-1]


@dataclass(frozen=True)
class TreeCompletion(Completion):
    """A completion of a search, which shares branches with others.

    Args:
        branch: the last one.
    """

    branch: Branch | None = None


def branch_line(completion: Completion) -> list[Branch]:
    """Returns the branches of a completion: those of the search, or one for all its tokens."""
    branch = getattr(completion, "branch", None)
    if branch is None:
        return [Branch(tuple(completion.token_ids), tuple(completion.logprobs))]
    line: list[Branch] = branch.line
    return line


def branch_lengths(groups: Sequence[Sequence[Completion]]) -> list[int]:
    """Counts the tokens of each branch of all completions, shared ones once."""
    found = dict.fromkeys(branch for group in groups for completion in group for branch in branch_line(completion))
    return [len(branch.token_ids) for branch in found]


@dataclass(frozen=True)
class BranchTokens:
    """The tokens of trained completions.

    Args:
        branch_N: branch of each token.
        token_N: number of each token among those of all branches: equal for the copies of a shared token.
    """

    branch_N: Tensor
    token_N: Tensor


class Branches:
    """Numbers the branches of all completions.

    Args:
        groups: the completions of each prompt, any number of them.

    Attributes:
        parent_B: number of the branch that each continues; for the first ones of prompt ``e``, ``B + e``.
        depth_B: branches before it on its line.
        group_B: prompt of each branch.
        draws_B: see :class:`Branch`.
        scores_B: see :class:`Branch`; NaN without.
        visits_S: visits of each completion's last branch.
        group_S: prompt of each completion.
        depth_S: depth of each completion's last branch.
        pair_S: completion of each pair.
        pair_B: branch of each pair.

    Example:
        >>> step = Branch((5, 6))
        >>> group = [TreeCompletion([5, 6, t], "", [], "stop", branch=Branch((t,), parent=step)) for t in (7, 8)]
        >>> branches = Branches([group])
        >>> branches.parent_B.tolist(), branches.pair_S.tolist(), branches.pair_B.tolist()
        ([3, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2])
    """

    def __init__(self, groups: Sequence[Sequence[Completion]]) -> None:
        numbers: dict[Branch, int] = {}
        found: list[tuple[Branch, int, int]] = []  # branch, its depth and its prompt
        self._lines: list[list[int]] = []  # of each completion
        owners: list[int] = []
        for group, completions in enumerate(groups):
            for completion in completions:
                line = branch_line(completion)
                for depth, branch in enumerate(line):
                    if branch not in numbers:
                        numbers[branch] = len(found)
                        found.append((branch, depth, group))
                self._lines.append([numbers[branch] for branch in line])
                owners.append(group)

        self.num_groups = len(groups)
        self._lengths = [len(branch.token_ids) for branch, _, _ in found]
        first = len(found)
        parents = [first + group if b.parent is None else numbers[b.parent] for b, _, group in found]
        self.parent_B = self._whole(parents)
        self.depth_B = self._whole([depth for _, depth, _ in found])
        self.group_B = self._whole([group for _, _, group in found])
        self.draws_B = self._whole([branch.draws for branch, _, _ in found])
        nan = float("nan")
        scores = [nan if branch.score is None else branch.score for branch, _, _ in found]
        self.scores_B = torch.tensor(scores, dtype=torch.float64)
        self.visits_S = self._whole([found[line[-1]][0].visits for line in self._lines])
        self.group_S = self._whole(owners)
        self.depth_S = self._whole([len(line) - 1 for line in self._lines])
        self.pair_S = self._whole([number for number, line in enumerate(self._lines) for _ in line])
        self.pair_B = self._whole([branch for line in self._lines for branch in line])

    def __len__(self) -> int:
        return len(self._lengths)

    def _whole(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long)

    def tokens(self, completion_index_S: Sequence[int]) -> BranchTokens:
        """Lists the tokens of completions, one after the other.

        Args:
            completion_index_S: numbers of the completions.
        """
        starts, total = [], 0
        for length in self._lengths:
            starts.append(total)
            total += length
        branches: list[int] = []
        tokens: list[int] = []
        for place in completion_index_S:
            for branch in self._lines[place]:
                branches += [branch] * self._lengths[branch]
                tokens += range(starts[branch], starts[branch] + self._lengths[branch])
        return BranchTokens(self._whole(branches), self._whole(tokens))

    def shares(self, kept_S: Tensor) -> Tensor:
        """Computes the weight of a branch's tokens in each completion through it: ``(B,)``.

        The weights of a token's copies add up to the number of draws that gave it, for any subset of the completions.

        Args:
            kept_S: which completions are trained.
        """
        count_B = self._sum(kept_S.double()[self.pair_S])
        return self.draws_B / count_B.clamp(min=1)

    def path_shares(self, tokens: BranchTokens, index_N: Tensor, completion_index_S: Sequence[int]) -> Tensor:
        """Computes the part that each copy of a token has in a mean over the completions through it: ``(N,)``.

        It is the probability of the copy's completion on a walk from the token's branch to the end which takes the
        branches that continue one in proportion to their draws, whatever the number of completions below them. The
        parts of a token's copies add up to 1.

        Args:
            tokens: of the trained completions, in ``completion_index_S``' order.
            index_N: place in ``completion_index_S`` of each token's completion.
            completion_index_S: numbers of the trained completions.

        Example:
            >>> step = Branch((5,))
            >>> ends = [Branch((6,), parent=step), Branch((7,), parent=step, draws=3)]
            >>> ends = [ends[0], Branch((8,), parent=ends[1]), Branch((9,), parent=ends[1])]
            >>> branches = Branches([[TreeCompletion([], "", [], "stop", branch=end) for end in ends]])
            >>> index_N = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
            >>> branches.path_shares(branches.tokens([0, 1, 2]), index_N, [0, 1, 2]).tolist()
            [0.25, 1.0, 0.375, 0.5, 1.0, 0.375, 0.5, 1.0]
        """
        trained_S = torch.zeros(len(self.group_S), dtype=torch.float64)
        trained_S[list(completion_index_S)] = 1.0
        draws_B = self.draws_B * (self._sum(trained_S[self.pair_S]) > 0)
        total = draws_B.new_zeros(len(self) + self.num_groups).index_add(0, self.parent_B, draws_B)

        # Logarithms, as the product over the branches of a long path may be too small for a number.
        walked_B = (draws_B.double() / total[self.parent_B].clamp(min=1)).log()
        for depth in range(1, int(self.depth_B.max()) + 1 if len(self) else 0):
            (at,) = (self.depth_B == depth).nonzero(as_tuple=True)
            walked_B[at] += walked_B[self.parent_B[at]]
        ends_S = self._whole([self._lines[place][-1] for place in completion_index_S])
        return (walked_B[ends_S][index_N] - walked_B[tokens.branch_N]).exp()

    def sums_below(self, values_S: Tensor, *, weights_S: Tensor, discount: float = 1.0) -> tuple[Tensor, Tensor]:
        r"""Sums over the completions that pass through each branch.

        .. math:: \Big(\sum_i n_i\, \gamma^{d_i - d}\, v_i, \;\; \sum_i n_i\Big)

        with the weight n, depth d and value v of a completion, and the depth of the branch; those without value (NaN)
        are left out.

        Args:
            values_S: one per completion, NaN for completions without a value.
            weights_S: one per completion.
            discount: gamma, of each step between a branch and the end of a completion, in (0, 1].

        Returns:
            The weighted sum of discounted values, and the sum of weights: ``(B,)`` each.
        """
        known_S = ~values_S.isnan()
        gap_P = self.depth_S[self.pair_S] - self.depth_B[self.pair_B]
        weights_P = (weights_S.double() * known_S)[self.pair_S]
        values_P = values_S.double().nan_to_num(nan=0.0)[self.pair_S] * discount ** gap_P.double()
        return self._sum(weights_P * values_P), self._sum(weights_P)

    def mean_below(self, values_S: Tensor, *, weights_S: Tensor, discount: float = 1.0) -> Tensor:
        """Averages over the completions that pass through each branch, as ``sums_below`` does; NaN without any."""
        total_B, weight_B = self.sums_below(values_S, weights_S=weights_S, discount=discount)
        return total_B / torch.where(weight_B > 0, weight_B, torch.full_like(weight_B, torch.nan))

    def _sum(self, values_P: Tensor) -> Tensor:
        return torch.zeros(len(self), dtype=torch.float64).index_add(0, self.pair_B, values_P)


def shared_mean(values_N: Tensor, *, tokens: BranchTokens, weights_N: Tensor) -> Tensor:
    """Averages a value of tokens over the copies of each: ``(N,)``.

    Args:
        values_N: one per token of the trained completions.
        tokens: which of them are copies of each other.
        weights_N: weights of the copies, at least 0, and above 0 for one copy of each.

    Example:
        >>> tokens = BranchTokens(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0]))
        >>> shared_mean(torch.tensor([1.0, 5.0, 3.0]), tokens=tokens, weights_N=torch.ones(3))
        tensor([2., 5., 2.])
    """
    if not len(values_N):
        return values_N
    zeros = values_N.new_zeros(int(tokens.token_N.max()) + 1)
    weights_N = weights_N.to(values_N)
    total = zeros.index_add(0, tokens.token_N, values_N * weights_N)
    return (total / zeros.index_add(0, tokens.token_N, weights_N))[tokens.token_N]


def copies(token_N: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the first copy of each token, ``(U,)``, and for every token the one that it is a copy of, ``(N,)``.

    Example:
        >>> first_U, which_N = copies(torch.tensor([4, 7, 4]))
        >>> first_U.tolist(), which_N.tolist()
        ([0, 1], [0, 1, 0])
    """
    _, first, which = np.unique(token_N.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(which.reshape(-1))
