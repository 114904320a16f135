"""Reward functions that check a completion against the right answer.

A reward function is anything that can be called as ``fn(prompts, completions, **columns)``, with the texts of the
prompts and of the completions and with the rows' other columns as keywords, all lists of one length, and that returns
as many rewards; ``None`` says that it has nothing to say about that row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

# `A:` only where a word begins, so that `USA:` is none.
_MARKER = re.compile(r"#+|(?<!\w)A:|\\boxed\s*\{")
_CURRENCY = re.compile(r"([-+]?)\s*\\?[$€£¥]\s*")
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"[-+]?(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]{{1,3}})?", re.IGNORECASE)
# A model that repeats a digit without end has not written a number; Python refuses to read more than 4,300 of them.
_MAX_LENGTH = 200
_RATIO = re.compile(rf"([-+]?{_INTEGER})\s*/\s*({_INTEGER})")


def final_answer(text: str) -> str | None:
    r"""Finds the final answer of a solution: what stands after its last marker.

    Markers are a run of ``#`` (``#26``, ``#### 26``), ``A:`` and ``\boxed{...}``. The answer reaches to the end of the
    line, or to the brace that closes ``\boxed{`` (without which the solution was cut off, and has no answer).

    Args:
        text: a solution.

    Returns:
        The answer without surrounding blanks; ``None`` if there is no marker, or nothing after the last one.

    Example:
        >>> final_answer("3+14=17\n17+9=26\n#26"), final_answer("I do not know")
        ('26', None)
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :]
    answer = _until_closing_brace(rest) if markers[-1].group().startswith("\\") else rest.partition("\n")[0]
    return answer.strip() or None


def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Sequence[Any]
) -> list[float | None]:
    r"""Rewards completions whose final answer is the right one: 1 if it is, 0 if it is not or if there is none.

    Numbers are compared as numbers, exactly: ``1,000``, ``1000``, ``1000.0`` and ``$1000`` are equal, and so are
    ``0.5`` and ``1/2``. Anything else is compared as text, without regard to case and spacing; ``18 eggs`` is not
    ``18``.

    Args:
        prompts: one text per row; not read.
        completions: one text per row, in which :func:`final_answer` looks.
        answer: the right answer per row: a number, a text, or a whole solution with a marker (as GSM8K's ``answer``).
        columns: the rows' other columns; not read.

    Returns:
        One reward per row; ``None`` where the row has no answer (``None``, NaN or blank).

    Raises:
        ValueError: if the lists differ in length.

    Example:
        >>> exact_answer(["3+14+9=?"] * 3, ["#26", "#27", "26"], answer=["26", 26, None])
        [1.0, 0.0, None]
    """
    if not len(prompts) == len(completions) == len(answer):
        lengths = f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers"
        raise ValueError(f"{lengths}: give one completion and one answer per prompt")
    return [_reward(completion, right) for completion, right in zip(completions, answer, strict=True)]


def _reward(completion: str, right: Any) -> float | None:
    # NaN is what a reader of tables puts where a number is missing.
    if right is None or (isinstance(right, float) and math.isnan(right)):
        return None
    reference = str(right).strip()
    reference = final_answer(reference) or reference
    if not reference:
        return None
    given = final_answer(completion)
    return float(given is not None and _equal(given, reference))


def _equal(given: str, reference: str) -> bool:
    number, right = _number(given), _number(reference)
    if number is not None and right is not None:
        return number == right
    return given.casefold().split() == reference.casefold().split()


def _number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None if it is not a number."""
    if len(text) > _MAX_LENGTH:
        return None
    text = text.replace("\N{MINUS SIGN}", "-").rstrip(" .%\\")
    text = _CURRENCY.sub(r"\1", text, count=1) if _CURRENCY.match(text) else text
    if _DECIMAL.fullmatch(text):
        return Fraction(Decimal(text.replace(",", "")))
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return None
    numerator, denominator = (int(part.replace(",", "")) for part in ratio.groups())
    return Fraction(numerator, denominator) if denominator else None


def _until_closing_brace(text: str) -> str:
    """What stands before the brace that closes one already open; nothing if none does."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return ""
