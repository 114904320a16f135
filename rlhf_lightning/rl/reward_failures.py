"""Reward functions that fail: which of them have been failing on everything, and for how long.

Legend: E prompts of all ranks, G completions of each, K reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from ..distributed.collectives import gather_objects
from ..utils.messages import one_line

MOST_IN_A_ROW: Final = 3  # the first may be a hiccup and the second a restart; a server that is away stays away


class FailureWatch:
    """Ends a run whose reward function fails on every sample of ``MOST_IN_A_ROW`` iterations in a row.

    A function that fails on some samples costs these. One that fails on all of them leaves nothing to learn from, or
    another objective than the one that was asked for, and would do so until the last step. A function that has nothing
    to say (``None``) does not fail.
    """

    def __init__(self) -> None:
        self.in_a_row: dict[str, int] = {}

    def look(
        self, names: Sequence[str], rewards_EGK: Tensor, failures: Mapping[str, float], errors: Mapping[str, str]
    ) -> None:
        """Takes note of an iteration; every rank calls it with the same numbers, so that all of them end together.

        Args:
            names: of the reward functions.
            rewards_EGK: what they gave to the samples of all ranks; NaN where they gave nothing.
            failures: on how many samples each failed, over all ranks; more than there are if samples were replaced.
            errors: on this rank, by function that failed, its first message.

        Raises:
            ValueError: a function has failed on everything for too long.
        """
        num_samples = rewards_EGK.shape[0] * rewards_EGK.shape[1]
        if num_samples == 0:
            return
        lost_K = rewards_EGK.isnan().flatten(0, 1).all(dim=0).tolist()
        for name, lost in zip(names, lost_K, strict=True):
            failed = lost and failures[name] >= num_samples
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if failed else 0
        worn_out = [name for name in names if self.in_a_row[name] >= MOST_IN_A_ROW]
        if not worn_out:
            return
        name = worn_out[0]
        said = [found[name] for found in gather_objects(dict(errors)) if name in found]
        raise ValueError(
            f"reward {name!r} failed on every sample of {self.in_a_row[name]} iterations in a row, at last with "
            f"{one_line(said[0], 300)}: mend it or take it out of rewards, and go on from the last checkpoint"
        )
