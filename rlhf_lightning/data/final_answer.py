"""Finds the final answer of a solution, and compares answers by value."""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction
from typing import Final

from .numbers_in_text import (
    BOX,
    plain_signs,
    plain_text,
    read_number,
    take_unit,
    until_closing_brace,
)

# `A:` only where a word begins, so that `USA:` does not match; `#` not within `C#` or `&#8722;`.
_MARKER: Final = re.compile(r"(?<![\w&])#+|(?<!\w)A:\**|" + BOX)
# A heading, not an answer: begins with a word, perhaps after a section number.
_HEADING: Final = re.compile(r"[ \t]+(?:[*_`]*\s*)(?:\d+[.):]\s+)?(?:[^\W\d_]{2,})")
_ANSWER: Final = re.compile(r"\banswer\b", re.IGNORECASE)
_LABEL: Final = re.compile(r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]\s*", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"[A-Za-z]\s*=\s*(?!=)")
# A sign directly after a word or a bracket is an operator or a dash: `10-5`.
_LAST_NUMBER: Final = re.compile(r"(?:(?<![\w)\]}])[-+](?:\\?[$€£¥₹])?)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?")


def final_answer(text: str) -> str | None:
    r"""Finds the final answer of a solution: the text after its last marker.

    Markers are a run of ``#`` (``#26``, ``#### 26``), ``A:`` and ``\boxed{...}`` or ``\fbox{...}``. The answer
    reaches to the end of the line, or to the brace that closes the box (without it the solution was cut off, and has no
    answer). After another marker, a heading (``### Check``, and ``#### Check`` with text below) does not count as a
    marker, unless it contains the word answer.

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
    answer = until_closing_brace(rest) if markers[-1].group().startswith("\\") else rest.partition("\n")[0]
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


def same_answer(given: str, reference: str) -> bool:
    """Tells whether an answer is right: numbers by value, anything else by its words (see ``exact_answer``)."""
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


def answer_key(text: str) -> Hashable | None:
    r"""Returns what a solution answers, in a form in which equal answers are equal: for votes.

    The final answer after its marker, without one the last number of the text, without any the whole text; numbers by
    value, anything else by its words.

    Args:
        text: a solution.

    Returns:
        ``None`` for an empty text.

    Example:
        >>> answer_key("so it is\n#0.50") == answer_key(r"\boxed{\frac{1}{2}}"), answer_key("I do not know")
        (True, 'i do not know')
    """
    answer = final_answer(text)
    if answer is None:
        numbers = _LAST_NUMBER.findall(plain_signs(text))
        answer = numbers[-1] if numbers else text
    bare = _bare(answer)
    bare = _VARIABLE.sub("", bare, count=1) if _VARIABLE.match(bare) else bare
    number = _number(bare)
    return " ".join(bare.casefold().split()) or None if number is None else number[0]
