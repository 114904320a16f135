"""Rewards answers by what follows their thoughts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..data.thoughts import THINK, check_marks, split_thought
from ..utils.imports import load_attribute
from ._called_reward import RewardFunction
from .reward_set import resolve_reward

# Tokens of the whole completion, the thought's included.
_TOKENS: Final = ("prompt_ids", "completion_ids")


class AnswerOnlyReward:
    """Shows another reward the answers alone, without the thoughts before them.

    A completion whose thought is not closed has no answer. The other reward sees no tokens, since these include the
    thought's.

    Args:
        reward: a reward function, its dotted path, or ``class_path`` and ``init_args``.
        marks: texts that open and close a thought.
        no_answer: the reward of a completion without an answer; ``None`` for no verdict.

    Raises:
        ValueError: there is no such reward, or the marks are not two different texts.

    Example:
        >>> reward = AnswerOnlyReward("rlhf_lightning.rewards.exact_answer")
        >>> reward(["1+2=?"] * 3, ["<think>#3</think>#4", "<think>hm</think>#3", "<think>#3"], answer=["3"] * 3)
        [0.0, 1.0, 0.0]
    """

    def __init__(
        self,
        reward: RewardFunction | str | Mapping[str, Any],
        marks: Sequence[str] = THINK,
        no_answer: float | None = 0.0,
    ) -> None:
        self.marks = check_marks(marks)
        self.no_answer = no_answer
        self.reward = _resolved(reward)
        parameters = inspect.signature(self.reward).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._names = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else named
        needed = {p.name for p in parameters if p.name in named and p.default is p.empty} - {"prompts", "completions"}
        self.required_columns = tuple(sorted({*needed, *getattr(self.reward, "required_columns", ())} - {*_TOKENS}))

    def attach(self, module: Any) -> None:
        """Attaches the other reward to a policy's module."""
        attach = getattr(self.reward, "attach", None)
        if callable(attach):
            attach(module)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
        """Scores each answer."""
        parts = [split_thought(completion, self.marks) for completion in completions]
        places = [number for number, part in enumerate(parts) if part is not None and part[1]]
        names = [name for name in columns if name not in _TOKENS and (self._names is None or name in self._names)]
        kept = {name: [columns[name][number] for number in places] for name in names}
        answers = [part[1] for part in parts if part is not None and part[1]]
        found = list(self.reward([prompts[n] for n in places], answers, **kept)) if places else []
        rewards: list[Any] = [self.no_answer] * len(completions)
        for number, value in zip(places, found, strict=True):
            rewards[number] = value
        return rewards


def _resolved(reward: RewardFunction | str | Mapping[str, Any]) -> RewardFunction:
    if not isinstance(reward, Mapping):
        return resolve_reward(reward)
    if not isinstance(reward.get("class_path"), str) or set(reward) - {"class_path", "init_args"}:
        raise ValueError(f"reward has the keys {sorted(map(str, reward))}: write class_path and init_args")
    try:
        return resolve_reward(load_attribute(reward["class_path"])(**(reward.get("init_args") or {})))
    except TypeError as error:
        raise ValueError(f"the init_args of reward {reward['class_path']!r} do not fit it: {error}") from error
