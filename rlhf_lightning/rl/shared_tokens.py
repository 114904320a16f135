"""Tokens that completions of searches share: how often each counts, and means over the completions through it.

Legend: S trained completions, N tokens of them one after the other, U without the copies of shared ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inference import Completion
from .branches import Branches, BranchTokens, copies, shared_mean


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of trained completions, those of a shared branch once for each completion through it.

    Args:
        tokens: which of them are copies of each other.
        shares_N: weight of each in the loss: those of a token's copies add up to the draws that gave it, (N,).
        paths_N: part of each in a mean over the completions through a token, see ``Branches.path_shares``, (N,).
    """

    tokens: BranchTokens
    shares_N: Tensor
    paths_N: Tensor

    @classmethod
    def of(cls, groups: Sequence[Sequence[Completion]], completion_index_S: Tensor, index_N: Tensor) -> SharedTokens:
        """Finds the shared tokens of trained completions.

        Args:
            groups: all completions of each prompt.
            completion_index_S: numbers of the trained ones among them.
            index_N: place in ``completion_index_S`` of each token's completion.
        """
        branches, places = Branches(groups), completion_index_S.tolist()
        tokens = branches.tokens(places)
        trained = torch.zeros(sum(map(len, groups)), dtype=torch.bool)
        trained[places] = True
        shares_N = branches.shares(trained)[tokens.branch_N]
        return cls(tokens, shares_N, branches.path_shares(tokens, index_N, places))

    @property
    def first_U(self) -> Tensor:
        """The first copy of each token, (U,)."""
        return copies(self.tokens.token_N)[0]

    def mean(self, values_N: Tensor) -> Tensor:
        """Averages an estimate over the completions through each token, (N,); equal for its copies."""
        return shared_mean(values_N, tokens=self.tokens, weights_N=self.paths_N)
