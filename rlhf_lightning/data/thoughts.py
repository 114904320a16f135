"""Thoughts within texts: a passage between two marks, and the answer after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

THINK: Final = ("<think>", "</think>")


def check_marks(marks: Sequence[str]) -> tuple[str, str]:
    """Returns the marks that open and close a thought.

    Raises:
        ValueError: these are not two different texts.
    """
    pair = tuple(map(str, marks)) if not isinstance(marks, str) else (marks,)
    if len(pair) != 2 or not all(pair) or pair[0] == pair[1]:
        raise ValueError(f"marks is {list(pair)}; it must be two different texts, such as ['<think>', '</think>']")
    return pair[0], pair[1]


def split_thought(text: str, marks: Sequence[str] = THINK) -> tuple[str, str] | None:
    """Splits a text after the mark that closes its thought, and the blanks that follow.

    Args:
        text: a completion; the opening mark may be in its prompt.
        marks: the opening and the closing mark.

    Returns:
        The thought with its marks and blanks, and the answer; ``None`` where the thought is not closed.

    Example:
        >>> split_thought("<think>1+2=3</think> #3"), split_thought("#3"), split_thought("<think>1+2")
        (('<think>1+2=3</think> ', '#3'), ('', '#3'), None)
    """
    opening, closing = marks
    at = text.find(closing)
    if at < 0:
        return None if opening in text else ("", text)
    answer = text[at + len(closing) :].lstrip()
    return text[: len(text) - len(answer)], answer
