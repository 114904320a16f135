"""Builds reward functions from the option ``rewards``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from ..utils.imports import dotted_path, load_attribute
from . import RewardFunction, RewardSet, StepReward, resolve_reward

RewardSpec = str | dict[str, Any] | RewardFunction

_KEYS = ("class_path", "init_args", "weight", "name")


def build_rewards(
    rewards: Sequence[RewardSpec],
    weights: Sequence[float] | None = None,
    *,
    process: RewardSpec | None = None,
    timeout: float | None = 60.0,
    on_bad_value: Literal["error", "skip"] = "error",
) -> RewardSet:
    """Makes a ``RewardSet`` of functions, dotted paths, and dictionaries as in a YAML file.

    Args:
        rewards: each a function, the dotted path of a function or class, or a dictionary with ``class_path`` (of a
            class or function), and ``init_args``, ``weight`` and ``name`` if wanted.
        weights: one per reward, instead of weights in the dictionaries; 1 by default.
        process: a function that rewards the steps of a completion, written in the same way; it comes last, with the
            weight in its dictionary. Its attribute ``step_separator`` separates steps; a line break by default.
        timeout: seconds that a function may take for a batch, above 0; ``None`` for no limit. A late one is called
            again for each sample alone, with a sixth of that time.
        on_bad_value: ``error`` raises when a function returns an invalid reward; ``skip`` counts the sample as failed.

    Raises:
        ValueError: a path that cannot be imported, an unknown key, invalid arguments, or weights given twice.

    Example:
        >>> spec = {"class_path": "rlhf_lightning.rewards.RepetitionReward", "weight": 0.5}
        >>> rewards = build_rewards(["rlhf_lightning.rewards.exact_answer", spec])
        >>> rewards.names, rewards.weights.tolist()
        (('exact_answer', 'RepetitionReward'), [1.0, 0.5])
    """
    if isinstance(rewards, str | Mapping) or callable(rewards):
        raise ValueError(f"rewards is {rewards!r}; it must be a list: write [{rewards!r}]")
    if not rewards and process is None:
        raise ValueError(
            "rewards is empty; give at least one, such as rlhf_lightning.rewards.exact_answer, which reads "
            "the column 'answer'"
        )

    # Weights come from one place: the list, or each reward's own.
    parts = [_read(spec) for spec in rewards]
    own = [weight for _, weight, _ in parts]
    if weights is not None and any(weight is not None for weight in own):
        raise ValueError("reward_weights and a reward's own weight are both given: write the weights in one place")
    chosen = [1.0 if weight is None else weight for weight in own] if weights is None else list(weights)
    if len(chosen) != len(parts):
        raise ValueError(f"reward_weights has {len(chosen)} entries for {len(parts)} rewards: give one each")

    # The process reward comes last, so that ``weights`` are those of ``rewards`` alone.
    given: list[RewardFunction | StepReward] = [function for function, _, _ in parts]
    if process is not None:
        parts.append(_read(process))
        function, weight, _ = parts[-1]
        given.append(StepReward(function, str(getattr(function, "step_separator", "\n"))))
        chosen.append(1.0 if weight is None else weight)

    return RewardSet(
        given,
        weights=chosen,
        names=_names([function for function, _, _ in parts], [name for _, _, name in parts]),
        timeout=timeout,
        sample_timeout=None if timeout is None else timeout / 6,
        on_bad_value=on_bad_value,
    )


def build_reward(spec: RewardSpec) -> RewardFunction:
    """Makes one reward function of its specification, such as a verifier.

    Args:
        spec: as one entry of ``build_rewards``.

    Raises:
        ValueError: a path that cannot be imported, an unknown key, or invalid arguments.

    Example:
        >>> build_reward("rlhf_lightning.rewards.exact_answer")(["1+1="], ["#2"], answer=["2"])
        [1.0]
    """
    return _read(spec)[0]


def plain_specs(rewards: Sequence[RewardSpec]) -> list[str | dict[str, Any]]:
    """Converts rewards to values that a checkpoint can hold: functions by their names."""
    return [spec if isinstance(spec, str | dict) else dotted_path(spec) for spec in rewards]


def _read(spec: RewardSpec) -> tuple[RewardFunction, float | None, str | None]:
    if not isinstance(spec, Mapping):
        return resolve_reward(spec), None, None
    unknown = sorted(set(spec) - set(_KEYS))
    if unknown or not isinstance(spec.get("class_path"), str):
        problem = f"the key {unknown[0]!r}" if unknown else "no class_path"
        raise ValueError(f"a reward has {problem}: allowed are {', '.join(_KEYS)}, and class_path is required")

    # A class takes the arguments now, a function at every call.
    arguments = dict(spec.get("init_args") or {})
    found = load_attribute(spec["class_path"]) if arguments else resolve_reward(spec["class_path"])
    if arguments and inspect.isclass(found):
        try:
            found = found(**arguments)
        except TypeError as error:
            raise ValueError(f"the init_args of reward {spec['class_path']!r} do not fit it: {error}") from error
    elif arguments:
        found = partial(found, **arguments)
    return resolve_reward(found), spec.get("weight"), spec.get("name")


def _names(functions: Sequence[RewardFunction], given: Sequence[str | None]) -> list[str]:
    """The given names, or the functions' own, numbered where they repeat."""
    taken = {name for name in given if name}
    names = []
    for function, name in zip(functions, given, strict=True):
        own, number = _name(function), 2
        chosen = name or own
        while not name and chosen in taken:
            chosen, number = f"{own}_{number}", number + 1
        taken.add(chosen)
        names.append(chosen)
    return names


def _name(function: RewardFunction) -> str:
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", None) or type(inner).__name__)
