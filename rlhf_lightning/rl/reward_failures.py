"""Detection of reward functions that fail on every sample for several iterations.

Legend: S completions of all ranks, K reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from ..distributed.collectives import gather_objects
from ..utils.messages import one_line

MAX_CONSECUTIVE_FAILURES: Final = 3  # tolerates one transient failure and one restart of a server


class FailureWatch:
    """Ends a run if a reward function fails on every sample of ``MAX_CONSECUTIVE_FAILURES`` consecutive iterations.

    A function that fails on some samples loses only these. One that fails on all of them would silently change the
    objective, or leave none, until the last step. A function that returns ``None`` abstains and does not fail.
    """

    def __init__(self) -> None:
        self.consecutive: dict[str, int] = {}

    def update(
        self, names: Sequence[str], rewards_SK: Tensor, failures: Mapping[str, float], errors: Mapping[str, str]
    ) -> None:
        """Counts the failures of an iteration; every rank calls it with the same values, so that all raise together.

        Args:
            names: names of the reward functions.
            rewards_SK: rewards of the samples of all ranks, NaN where a function gave none.
            failures: failed samples of each function over all ranks, including samples that were replaced later.
            errors: first message of each function that failed on this rank.

        Raises:
            ValueError: a function has failed on every sample of too many iterations in a row.
        """
        num_samples = len(rewards_SK)
        if num_samples == 0:
            return
        lost_K = rewards_SK.isnan().all(dim=0).tolist()
        for name, lost in zip(names, lost_K, strict=True):
            failed = lost and failures.get(name, 0) >= num_samples  # parts of a score have no failures of their own
            self.consecutive[name] = self.consecutive.get(name, 0) + 1 if failed else 0
        failing = [name for name in names if self.consecutive[name] >= MAX_CONSECUTIVE_FAILURES]
        if not failing:
            return
        name = failing[0]
        said = [found[name] for found in gather_objects(dict(errors)) if name in found]
        raise ValueError(
            f"reward {name!r} failed on every sample of {self.consecutive[name]} iterations in a row, at last with "
            f"{one_line(said[0], 300)}: fix or remove it, then resume from the last checkpoint"
        )
