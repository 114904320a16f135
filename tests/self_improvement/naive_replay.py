"""Replayed rows of earlier rounds, recomputed from all rows that they have made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_lightning.inference import derive_seed

Made = Sequence[tuple[dict[str, Any], float]]


def texts(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(row.get(name)) for name in ("prompt", "completion", "chosen", "rejected", "label"))


def naive_replay(
    earlier: Mapping[int, Made],
    now: Sequence[dict[str, Any]],
    *,
    number: int,
    seed: int,
    capacity: int,
    share: float,
    max_age: int | None = None,
) -> list[dict[str, Any]]:
    """Draws the rows of earlier rounds, each with its priority, for a round that has made others."""
    alive: list[tuple[float, int, dict[str, Any], int]] = []  # priority, when it came, row, round
    came = 0
    for before, made in earlier.items():
        # A row that is made again is the new one; it is there once.
        found = [texts(row) for row, _ in made]
        alive = [one for one in alive if texts(one[2]) not in found]
        alive = [one for one in alive if max_age is None or before - one[3] <= max_age]
        for place, (row, priority) in enumerate(made):
            if priority > 0 and found.index(texts(row)) == place:
                alive.append((priority, came, row, before))
                came += 1
        while len(alive) > capacity:
            alive.remove(min(alive, key=lambda one: (one[0], one[1])))
    own = [texts(row) for row in now]
    left = [one for one in alive if texts(one[2]) not in own and (max_age is None or number - one[3] <= max_age)]

    # The first of a race whose rates are the priorities.
    times = np.random.default_rng(derive_seed(seed, number, "replay")).exponential(size=len(left))
    order = sorted(range(len(left)), key=lambda n: times[n] / left[n][0])
    drawn = sorted(order[: math.floor(share * len(own))])
    return [left[n][2] | {"provenance": left[n][2]["provenance"] | {"round": left[n][3]}} for n in drawn]
