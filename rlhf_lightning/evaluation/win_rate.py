"""Win rates of two models' answers to the same prompts, by rewards or by a judge that sees both orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.messages import as_lines
from ..metrics.intervals import share_interval
from ..metrics.preferences import length_controlled_win_rate
from ..rewards.exact_answer import check_verdicts
from ..rewards.judges import Judge, resolve_judge
from ..utils.messages import did_you_mean
from ..utils.validation import check_choice, check_fraction, check_not_negative, check_same_length

QUESTION = """\
Two answers to the same request are given. Is answer 1 better than answer 2?

Request:
{prompt}

Answer 1:
{first}

Answer 2:
{second}

Reply with yes or no."""


class UndecidedError(ValueError):
    """Too few prompts have a verdict for a win rate."""


@dataclass(frozen=True)
class WinRate:
    """How often the first model's answers win.

    Attributes:
        value: wins and half of the ties, as a share of all that were decided.
        low: lower end of the 95 % interval.
        high: upper end.
        wins: number of prompts that the first model won.
        ties: neither did.
        losses: the second did.
        undecided: prompts without a verdict, which count for nothing.
        length_controlled: the rate at equal lengths, see ``length_controlled_win_rate``.
        consistent: share of prompts on which a judge prefers the same answer in both orders; ``None`` for rewards.

    Example:
        >>> rate = WinRate(0.75, 0.6, 0.9, wins=14, ties=2, losses=4, undecided=0, length_controlled=0.7)
        >>> (rate.wins + rate.ties / 2) / (rate.wins + rate.ties + rate.losses) == rate.value
        True
    """

    value: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    undecided: int
    length_controlled: float
    consistent: float | None = None


def win_rate(
    prompts: Sequence[Any],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    *,
    reward: Callable[..., Sequence[float | None]] | None = None,
    judge: Judge | None = None,
    question: str = QUESTION,
    tie_margin: float | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> WinRate:
    """Compares two models' answers prompt by prompt.

    With ``reward``, an answer wins whose reward is higher by more than the margin. With ``judge``, each pair is asked
    in both orders, as judges favour a place: the preference is the mean of p(first is better) and 1 - p(second is
    better), and an answer wins if it is above 1/2 by more than the margin. Equal texts tie without being asked.

    Args:
        prompts: texts or messages.
        answers_a: the first model's answers.
        answers_b: the second's, to the same prompts.
        reward: a reward function or verifier, called as ``fn(prompts, completions, **columns)``.
        judge: answers yes-or-no questions, such as ``rewards.judges.ModelJudge``; instead of ``reward``.
        question: what a judge is asked, with the places ``{prompt}``, ``{first}`` and ``{second}``.
        tie_margin: largest difference that is a tie; by default 0 for rewards, and 0.05 around 1/2 for judges.
        columns: further columns of the prompts, for ``reward``.

    Raises:
        ValueError: lists of different lengths, not one of ``reward`` and ``judge``, a margin out of its range, a
            question without a place, or fewer than two decided prompts.

    Example:
        >>> longer = lambda prompts, completions: [float(len(text)) for text in completions]
        >>> found = win_rate(["a", "b", "c"], ["xx", "y", "zz"], ["x", "y", "zzz"], reward=longer)
        >>> found.value, found.wins, found.ties, found.losses
        (0.5, 1, 1, 1)
    """
    check_same_length(prompts=prompts, answers_a=answers_a, answers_b=answers_b, **(columns or {}))
    if (reward is None) == (judge is None):
        raise ValueError("give one of reward and judge: a function that scores answers, or a judge that compares them")
    margin = _margin(tie_margin, of_judge=judge is not None)
    if judge is None:
        assert reward is not None
        differences = _reward_differences(reward, prompts, answers_a, answers_b, columns or {})
        return rate_of(differences, answers_a, answers_b, margin)
    differences, consistent = _judged(judge, question, prompts, answers_a, answers_b)
    return rate_of(differences, answers_a, answers_b, margin, consistent)


def rate_of(
    differences: Sequence[float | None],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    margin: float = 0.0,
    consistent: float | None = None,
) -> WinRate:
    """Computes the win rate of differences that are known.

    Args:
        differences: of each prompt, the first answer's reward less the second's, or a judge's preference less 1/2;
            ``None`` without a verdict.
        answers_a: the first model's answers, whose lengths are controlled for.
        answers_b: the second's.
        margin: largest difference that is a tie.
        consistent: share of prompts on which a judge prefers the same answer in both orders.

    Raises:
        UndecidedError: fewer than two decided prompts.

    Example:
        >>> rate_of([0.5, 0.0, None, -1.0, 2.0], list("abcde"), list("fghij")).value
        0.625
    """
    # Undecided comparisons are neither wins nor losses.
    decided = [n for n, difference in enumerate(differences) if difference is not None]
    if len(decided) < 2:
        raise UndecidedError(
            f"{len(decided)} of {len(differences)} prompts have a verdict: a win rate needs at least two"
        )
    outcomes = [_outcome(differences[n] or 0.0, margin) for n in decided]
    lengths = [float(len(answers_a[n]) - len(answers_b[n])) for n in decided]
    interval = share_interval(len(outcomes), sum(outcomes), sum(outcome * outcome for outcome in outcomes))
    return WinRate(
        interval.value,
        interval.low,
        interval.high,
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        undecided=len(differences) - len(decided),
        length_controlled=length_controlled_win_rate(outcomes, lengths),
        consistent=consistent,
    )


@dataclass(frozen=True)
class WinOptions:
    """Options of a task's win rates against the first model, by the first answer to each prompt.

    Args:
        by: ``reward``: the verifier's rewards; ``score``: those of the task's scorer, such as a reward model.
        judge: is asked instead: a model's folder, or ``class_path`` and ``init_args``, such as of
            ``rlhf_lightning.rewards.EngineJudge``. It sees each pair in both orders.
        question: what it is asked; see :func:`win_rate`.
        tie_margin: see :func:`win_rate`.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> WinOptions.read("score").by, WinOptions.read({"judge": "runs/judge/model"}).judge
        ('score', 'runs/judge/model')
    """

    by: str = "reward"
    judge: str | dict[str, Any] | None = None
    question: str = QUESTION
    tie_margin: float | None = None

    def __post_init__(self) -> None:
        check_choice("win_rate.by", self.by, ("reward", "score"))
        if self.judge is not None and self.by != "reward":
            raise ValueError(f"win_rate.by is {self.by!r}, and a judge is given: leave one of them out")
        _check_question(self.question)
        _ = self.margin

    @property
    def margin(self) -> float:
        """The largest difference that is a tie."""
        return _margin(self.tie_margin, of_judge=self.judge is not None)

    @classmethod
    def read(cls, written: Any) -> WinOptions:
        """Makes the options of a mapping, or of ``reward`` or ``score`` alone."""
        if isinstance(written, str):
            return cls(written)
        if not isinstance(written, Mapping):
            raise ValueError(f"win_rate is {written!r}: write reward, score, or a mapping with judge")
        for key in written:
            if key not in cls.__dataclass_fields__:
                raise ValueError(f"win_rate has no key {key!r}{did_you_mean(str(key), list(cls.__dataclass_fields__))}")
        return cls(**written)

    def build_judge(self) -> Judge | None:
        """Loads the judge, if there is one."""
        return None if self.judge is None else resolve_judge(self.judge)


def _margin(tie_margin: float | None, *, of_judge: bool) -> float:
    if of_judge:
        margin = 0.05 if tie_margin is None else tie_margin
        check_fraction("tie_margin", margin, "0.05 is usual")
    else:
        margin = 0.0 if tie_margin is None else tie_margin
        check_not_negative("tie_margin", margin, "0 counts only equal rewards as ties")
    return margin


def _check_question(question: str) -> None:
    missing = [place for place in ("{prompt}", "{first}", "{second}") if place not in question]
    if missing:
        raise ValueError(f"the question has no {missing[0]}: write where the judge reads it")


def _outcome(difference: float, margin: float) -> float:
    return 0.5 if abs(difference) <= margin else float(difference > 0)


def _reward_differences(
    reward: Callable[..., Sequence[float | None]],
    prompts: Sequence[Any],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    ours, theirs = (
        check_verdicts(reward(list(prompts), list(answers), **columns), len(prompts))
        for answers in (answers_a, answers_b)
    )
    return [None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)]


def _judged(
    judge: Judge, question: str, prompts: Sequence[Any], answers_a: Sequence[str], answers_b: Sequence[str]
) -> tuple[list[float | None], float | None]:
    """Returns preferences less 1/2, and the share of prompts with the same preference in both orders."""
    _check_question(question)
    asked = [n for n in range(len(prompts)) if answers_a[n] != answers_b[n]]
    texts = [_filled(question, prompts[n], *pair) for n in asked for pair in _orders(answers_a[n], answers_b[n])]
    verdicts = list(judge(texts)) if texts else []
    if len(verdicts) != len(texts):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(texts)} questions: return one for each")
    found: list[float | None] = [0.0] * len(prompts)
    agreeing = []
    for place, n in enumerate(asked):
        first, second = (_number(verdict) for verdict in verdicts[2 * place : 2 * place + 2])
        if first is None or second is None:
            found[n] = None
            continue
        found[n] = (first + 1 - second) / 2 - 0.5
        agreeing.append((first > 0.5) == (second < 0.5))
    return found, sum(agreeing) / len(agreeing) if agreeing else None


def _orders(a: str, b: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (a, b), (b, a)


def _filled(question: str, prompt: Any, first: str, second: str) -> str:
    # Not by str.format: answers may hold braces, and so may the rest of the question.
    text = prompt if isinstance(prompt, str) else as_lines(prompt)
    parts = {"{prompt}": text, "{first}": first, "{second}": second}
    found, rest = "", question
    while rest:
        places = [(rest.find(name), name) for name in parts if name in rest]
        if not places:
            return found + rest
        start, name = min(places)
        found, rest = found + rest[:start] + parts[name], rest[start + len(name) :]
    return found


def _number(verdict: Any) -> float | None:
    """Returns a verdict as a number in [0, 1]; ``None`` for an exception or anything else."""
    if verdict is None or isinstance(verdict, Exception | bool | str):
        return None
    try:
        value = float(verdict)
    except (TypeError, ValueError):  # a list, or an array of several
        return None
    return value if 0 <= value <= 1 else None
