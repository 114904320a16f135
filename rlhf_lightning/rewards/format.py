"""Reward for completions in a given format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

# One block of thoughts and then an answer, without another block.
THINK_THEN_ANSWER: Final = r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)+"
_TAG: Final = re.compile(r"[\w:.-]+")


class FormatReward:
    r"""Rewards a completion that has a format: an expression, the tags, and the number of steps that are asked for.

    Args:
        pattern: a regular expression to match from the first to the last character; a dot also matches a line break.
            By default, where no tags and steps are asked for, ``<think>...</think>`` and an answer; else anything.
        matched: reward of a completion that keeps all of it.
        unmatched: reward of one that does not.
        required: names of tags, such as ``answer``, that must be there exactly once each, opened and then closed.
        forbidden: names of tags that must be there neither opened nor closed.
        min_steps: least number of lines with something other than tags on them, at least 0.

    Raises:
        ValueError: for an expression that does not compile, a tag's name that cannot be one or is both required and
            forbidden, and a number of steps below 0.

    Example:
        >>> FormatReward()(["p", "p"], ["<think>3+4=7</think>7", "7"])
        [1.0, 0.0]
        >>> reward = FormatReward(required=["answer"], forbidden=["tool"], min_steps=2)
        >>> reward(["p"] * 2, ["3+4=7\n<answer>7</answer>", "<answer>7</answer>"])
        [1.0, 0.0]
    """

    def __init__(
        self,
        pattern: str | None = None,
        matched: float = 1.0,
        unmatched: float = 0.0,
        *,
        required: Sequence[str] = (),
        forbidden: Sequence[str] = (),
        min_steps: int = 0,
    ) -> None:
        if pattern is None:
            pattern = ".*" if required or forbidden or min_steps else THINK_THEN_ANSWER
        try:
            self._expression = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        _check_tags("required", required)
        _check_tags("forbidden", forbidden)
        both = next((name for name in required if name in forbidden), None)
        if both is not None:
            raise ValueError(f"the tag {both!r} is required and forbidden: leave it in one of them")
        if isinstance(min_steps, bool) or not isinstance(min_steps, int) or min_steps < 0:
            raise ValueError(f"min_steps is {min_steps!r}; it must be a whole number of at least 0 (0 asks for none)")
        self.pattern = pattern
        self.matched = matched
        self.unmatched = unmatched
        self.required = tuple(required)
        self.forbidden = tuple(forbidden)
        self.min_steps = min_steps

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        return [self.matched if self._keeps(completion) else self.unmatched for completion in completions]

    def _keeps(self, completion: str) -> bool:
        tags = re.findall(r"<(/?[\w:.-]+)>", completion)
        steps = [line for line in completion.splitlines() if re.sub(r"</?[\w:.-]+>", "", line).strip()]
        # Of a required tag there is one opening and one closing, in this order.
        once = all([tag for tag in tags if tag in (name, f"/{name}")] == [name, f"/{name}"] for name in self.required)
        spared = not any(tag.removeprefix("/") in self.forbidden for tag in tags)
        return self._expression.fullmatch(completion) is not None and once and spared and len(steps) >= self.min_steps


def _check_tags(option: str, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{option} is {names!r}: write a list of names, such as [{names!r}]")
    wrong = next((name for name in names if not isinstance(name, str) or _TAG.fullmatch(name) is None), None)
    if wrong is not None:
        raise ValueError(f"{option} has {wrong!r}: write the name of a tag without brackets, such as 'answer'")
