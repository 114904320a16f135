"""Scorers of samples: any reward function, verifier, learned reward or judge, as row makers need them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.answers import load_verifier
from ..rewards.reward_set import RewardSet
from ..rewards.specs import build_reward
from .samples import Scorer

# Failures in succession after which a reward is broken; one call may have a single sample.
_MOST_LOST = 8


def load_scorer(spec: str | Mapping[str, Any]) -> Scorer:
    """Makes a scorer of a reward's specification.

    It is called as ``fn(prompts, completions, **columns)`` and passes on the columns that the reward takes. A sample on
    which the reward fails has no score. Calls on all of whose samples it fails are added up: from eight failures in
    succession on it is broken, which is an error.

    Args:
        spec: dotted path of a function or class, or ``class_path`` and ``init_args``: ``RewardModelReward`` of a reward
            model, ``ProcessModelReward``, ``ConstitutionReward`` with a judge.

    Raises:
        ValueError: it cannot be imported, or its arguments do not fit.

    Example:
        >>> load_scorer("rlhf_lightning.rewards.exact_answer")(["1+1=?"], ["#2"], answer=["2"], source=["book"])
        [1.0]
    """
    if isinstance(spec, str):
        load_verifier(spec)
    rewards = RewardSet(
        [build_reward(spec if isinstance(spec, str) else dict(spec))], timeout=None, sample_timeout=None
    )

    lost = 0

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        nonlocal lost
        found = rewards(list(prompts), list(completions), columns)
        failures = sum(found.failures.values())
        lost = lost + failures if failures == len(completions) else 0
        if lost >= _MOST_LOST:
            reason = next(iter(found.errors.values()), "")
            raise ValueError(f"the verifier {spec!r} failed on all of {lost} samples: {reason}")
        return [None if math.isnan(value) else float(value) for value in found.values[:, 0]]

    return score
