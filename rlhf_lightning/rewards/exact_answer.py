"""Rewards completions with the right answer.

A reward function is anything that can be called as ``fn(prompts, completions, **columns)``, with the texts of the
prompts and of the completions and with the rows' other columns as keywords, all lists of one length, and that returns
as many rewards; ``None`` where it has no verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, Final

from .numbers_in_text import plain_text, read_number, take_unit

# `A:` only where a word begins, so that `USA:` does not match; `#` not within `C#` or `&#8722;`.
_MARKER: Final = re.compile(r"(?<![\w&])#+|(?<!\w)A:\**|\\f?boxed\s*\{")
# A heading, not an answer: begins with a word, perhaps after a section number.
_HEADING: Final = re.compile(r"[ \t]+(?:[*_`]*\s*)(?:\d+[.):]\s+)?(?:[^\W\d_]{2,})")
_ANSWER: Final = re.compile(r"\banswer\b", re.IGNORECASE)
_LABEL: Final = re.compile(r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]\s*", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"[A-Za-z]\s*=\s*(?!=)")


def final_answer(text: str) -> str | None:
    r"""Finds the final answer of a solution: the text after its last marker.

    Markers are a run of ``#`` (``#26``, ``#### 26``), ``A:`` and ``\boxed{...}``. The answer reaches to the end of the
    line, or to the brace that closes ``\boxed{`` (without it the solution was cut off, and has no answer). After
    another marker, a heading (``### Check``, and ``#### Check`` with text below) does not count as a marker, unless it
    contains the word answer.

    Args:
        text: a solution.

    Returns:
        The answer without surrounding blanks; ``None`` without a marker, or with nothing after the last one.

    Example:
        >>> final_answer("3+14=17\n17+9=26\n#26"), final_answer("I do not know")
        ('26', None)
    """
    markers = list(_MARKER.finditer(text))
    while len(markers) > 1 and _is_heading(text, markers[-1]):
        del markers[-1]
    if not markers:
        return None
    rest = text[markers[-1].end() :]
    answer = _until_closing_brace(rest) if markers[-1].group().startswith("\\") else rest.partition("\n")[0]
    return answer.strip() or None


def _is_heading(text: str, marker: re.Match[str]) -> bool:
    """Whether a run of ``#`` begins a line that is a heading of Markdown."""
    if not marker.group().startswith("#") or text[: marker.start()].rpartition("\n")[2].strip():
        return False
    line, _, below = text[marker.end() :].partition("\n")
    if not _HEADING.match(line) or _ANSWER.search(line):
        return False
    # Four of them may also mark an answer in words, unless text follows below.
    return len(marker.group()) < 4 or bool(below.strip())


def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Sequence[Any]
) -> list[float | None]:
    r"""Rewards completions whose final answer is right: 1 if it is, 0 if it is wrong or missing.

    Numbers are compared as numbers, exactly: ``1,000``, ``1{,}000``, ``1000.0``, ``$1000`` and ``10^3`` are equal, and
    so are ``0.5``, ``1/2`` and ``\frac{1}{2}``, ``1 1/2`` and ``1.5``; a currency or percent sign is ignored where
    only one side has it, and must agree where both have one. Anything else is compared as text, ignoring case and
    spacing. Markdown and LaTeX around the answer (``**42**``, ``$42$``, ``\text{Paris}``), a label (``Answer:``),
    ``x =`` and a full stop are removed; words are not: ``18 eggs`` is not ``18``.

    Args:
        prompts: one text per row; not read.
        completions: one text per row, searched by :func:`final_answer`.
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


def check_verdicts(found: Any, num_samples: int) -> list[float | None]:
    """Converts a verifier's return value to one finite number or ``None`` per completion.

    NaN, which tables and NumPy store for a missing number, becomes ``None``.

    Args:
        found: the return value.
        num_samples: number of completions.

    Raises:
        ValueError: the number of values is wrong, or one is not a finite number.

    Example:
        >>> check_verdicts([1, float("nan"), None], 3)
        [1.0, None, None]
    """
    verdicts = list(found)
    if len(verdicts) != num_samples:
        raise ValueError(f"the verifier gave {len(verdicts)} rewards for {num_samples} completions: one each is needed")
    return [_verdict(number, value) for number, value in enumerate(verdicts)]


def _verdict(number: int, value: Any) -> float | None:
    if value is not None and not isinstance(value, Real) and getattr(value, "ndim", None) == 0:
        value = value.item()  # a tensor or array without dimensions
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return None
    if not isinstance(value, Real) or math.isinf(value):
        raise ValueError(
            f"the verifier gave {value!r} for completion {number}: return a finite number, or None for no verdict"
        )
    return float(value)


def _reward(completion: str, right: Any) -> float | None:
    # Readers of tables store NaN for a missing number.
    if right is None or (isinstance(right, float) and math.isnan(right)):
        return None
    reference = str(right).strip()
    # A reference may be a whole solution with its own marker.
    reference = final_answer(reference) or reference
    if not reference:
        return None
    given = final_answer(completion)
    return float(given is not None and _equal(given, reference))


def _equal(given: str, reference: str) -> bool:
    given, reference = _bare(given), _bare(reference)
    if "=" not in reference:
        given = _VARIABLE.sub("", given, count=1) if _VARIABLE.match(given) else given

    # Numbers by value (0.5 is 1/2), with equal units or without; any other answer by its words.
    number, right = _number(given), _number(reference)
    if number is not None and right is not None:
        (value, unit), (right_value, right_unit) = number, right
        return value == right_value and (unit == right_unit or not unit or not right_unit)
    return given.casefold().split() == reference.casefold().split()


def _bare(answer: str) -> str:
    answer = plain_text(answer)
    return plain_text(answer[label.end() :]) if (label := _LABEL.match(answer)) else answer


def _number(text: str) -> tuple[Fraction, str] | None:
    text, unit = take_unit(text)
    value = read_number(text)
    return None if value is None else (value, unit)


def _until_closing_brace(text: str) -> str:
    """The text before the brace that closes an already open one; empty if it never closes."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return ""
