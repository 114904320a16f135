"""Rewards completions with the right answer.

A reward function is anything that can be called as ``fn(prompts, completions, **columns)``, with the texts of the
prompts and of the completions and with the rows' other columns as keywords, all lists of one length, and that returns
as many rewards; ``None`` where it has no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..data.final_answer import final_answer, same_answer


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
    return float(given is not None and same_answer(given, reference))
