"""Reward for right mathematical answers, compared as numbers or expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..data.cell_checks import is_missing
from ..data.final_answer import final_answer
from ..data.numbers_in_text import read_number, strip_marks, take_unit
from ._columns import read_column
from ._line_worker import LineWorker, LineWorkerDiedError
from ._math_worker import WORD
from ._time_limit import CallTimeoutError

_MINUS: Final = "\N{MINUS SIGN}"
_FBOX: Final = re.compile(r"\\fbox(?=\s*\{)")
_SCRIPT: Final = Path(__file__).with_name("_math_worker.py")


class MathAnswerReward:
    r"""Rewards a completion whose final answer equals the row's, as a number or as an expression.

    The package ``math-verify`` finds the answer (in ``\boxed{}``, in LaTeX, or as the last number) and compares it
    with the reference: ``0.5`` is ``\frac{1}{2}``, ``(x+1)^2`` is ``x^2+2x+1``. Where a row or the end of a completion
    has ``####``, the answer is the rest of its line. The comparison runs in a separate process with limits on time and
    memory, because an answer such as ``9^{9^{9}}`` would never return; one that cannot be compared within the limits
    is wrong.

    Args:
        answer_column: the column with the reference answers, text or numbers; a row whose reference is missing or not
            mathematical cannot be scored.
        correct: reward of a right answer.
        wrong: reward of a wrong or missing answer.
        boxed_only: an answer counts only in ``\boxed{}``.
        timeout: seconds for one completion, above 0.
        memory_mb: megabytes for the process, at least 512.

    Raises:
        ImportError: without the package ``math-verify``.
        ValueError: for numbers out of range.

    Example:
        >>> MathAnswerReward()(["p", "p"], [r"so \boxed{0.5}", "it is 3"], answer=["1/2", 2])
        [1.0, 0.0]
    """

    bounds_its_time = True

    def __init__(
        self,
        answer_column: str = "answer",
        correct: float = 1.0,
        wrong: float = 0.0,
        boxed_only: bool = False,
        timeout: float = 5.0,
        memory_mb: int = 2048,
    ) -> None:
        if find_spec("math_verify") is None:
            raise ImportError("MathAnswerReward needs the package math-verify: pip install math-verify")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} is not above 0: 5.0 is usual")
        if memory_mb < 512:
            raise ValueError(f"memory_mb={memory_mb} is below 512: sympy alone needs that much address space")
        self.answer_column = answer_column
        self.correct = correct
        self.wrong = wrong
        self.boxed_only = boxed_only
        self.required_columns = (answer_column,)
        self._worker = LineWorker(_SCRIPT, timeout=timeout, memory_mb=memory_mb)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        golds = read_column(columns, self.answer_column, self)
        return [self._score(completion, gold) for completion, gold in zip(completions, golds, strict=True)]

    def _answer(self, completion: str) -> str:
        """The text after the mark, as a formula unless it is in words; all of it without a mark."""
        completion = _FBOX.sub(r"\\boxed", completion)  # the only box that math-verify knows
        answer = final_answer(completion) if "####" in completion and not self.boxed_only else None
        if answer is None:
            return completion.replace(_MINUS, "-")
        answer = _without_currency(strip_marks(answer))
        return answer if WORD.search(answer) else f"${answer}$"

    def _score(self, completion: str, gold: Any) -> float | None:
        if is_missing(gold):
            return None
        question = {
            "gold": _plain_gold(str(gold)),
            "completion": self._answer(completion),
            "boxed_only": self.boxed_only,
        }
        try:
            verdict = self._worker.ask(question)
        except (CallTimeoutError, LineWorkerDiedError):
            verdict = False
        if verdict is None:
            return None
        return self.correct if verdict else self.wrong


def _plain_gold(gold: str) -> str:
    solution, mark, answer = gold.replace(_MINUS, "-").rpartition("####")
    return solution + mark + _without_currency(answer.strip())


def _without_currency(answer: str) -> str:
    """The number of an amount of money, which may follow its minus (``-$5``); anything else as it is."""
    number, sign = take_unit(answer.replace(r"\$", "$"))
    return number.replace(",", "") if sign not in ("", "%") and read_number(number) is not None else answer
