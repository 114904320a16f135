"""Decisions on candidates: tests by hand and by enumeration, limits one by one, and clear refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from rlhf_lightning.evaluation import PromptResult, SampleResult, Task, TaskResult
from rlhf_lightning.self_improvement import CapabilityCriteria, decide
from rlhf_lightning.utils.option_groups import build_group


def result(rewards: Sequence[Sequence[float | None]], *, name: str = "sums", texts: Any = None) -> TaskResult:
    """A result with these rewards; each sample says its text, or the number of its prompt and itself."""
    samples = max(map(len, rewards))
    task = Task(name=name, prompts="none", num_samples=samples)
    prompts = []
    for number, row in enumerate(rewards):
        said = [texts(number, n) if texts else f"#{number} {n}" for n in range(len(row))]
        found = tuple(SampleResult(text, reward, 4, True) for text, reward in zip(said, row, strict=True))
        prompts.append(PromptResult(f"row:{number}", "?", found))
    return TaskResult("model", task, tuple(prompts), 0.0)


def single(values: Sequence[float], **given: Any) -> TaskResult:
    return result([[value] for value in values], **given)


def test_a_better_candidate_is_accepted_with_the_exact_p_value() -> None:
    """8 prompts are won, 1 is lost: P(at least 8 of 9 heads) = (9 + 1) / 512."""
    before = [0.0] * 8 + [1.0] + [1.0] * 3
    after = [1.0] * 8 + [0.0] + [1.0] * 3
    found = decide([single(before)], [single(after)])
    assert found.verdict == "accept"
    assert found.p_value == pytest.approx(10 / 512)
    assert found.difference == pytest.approx(7 / 12)
    assert found.low > 0
    assert found.reason.startswith("better than the accepted model: +0.5833")
    # Seen from the other side, it is rejected, with the probability of the other tail and the value itself.
    back = decide([single(after)], [single(before)])
    assert (back.verdict, back.difference) == ("reject", -found.difference)
    assert back.p_value == pytest.approx(1 - 10 / 512)


def test_small_falls_do_not_add_up_unseen() -> None:
    """Each fall loses 3 prompts, p = 1/8; both together 6 of 6, p = 1/64. With ``better`` the start changes nothing."""
    rounds = [[single([0.0] * lost + [1.0] * (20 - lost))] for lost in (0, 3, 6)]
    criteria = CapabilityCriteria(accept="not_worse")
    assert decide(rounds[0], rounds[1], criteria, start=rounds[0]).verdict == "accept"
    assert decide(rounds[1], rounds[2], criteria).verdict == "accept"
    found = decide(rounds[1], rounds[2], criteria, start=rounds[0])
    assert found.verdict == "reject"
    assert re.fullmatch(r"worse than the model at the start: -0.3000 \[.*\], p=0.01562", found.reason)
    # The numbers are those of the accepted model.
    assert (found.difference, found.p_value) == (pytest.approx(-0.15), pytest.approx(1 / 8))
    wide = CapabilityCriteria(accept="not_worse", threshold=0.3)
    assert decide(rounds[1], rounds[2], wide, start=rounds[0]).verdict == "accept"
    assert decide(rounds[2], rounds[1], CapabilityCriteria(level=0.2), start=rounds[0]).verdict == "accept"
    with pytest.raises(ValueError, match="results of task 'other': evaluate both on the same suite"):
        decide(rounds[1], rounds[2], criteria, start=[single([1.0] * 20, name="other")])


def test_what_is_not_certain_is_rejected_or_accepted_by_the_side_that_must_be_shown() -> None:
    before, after = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    pair = [single(before)], [single(after)]
    assert decide(*pair).verdict == "reject"
    assert decide(*pair).reason.startswith("not shown to be better")
    assert decide(*pair, CapabilityCriteria(accept="not_worse")).verdict == "accept"
    worse = [single([1.0] * 8)], [single([0.0] * 8)]
    found = decide(*worse, CapabilityCriteria(accept="not_worse"))
    assert (found.verdict, found.p_value) == ("reject", pytest.approx(1 / 256))
    assert decide(*worse, CapabilityCriteria(accept="not_worse", threshold=1.0)).verdict == "accept"


@pytest.mark.parametrize("accept", ["better", "not_worse"])
def test_of_all_signs_at_most_the_level_is_decided_against_equality(accept: Any) -> None:
    """The share of the sign patterns that are accepted (rejected) is the error rate on equal models."""
    sizes = np.array([1.0, 0.5, 0.5, 0.25, 0.75, 1.0, 0.25])
    criteria = CapabilityCriteria(level=0.1, accept=accept)
    wanted, found = "accept" if accept == "better" else "reject", 0
    patterns = list(product((-1, 1), repeat=len(sizes)))
    for signs in patterns:
        difference = sizes * np.array(signs)
        before, after = np.maximum(-difference, 0), np.maximum(difference, 0)
        rewards = [[[float(n < 4 * share) for n in range(4)] for share in side] for side in (before, after)]
        found += decide([result(rewards[0])], [result(rewards[1])], criteria).verdict == wanted
    assert 0 < found / len(patterns) <= 0.1
    # A level that is 4 times as large decides more often: the bound is not met by deciding nothing.
    assert found / len(patterns) > 0.04


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 4])
def test_false_accepts_of_equal_models_are_within_the_level(samples: int) -> None:
    """2,000 pairs of models with the same accuracy of each prompt: at most the level plus 3 standard errors."""
    generator, draws, accepted = np.random.default_rng(samples), 2000, 0
    for _ in range(draws):
        chance = generator.beta(0.5, 0.5, size=40)
        sides = (generator.random((2, 40, samples)) < chance[:, None]).astype(float).tolist()
        accepted += decide([result(sides[0])], [result(sides[1])]).verdict == "accept"
    assert accepted / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    assert accepted / draws >= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["better", "not_worse"])
@pytest.mark.parametrize(
    ("sizes", "samples", "difficulty"),
    [((12,), 1, (20.0, 1.0)), ((12,), 4, (20.0, 1.0)), ((8, 30), 1, (0.5, 0.5)), ((8, 30), 4, (1.0, 12.0))],
)
def test_errors_are_within_the_level_for_few_prompts_rates_near_the_ends_and_uneven_tasks(
    accept: Any, sizes: tuple[int, ...], samples: int, difficulty: tuple[float, float]
) -> None:
    """Of equally good models: that are accepted as better, or rejected as worse."""
    generator, draws, wrong = np.random.default_rng(samples), 2000, 0
    criteria, error = CapabilityCriteria(accept=accept), "accept" if accept == "better" else "reject"
    for _ in range(draws):
        sides: tuple[list[TaskResult], list[TaskResult]] = ([], [])
        for number, size in enumerate(sizes):
            chance = generator.beta(*difficulty, size=size)
            for side in sides:
                right = (generator.random((size, samples)) < chance[:, None]).astype(float).tolist()
                side.append(result(right, name=f"task {number}"))
        wrong += decide(*sides, criteria).verdict == error
    assert wrong / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_tasks_count_equally_whatever_their_number_of_prompts() -> None:
    before = [single([0.0] * 4, name="a"), single([1.0] * 12, name="b")]
    after = [single([1.0] * 4, name="a"), single([1.0] * 9 + [0.0] * 3, name="b")]
    found = decide(before, after)
    assert found.difference == pytest.approx((1.0 - 0.25) / 2)
    assert -1 < found.low < found.difference < found.high < 1
    # Equal models leave a doubt where there are few prompts, also in tasks of different sizes.
    same = decide(before, before)
    assert (same.difference, same.low) == (0.0, pytest.approx(-same.high))
    assert 0.1 < same.high < 0.5
    # Tasks are paired by name, prompts by row.
    assert decide(before, after[::-1]).difference == pytest.approx(found.difference)
    drop = CapabilityCriteria(max_task_drop=0.2, level=0.4)
    assert decide(before, after, drop).reason == "task 'b' falls by 0.25, more than max_task_drop=0.2"
    assert decide(before, after, CapabilityCriteria(max_task_drop=0.25, level=0.4)).verdict == "accept"


def test_prompts_without_a_verdict_in_either_are_left_out() -> None:
    found = decide([result([[1.0], [None], [0.0], [0.0]])], [result([[1.0], [1.0], [None], [1.0]])])
    assert found.difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("limits", "kl", "reason"),
    [
        ({"max_kl": 0.1}, 0.2, "its divergence from the start is 0.2 nats per token, above max_kl=0.1"),
        ({"min_length": 5}, None, "length/mean of task 'sums' is 4, below min_length=5"),
        ({"max_length": 3.5}, None, "length/mean of task 'sums' is 4, above max_length=3.5"),
        ({"min_distinct": 0.2}, None, "distinct_2 of task 'sums' is 0.0625, below min_distinct=0.2"),
        ({"min_unique_answers": 0.6}, None, "unique_answers of task 'sums' is 0.5, below min_unique_answers=0.6"),
    ],
)
def test_each_limit_rejects_a_candidate_that_is_better(limits: dict[str, Any], kl: Any, reason: str) -> None:
    before, after = [[0.0, 0.0]] * 8, [[1.0, 1.0]] * 8
    texts = lambda number, n: "#1 1"  # noqa: E731
    pair = [result(before)], [result(after, texts=texts)]
    assert decide(*pair).verdict == "accept"
    found = decide(*pair, CapabilityCriteria(**limits), kl=kl)
    assert (found.verdict, found.reason) == ("reject", reason)
    wide = {"max_kl": 0.3, "min_length": 4, "max_length": 4, "min_distinct": 0.0625, "min_unique_answers": 0.5}
    assert decide(*pair, CapabilityCriteria(**wide), kl=kl or 0.0).verdict == "accept"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_accuracy": 0.76}, "accuracy of task 'b' is 0.75, below min_accuracy=0.76"),
        ({"max_memory_gb": 0.0021}, "its weights take 0.0022 GB, above max_memory_gb=0.0021"),
        (
            {"max_memory_gb": 0.0021, "cache_tokens": 8},
            "its weights and 8 tokens in its cache take 0.0022 GB, above max_memory_gb=0.0021",
        ),
        ({"max_token_ms": 11.9}, "a token of task 'b' takes 12 ms, above max_token_ms=11.9"),
    ],
)
def test_what_is_better_and_too_weak_too_large_or_too_slow_is_rejected(limits: dict[str, Any], reason: str) -> None:
    """Of two tasks the worse one decides; a limit may be reached; the accepted model may be slower than that."""
    before = [replace(single([0.0] * 8, name=name), token_seconds=9.0) for name in "ab"]
    after = [
        replace(single([1.0] * 8, name="a"), token_seconds=0.004),
        replace(single([1.0] * 6 + [0.0] * 2, name="b"), token_seconds=0.012),
    ]
    found = decide(before, after, CapabilityCriteria(**limits), memory_gb=0.0022)
    assert (found.verdict, found.reason) == ("reject", reason)
    at = {"min_accuracy": 0.75, "max_memory_gb": 0.0022, "max_token_ms": 12.0}
    found = decide(before, after, CapabilityCriteria(**at), memory_gb=0.0022)
    assert (found.verdict, found.memory_gb, found.token_ms) == ("accept", 0.0022, 12.0)
    # Without limits there are no measurements in the record, which is the same on every machine.
    assert not {"memory_gb", "token_ms"} & decide(before, after).as_dict().keys()


def test_patience_and_stop() -> None:
    pair = [single([1.0] * 8)], [single([0.0] * 8)]
    verdicts = [decide(*pair, CapabilityCriteria(patience=2), num_rejected=n).verdict for n in range(3)]
    assert verdicts == ["reject", "stop", "stop"]
    assert decide(*pair, CapabilityCriteria(on_reject="stop")).verdict == "stop"


def test_refusals() -> None:
    one = [single([1.0, 0.0, 1.0])]
    with pytest.raises(ValueError, match=r"^there are no results to decide on: evaluate both models on a suite"):
        decide([], [])
    with pytest.raises(ValueError, match=r"^only one of the two models has results of task 'b': evaluate both on"):
        decide(one, [*one, single([1.0, 0.0], name="b")])
    with pytest.raises(ValueError, match=r"^the candidate has two results of task 'sums': give one per task"):
        decide(one, one * 2)
    with pytest.raises(ValueError, match=r"^both models have verdicts for 1 prompts of task 'sums' in common"):
        decide(one, [result([[1.0], [None], [None]])])
    with pytest.raises(ValueError, match=r"^criteria.max_kl is 1.0, and no divergence was measured: give kl$"):
        decide(one, one, CapabilityCriteria(max_kl=1.0))
    with pytest.raises(ValueError, match=r"^criteria.max_memory_gb is 1.0, and no size is known: give memory_gb$"):
        decide(one, one, CapabilityCriteria(max_memory_gb=1.0))
    with pytest.raises(ValueError, match=r"^criteria.max_token_ms is given, and no result tells how long its tokens"):
        decide(one, one, CapabilityCriteria(max_token_ms=1.0))
    with pytest.raises(ValueError, match=r"^criteria.min_unique_answers is 0.5, and no task measures unique_answers"):
        decide(one, one, CapabilityCriteria(min_unique_answers=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.5}, r"criteria.level is 0.5; it must be in \(0, 0.5\) \(0.05 is usual\)"),
        ({"threshold": -0.1}, r"criteria.threshold is -0.1; it must be at least 0"),
        ({"patience": 0}, r"criteria.patience is 0; it must be a whole number of at least 1"),
        ({"max_kl": 0.0}, r"criteria.max_kl is 0.0; it must be above 0"),
        ({"min_accuracy": 50}, r"criteria.min_accuracy is 50; it must be in \[0, 1\]"),
        ({"cache_tokens": 0, "max_memory_gb": 1}, r"criteria.cache_tokens is 0; it must be a whole number of at least"),
        ({"cache_tokens": 9}, r"criteria.cache_tokens is 9, and nothing limits memory: give max_memory_gb, too"),
        ({"max_memory_gb": 0}, r"criteria.max_memory_gb is 0; it must be above 0"),
        ({"max_token_ms": -1.0}, r"criteria.max_token_ms is -1.0; it must be above 0"),
        ({"min_distinct": 1.5}, r"criteria.min_distinct is 1.5; it must be in \[0, 1\]"),
        ({"max_length": 2.0, "min_length": 3.0}, r"criteria.max_length is 2.0, below min_length=3.0"),
        ({"on_reject": "retry"}, r"criteria.on_reject is 'retry'; it must be one of smaller_step, new_seed, stop"),
        ({"levle": 0.1}, r"criteria has no option 'levle'; did you mean 'level'\?"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_group(options, CapabilityCriteria)


def test_a_candidate_that_has_collapsed_is_rejected() -> None:
    """Its answers have no bigram; whether all tasks have collapsed or one of two, and whatever it scores."""
    criteria = CapabilityCriteria(min_distinct=0.05, accept="not_worse")
    for text in ("", "yes"):
        good = [single([0.0] * 8, name=name, texts=lambda *_: "some words here") for name in "ab"]
        flat = [single([1.0] * 8, name=name, texts=lambda *_, text=text: text) for name in "ab"]
        assert decide(good, good, criteria).verdict == "accept"
        for candidate, worst in (([good[0], flat[1]], "b"), (flat, "a")):
            found = decide(good, candidate, criteria)
            assert (found.verdict, found.reason) == (
                "reject",
                f"distinct_2 of task '{worst}' is 0, below min_distinct=0.05",
            )
        # A task whose right answers are single words from the start measures nothing, and limits nothing.
        assert decide([good[0], flat[1]], [good[0], flat[1]], criteria).verdict == "accept"
        with pytest.raises(ValueError, match=r"no task measures distinct_2: its answers have too few words$"):
            decide(flat, flat, criteria)


def test_a_divergence_that_is_not_a_number_is_a_rejection() -> None:
    one, criteria = [single([1.0, 0.0, 1.0])], CapabilityCriteria(max_kl=1.0, accept="not_worse")
    assert decide(one, one, criteria, kl=0.5).verdict == "accept"
    for kl, reason in ((math.nan, "is not a number"), (math.inf, "is inf nats per token, above max_kl=1.0")):
        found = decide(one, one, criteria, kl=kl)
        assert found.verdict == "reject"
        assert found.reason.startswith(f"its divergence from the start {reason}")
