"""Corrupted twins of solutions, and perturbed prompts: inputs on which a sound model and a sound judge must hold."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

from ..utils.messages import did_you_mean

Corruption = Literal["number", "sign", "drop_step", "swap_steps", "repeat_step"]
CORRUPTIONS: Final[tuple[Corruption, ...]] = get_args(Corruption)
Perturbation = Literal["typos", "spaces", "lower", "upper"]
PERTURBATIONS: Final[tuple[Perturbation, ...]] = get_args(Perturbation)

_NUMBER = re.compile(r"\d+")
_SIGN = re.compile(r"(?<=[\d\s)])[-+*/](?=[\d\s(])")
_WORD = re.compile(r"[^\W\d_]{4,}")


def corrupted_twin(
    text: str, seed: int, kinds: Sequence[Corruption] = CORRUPTIONS, separator: str = "\n"
) -> str | None:
    r"""Makes a flawed copy of a solution by one change, drawn among the possible ones.

    - ``number``: one number becomes another of nearly the same size.
    - ``sign``: one of ``+ - * /`` between operands becomes another.
    - ``drop_step``: one step is left out; not the last one, which would only be unfinished.
    - ``swap_steps``: two neighbouring, different steps change places.
    - ``repeat_step``: one step stands twice.

    Args:
        text: the solution.
        seed: of the change.
        kinds: allowed kinds of change, at least one.
        separator: what steps end with.

    Returns:
        A different text; ``None`` where no change is possible.

    Raises:
        ValueError: a kind that there is not.

    Example:
        >>> corrupted_twin("2+3=5", seed=0, kinds=["sign"])
        '2/3=5'
    """
    _check_kinds("kind of corruption", kinds, CORRUPTIONS)
    draw = random.Random(f"{seed}:{text}")
    for kind in draw.sample(sorted(set(kinds)), len(set(kinds))):
        changed = _CHANGES[kind](text, draw, separator)
        if changed is not None and changed != text:
            return changed
    return None


def _other_number(text: str, draw: random.Random, separator: str) -> str | None:
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    match = draw.choice(found)
    value = int(match[0])
    others = [value + step for step in (-2, -1, 1, 2, 10) if value + step >= 0]
    return text[: match.start()] + str(draw.choice(others)) + text[match.end() :]


def _other_sign(text: str, draw: random.Random, separator: str) -> str | None:
    found = list(_SIGN.finditer(text))
    if not found:
        return None
    match = draw.choice(found)
    return text[: match.start()] + draw.choice([sign for sign in "+-*/" if sign != match[0]]) + text[match.end() :]


def _drop(text: str, draw: random.Random, separator: str) -> str | None:
    steps = text.split(separator)
    if len(steps) < 2:
        return None
    place = draw.randrange(len(steps) - 1)
    return separator.join(steps[:place] + steps[place + 1 :])


def _swap(text: str, draw: random.Random, separator: str) -> str | None:
    steps = text.split(separator)
    places = [n for n in range(len(steps) - 1) if steps[n] != steps[n + 1]]
    if not places:
        return None
    n = draw.choice(places)
    return separator.join([*steps[:n], steps[n + 1], steps[n], *steps[n + 2 :]])


def _repeat(text: str, draw: random.Random, separator: str) -> str | None:
    steps = text.split(separator)
    places = [n for n, step in enumerate(steps) if step.strip()]
    if not places:
        return None
    n = draw.choice(places)
    return separator.join([*steps[: n + 1], *steps[n:]])


_CHANGES: dict[str, Callable[[str, random.Random, str], str | None]] = {
    "number": _other_number,
    "sign": _other_sign,
    "drop_step": _drop,
    "swap_steps": _swap,
    "repeat_step": _repeat,
}


class PerturbedPrompt:
    """Rewrites the prompt of a row without a change of its meaning: a ``transform`` of the datamodules.

    A text changes, or the last user message of a chat. Numbers stay as they are.

    Args:
        how: ``typos`` swaps two inner letters of every third word of four letters or more, at least of one; ``spaces``
            doubles the blanks between words; ``lower`` and ``upper`` change the case; or a template with the field
            ``{prompt}``, such as ``"Please answer: {prompt}"``.
        seed: of the typos.

    Raises:
        ValueError: neither a perturbation nor a template.

    Example:
        >>> PerturbedPrompt("Please answer: {prompt}")({"prompt": "2+2?"})
        {'prompt': 'Please answer: 2+2?'}
        >>> PerturbedPrompt("spaces")({"prompt": "How much is 2+2?"})
        {'prompt': 'How  much  is  2+2?'}
    """

    def __init__(self, how: str, seed: int = 0) -> None:
        if how not in PERTURBATIONS and "{prompt}" not in how:
            advice = f"{did_you_mean(how, PERTURBATIONS)}; or write a template with {{prompt}}"
            raise ValueError(f"there is no perturbation {how!r}{advice}")
        self.how = how
        self.seed = seed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with its prompt rewritten.

        Raises:
            KeyError: the row has no text that it could rewrite.
        """
        for name in ("prompt", "messages", "conversations", "instruction", "question"):
            if isinstance(value := row.get(name), str):
                return row | {name: self.rewritten(value)}
            if isinstance(value, Sequence) and value:
                return row | {name: self._in_messages(list(value), name)}
        raise KeyError(f"no prompt among the columns {sorted(row)}")

    def _in_messages(self, messages: list[Any], name: str) -> list[Any]:
        for n in reversed(range(len(messages))):
            message = messages[n]
            if isinstance(message, Mapping) and (message.get("role") == "user" or message.get("from") == "human"):
                key = "content" if "content" in message else "value"
                if isinstance(message.get(key), str):
                    return [*messages[:n], {**message, key: self.rewritten(message[key])}, *messages[n + 1 :]]
        raise KeyError(f"no user message with a text in the column {name!r}")

    def rewritten(self, text: str) -> str:
        """Returns the perturbed text."""
        if self.how == "spaces":
            return re.sub(r"(?<=\S) (?=\S)", "  ", text)
        if self.how in ("lower", "upper"):
            return text.lower() if self.how == "lower" else text.upper()
        if self.how == "typos":
            words = list(_WORD.finditer(text))
            draw = random.Random(f"{self.seed}:{text}")
            for match in sorted(draw.sample(words, -(-len(words) // 3)), key=lambda m: m.start()):
                place = match.start() + draw.randrange(1, len(match[0]) - 2)
                text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
            return text
        return self.how.replace("{prompt}", text)


def _check_kinds(what: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if isinstance(given, str) or not given:
        raise ValueError(f"{given!r} is no list of at least one {what}: {', '.join(allowed)}")
    for kind in given:
        if kind not in allowed:
            raise ValueError(f"there is no {what} {kind!r}{did_you_mean(str(kind), allowed)}")
