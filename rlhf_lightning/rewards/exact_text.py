"""Rewards completions that are exactly a given text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.cell_checks import is_missing
from ..utils.validation import check_same_length


def exact_text(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **columns: Sequence[Any]
) -> list[float | None]:
    r"""Rewards a completion that is the answer's text, but for white space around it: 1 if it is, else 0.

    Args:
        prompts: one per row; not read.
        completions: texts.
        answer: the right text of each row, or a number that is written as one.
        columns: the rows' other columns; not read.

    Returns:
        One reward per row; ``None`` where the row has no answer.

    Raises:
        ValueError: lists of different length.

    Example:
        >>> exact_text(["Copy: a b="] * 3, ["a b\n", "a  b", "A b"], answer=["a b", "a b", "a b"])
        [1.0, 0.0, 0.0]
    """
    check_same_length(prompts=prompts, completions=completions, answer=answer)
    return [
        None if is_missing(right) else float(text.strip() == str(right).strip())
        for text, right in zip(completions, answer, strict=True)
    ]
