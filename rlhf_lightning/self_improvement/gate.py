"""Decides by a paired test whether a candidate model replaces the accepted one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ..evaluation import TaskResult
from ..metrics.intervals import Comparison, mcnemar, paired_bootstrap
from ..utils.option_groups import OptionGroup
from ..utils.validation import check_count, check_not_negative, check_positive
from .findings import Validation

OnReject = Literal["smaller_step", "new_seed", "stop"]
Verdict = Literal["accept", "reject", "stop"]


@dataclass(frozen=True, kw_only=True)
class CapabilityCriteria(OptionGroup):
    """Criteria by which a candidate is accepted.

    Scores are the shares of right samples of each prompt. The p-value is one-sided: of the sign-flip test of paired
    differences, and of McNemar's exact test where every prompt is right or wrong. Both hold their level for any
    distribution of scores, in each decision; over many decisions on the same prompts, errors add up.

    Args:
        accept: ``better`` accepts a candidate that is shown to be better, so that of candidates that are equally good
            at most ``level`` are accepted; ``not_worse`` accepts one that is not shown to be worse, so that of these
            at most ``level`` are rejected in each of two tests: against the accepted model, and against the model at
            the start, so that small falls do not add up unseen.
        threshold: also needed of the difference, at least 0: above it for ``better``; for ``not_worse``, falls of up
            to this are accepted even where they are certain.
        level: of the test, in (0, 0.5).
        max_task_drop: largest fall of the mean score of any single task, at least 0; unlimited if omitted.
        min_accuracy: least accuracy of each task, in [0, 1]; 0 is off. A candidate below is rejected, also where it
            is better than the accepted model.
        max_memory_gb: largest size of the weights in memory, above 0, in units of 10^9 bytes: of all parameters and
            buffers in the type that they are loaded in, tied ones once. Unlimited if omitted.
        cache_tokens: number of tokens whose keys and values count as memory as well, at least 1: of all requests that
            are answered at a time. Those of no token if omitted.
        max_token_ms: largest number of milliseconds per sampled token, above 0, for each task: the median over batches
            of up to 64 of its prompts, answered together, verification left out. It is measured, and another machine,
            or the same one under load, may decide otherwise; unlimited if omitted.
        max_kl: largest drift from the model at the start, above 0, in nats per token: KL(candidate || start) on samples
            that the candidate draws, as in the penalty of RLHF (Ouyang et al., 2022, arXiv:2203.02155); stages sum it
            over the vocabulary, the callback estimates it by the sampled tokens. Not measured if omitted.
        min_distinct: least ``distinct_2`` of each task, in [0, 1]; 0 is off.
        min_unique_answers: least share of unique answers to a prompt of each task with several samples, in [0, 1].
        min_length: least mean number of tokens of each task's answers, at least 0.
        max_length: largest mean number, above 0; unlimited if omitted.
        patience: rejections in succession until the run stops, at least 1.
        on_reject: continue from the accepted model with a smaller step (``smaller_step``) or other samples
            (``new_seed``), or ``stop``.

    Raises:
        TypeError: an option of another type.
        ValueError: an option out of its range.

    Example:
        >>> CapabilityCriteria(level=0.01, on_reject="stop").accept
        'better'
    """

    group: ClassVar[str] = "criteria"

    accept: Literal["better", "not_worse"] = "better"
    threshold: float = 0.0
    level: float = 0.05
    max_task_drop: float | None = None
    min_accuracy: float = 0.0
    max_memory_gb: float | None = None
    cache_tokens: int | None = None
    max_token_ms: float | None = None
    max_kl: float | None = None
    min_distinct: float = 0.0
    min_unique_answers: float = 0.0
    min_length: float = 0.0
    max_length: float | None = None
    patience: int = 3
    on_reject: OnReject = "smaller_step"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.full_name
        if not 0 < self.level < 0.5:
            raise ValueError(f"{name('level')} is {self.level!r}; it must be in (0, 0.5) (0.05 is usual)")
        for key in ("min_accuracy", "min_distinct", "min_unique_answers"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{name(key)} is {getattr(self, key)!r}; it must be in [0, 1] (0 is off)")
        check_not_negative(name("threshold"), self.threshold, "0 accepts any difference that is significant")
        check_not_negative(name("min_length"), self.min_length, "0 is off")
        if self.max_task_drop is not None:
            check_not_negative(name("max_task_drop"), self.max_task_drop, "null is off")
        for key in ("max_memory_gb", "max_token_ms", "max_kl", "max_length"):
            if getattr(self, key) is not None:
                check_positive(name(key), getattr(self, key), "null is off")
        if self.cache_tokens is not None:
            check_count(name("cache_tokens"), self.cache_tokens, "null counts the weights alone")
            if self.max_memory_gb is None:
                raise ValueError(
                    f"{name('cache_tokens')} is {self.cache_tokens}, and nothing limits memory: give max_memory_gb, too"
                )
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"{name('max_length')} is {self.max_length!r}, below min_length={self.min_length!r}: no answer would "
                "be accepted; raise it"
            )
        check_count(name("patience"), self.patience, "3 is usual")


if TYPE_CHECKING:
    CriteriaSource: TypeAlias = CapabilityCriteria | dict[str, Any] | None
else:
    # Without classes: the command line would parse a file as the arguments of the class.
    CriteriaSource = dict[str, Any] | None


@dataclass(frozen=True)
class Decision:
    """A decision on a candidate.

    Attributes:
        verdict: ``accept``; ``reject``; ``stop`` for a rejection that ends the run.
        reason: the criterion that decided, in words.
        difference: the candidate's mean score less that of the accepted model, mean over tasks.
        low: lower end of its confidence interval of level ``1 - 2 * level``.
        high: upper end.
        p_value: one-sided, of a difference at least as large (for ``not_worse``: as small) if both were equally good.
        kl: KL(candidate || start) in nats per token, where it was measured.
        memory_gb: size of the candidate's weights, and of the keys and values of ``cache_tokens``, in units of 10^9
            bytes, where it is limited.
        token_ms: milliseconds per sampled token of the task that takes most, where they are limited.
        validation: findings of an ``AdversarialValidator``, where one was asked.

    Example:
        >>> Decision("accept", "better", difference=0.1, low=0.02, high=0.18, p_value=0.01).as_dict()["verdict"]
        'accept'
    """

    verdict: Verdict
    reason: str
    difference: float
    low: float
    high: float
    p_value: float
    kl: float | None = None
    memory_gb: float | None = None
    token_ms: float | None = None
    validation: Validation | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values; those of size, speed and validation only if there are some."""
        found = asdict(self) | {"validation": self.validation and self.validation.as_dict()}
        rare = ("memory_gb", "token_ms", "validation")
        return {name: value for name, value in found.items() if name not in rare or value is not None}


def decide(
    accepted: Sequence[TaskResult],
    candidate: Sequence[TaskResult],
    criteria: CapabilityCriteria | None = None,
    *,
    start: Sequence[TaskResult] | None = None,
    kl: float | None = None,
    memory_gb: float | None = None,
    num_rejected: int = 0,
    seed: int = 0,
) -> Decision:
    r"""Decides whether a candidate replaces the accepted model.

    The statistic is the mean over tasks :math:`\frac1T \sum_t \frac1{n_t} \sum_i (c_{ti} - a_{ti})` of the paired
    differences on the :math:`n_t` prompts for which both have a verdict. If both models are equally good, the sign of
    each difference is equally likely to be either, which gives the p-value (Fisher, 1935).

    A limited metric that only the accepted model has, such as ``distinct_2`` where answers have become single words,
    counts as 0; a divergence that is not a number is a rejection.

    Args:
        accepted: results of the accepted model, one per task.
        candidate: results of the candidate, on the same tasks and prompts.
        criteria: by default those of ``CapabilityCriteria()``.
        start: results of the model at the start; with ``not_worse`` the candidate is tested against them, too.
        kl: KL(candidate || start) on the candidate's samples, in nats per token; needed with ``max_kl``.
        memory_gb: size of the candidate in units of 10^9 bytes; needed with ``max_memory_gb``.
        num_rejected: rejections in succession before this one, at least 0.
        seed: of the resamples.

    Raises:
        ValueError: no results, different tasks, fewer than two prompts in common, or a criterion that nothing measures.

    Example::

        before = [run_task(task, engine) for task in suite.tasks]
        ...
        print(decide(before, [run_task(task, engine) for task in suite.tasks]).reason)
    """
    criteria = criteria or CapabilityCriteria()
    pairs = _paired_tasks(accepted, candidate)
    scores = [_paired_scores(*pair) for pair in pairs]
    compared, p_value = _test(scores, criteria, seed)
    token_ms = None if criteria.max_token_ms is None else _token_ms([after for _, after in pairs])
    reason = _too_large_or_slow(criteria, memory_gb, token_ms) or _exceeded(pairs, scores, criteria, kl)
    ok = reason is None
    if reason is None:
        ok, reason = _verdict(compared, p_value, criteria)
        reason += "" if any(before != after for before, after in scores) else "; no prompt differs"
    if ok and criteria.accept == "not_worse" and start is not None and start is not accepted:
        from_start = [_paired_scores(*pair) for pair in _paired_tasks(start, candidate, "model at the start")]
        ok, found_since = _verdict(*_test(from_start, criteria, seed), criteria, "model at the start")
        reason = reason if ok else found_since
    verdict = "accept" if ok else _refusal(criteria, num_rejected)
    found = compared.difference, compared.low, compared.high, p_value, kl
    return Decision(verdict, reason, *found, memory_gb=memory_gb, token_ms=None if token_ms is None else token_ms[0])


def overruled(
    decision: Decision, validation: Validation, criteria: CapabilityCriteria, *, num_rejected: int = 0
) -> Decision:
    """Adds what an adversarial validator has found in a candidate, and rejects one in which a check does not pass.

    Args:
        decision: of the paired test.
        validation: of the same candidate.
        criteria: those of the decision.
        num_rejected: rejections in succession before this one, at least 0.

    Example:
        >>> from rlhf_lightning.self_improvement import Finding
        >>> accepted = Decision("accept", "better than the accepted model", 0.1, 0.05, 0.15, 0.01)
        >>> flaw = Finding("robustness", 0.3, 0.2, 0.4, 0.1, passed=False, detail="accuracy falls by 30.0% with typos")
        >>> overruled(accepted, Validation((flaw,)), CapabilityCriteria()).reason
        'robustness: accuracy falls by 30.0% with typos'
    """
    if validation.passed or decision.verdict != "accept":
        return replace(decision, validation=validation)
    verdict = _refusal(criteria, num_rejected)
    return replace(decision, verdict=verdict, reason=validation.reason, validation=validation)


def _refusal(criteria: CapabilityCriteria, num_rejected: int) -> Verdict:
    ends = criteria.on_reject == "stop" or num_rejected + 1 >= criteria.patience
    return "stop" if ends else "reject"


def check_criteria(results: Sequence[TaskResult], criteria: CapabilityCriteria) -> None:
    """Refuses criteria that results like these cannot be compared by, before anything is trained.

    Raises:
        ValueError: as ``decide`` does.
    """
    decide(results, results, criteria, kl=0.0, memory_gb=0.0)


def _paired_tasks(
    accepted: Sequence[TaskResult], candidate: Sequence[TaskResult], other: str = "accepted model"
) -> list[tuple[TaskResult, TaskResult]]:
    names = [[result.task.name for result in results] for results in (accepted, candidate)]
    if not names[0] and not names[1]:
        raise ValueError("there are no results to decide on: evaluate both models on a suite with at least one task")
    for of, given in zip((other, "candidate"), names, strict=True):
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"the {of} has two results of task {twice[0]!r}: give one per task")
    if wrong := sorted(set(names[0]) ^ set(names[1])):
        raise ValueError(
            f"only one of the two models has results of task {wrong[0]!r}: evaluate both on the same suite"
        )
    by_name = {result.task.name: result for result in candidate}
    return [(result, by_name[result.task.name]) for result in accepted]


def _paired_scores(before: TaskResult, after: TaskResult) -> tuple[list[float], list[float]]:
    rows = [row for row in before.scores if row in after.scores]
    if len(rows) < 2:
        raise ValueError(
            f"both models have verdicts for {len(rows)} prompts of task {before.task.name!r} in common: a paired test "
            "needs at least two of the same prompts"
        )
    return [before.scores[row] for row in rows], [after.scores[row] for row in rows]


def _test(
    scores: Sequence[tuple[list[float], list[float]]], criteria: CapabilityCriteria, seed: int
) -> tuple[Comparison, float]:
    """Compares both models; returns the interval and the one-sided p-value in the direction that decides."""
    # Weights that make the mean over all prompts that over tasks.
    count = sum(len(before) for before, _ in scores)
    weights = [count / (len(scores) * len(before)) for before, _ in scores for _ in before]
    # At most 1, so that scores stay shares, whose interval suits few prompts as well.
    largest = max(weights)
    weights = [weight / largest for weight in weights]
    ours = [w * score for w, score in zip(weights, (s for _, after in scores for s in after), strict=True)]
    theirs = [w * score for w, score in zip(weights, (s for before, _ in scores for s in before), strict=True)]
    found = paired_bootstrap(ours, theirs, level=1 - 2 * criteria.level, seed=seed)
    low, high = max(-1.0, largest * found.low), min(1.0, largest * found.high)
    compared = Comparison(largest * found.difference, low, high, found.p_value)

    # The exact test, where it applies.
    flat = [score for pair in scores for side in pair for score in side]
    two_sided = compared.p_value
    if all(weight == 1.0 for weight in weights) and all(score in (0.0, 1.0) for score in flat):
        two_sided = mcnemar([score == 1 for score in ours], [score == 1 for score in theirs])

    # Under equality both signs of a difference are equally likely: either side has half of the two-sided probability.
    sign = 1 if criteria.accept == "better" else -1
    return compared, two_sided / 2 if sign * compared.difference > 0 else 1 - two_sided / 2


def _verdict(
    compared: Comparison, p_value: float, criteria: CapabilityCriteria, other: str = "accepted model"
) -> tuple[bool, str]:
    found = f"{compared.difference:+.4f} [{compared.low:+.4f}, {compared.high:+.4f}], p={p_value:.4g}"
    is_certain = p_value <= criteria.level
    if criteria.accept == "not_worse":
        worse = is_certain and -compared.difference > criteria.threshold
        return not worse, f"{'worse' if worse else 'not shown to be worse'} than the {other}: {found}"
    if is_certain and compared.difference > criteria.threshold:
        return True, f"better than the {other}: {found}"
    if is_certain:
        return False, f"better by no more than threshold={criteria.threshold}: {found}"
    return False, f"not shown to be better than the {other}: {found}"


def _token_ms(results: Sequence[TaskResult]) -> tuple[float, str]:
    """Returns the most milliseconds per sampled token of any task that samples, and its name."""
    found = [(1e3 * r.token_seconds, r.task.name) for r in results if r.token_seconds is not None]
    if not found:
        raise ValueError(
            "criteria.max_token_ms is given, and no result tells how long its tokens took: give a task of prompts that "
            "a model answers, or leave it out"
        )
    return max(found)


def _too_large_or_slow(
    criteria: CapabilityCriteria, memory_gb: float | None, token_ms: tuple[float, str] | None
) -> str | None:
    gigabytes, milliseconds = criteria.max_memory_gb, criteria.max_token_ms
    if gigabytes is not None:
        if memory_gb is None:
            raise ValueError(f"criteria.max_memory_gb is {gigabytes}, and no size is known: give memory_gb")
        if memory_gb > gigabytes:
            cached = f" and {criteria.cache_tokens} tokens in its cache" if criteria.cache_tokens else ""
            return f"its weights{cached} take {memory_gb:.4g} GB, above max_memory_gb={gigabytes}"
    if milliseconds is not None and token_ms is not None and token_ms[0] > milliseconds:
        return f"a token of task {token_ms[1]!r} takes {token_ms[0]:.4g} ms, above max_token_ms={milliseconds}"
    return None


def _exceeded(
    pairs: Sequence[tuple[TaskResult, TaskResult]],
    scores: Sequence[tuple[list[float], list[float]]],
    criteria: CapabilityCriteria,
    kl: float | None,
) -> str | None:
    """Returns the first limit that the candidate violates, in words."""
    if criteria.max_kl is not None:
        if kl is None:
            raise ValueError(f"criteria.max_kl is {criteria.max_kl}, and no divergence was measured: give kl")
        if math.isnan(kl):
            return "its divergence from the start is not a number: its log-probabilities are not finite"
        if kl > criteria.max_kl:
            return f"its divergence from the start is {kl:.4g} nats per token, above max_kl={criteria.max_kl}"
    for (result, _), (before, after) in zip(pairs, scores, strict=True):
        drop = fmean(before) - fmean(after)
        if criteria.max_task_drop is not None and drop > criteria.max_task_drop + 1e-12:
            return f"task {result.task.name!r} falls by {drop:.4g}, more than max_task_drop={criteria.max_task_drop}"
    limits = (
        ("accuracy", "min_accuracy", criteria.min_accuracy, 1),
        ("distinct_2", "min_distinct", criteria.min_distinct, 1),
        ("unique_answers", "min_unique_answers", criteria.min_unique_answers, 1),
        ("length/mean", "min_length", criteria.min_length, 1),
        ("length/mean", "max_length", criteria.max_length, -1),
    )
    for metric, name, limit, side in limits:
        if limit is None or (side == 1 and limit == 0):
            continue
        # A candidate that has collapsed to empty answers or single words has no bigram, where the accepted model has.
        values = [
            (after.task.name, after.metrics.get(metric, 0.0))
            for before, after in pairs
            if metric in before.metrics or metric in after.metrics
        ]
        if not values:
            raise ValueError(
                f"criteria.{name} is {limit}, and no task measures {metric}"
                + (": set num_samples above 1" if metric == "unique_answers" else ": its answers have too few words")
            )
        task, worst = min(values, key=lambda pair: side * pair[1])
        if side * (worst - limit) < 0:
            return f"{metric} of task {task!r} is {worst:.4g}, {'below' if side == 1 else 'above'} {name}={limit}"
    return None
