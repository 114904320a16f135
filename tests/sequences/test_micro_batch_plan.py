"""Planning: every example once, no micro-batch above the budget unless one example alone is."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.sequences import Example, Segment, example_cost, pack, plan_micro_batches


def row(number: int, prompt: int, *completions: int) -> Example:
    """A row whose prompt no other row has, with completions that differ."""
    children = tuple(Segment([token] * length) for token, length in enumerate(completions))
    return Example(f"rows:{number}", Segment([number] * prompt, children=children))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), max_size=20),
    st.integers(1, 40),
    st.booleans(),
)
def test_plan(sizes: list[tuple[int, int, int]], budget: int, share: bool) -> None:
    examples = [row(n, *size) for n, size in enumerate(sizes)]
    cost = [p + a + b if share else 2 * p + a + b for p, a, b in sizes]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan = plan_micro_batches(examples, budget=budget, share_prefix=share)
    assert sorted(n for micro in plan for n in micro) == list(range(len(examples)))
    assert all(sum(cost[n] for n in micro) <= budget or len(micro) == 1 for micro in plan)
    assert len(seen) == (1 if cost and max(cost) > budget else 0)
    assert [example_cost(e, share_prefix=share) for e in examples] == cost


def test_first_fit_decreasing_by_hand() -> None:
    examples = [row(n, length) for n, length in enumerate([2, 6, 3, 5, 4])]
    assert plan_micro_batches(examples, budget=10) == [[1, 4], [3, 2, 0]]


def pair(number: int, prompt: int, *completions: int) -> Example:
    children = tuple(Segment([token] * 3) for token in completions)
    return Example(f"rows:{number}", Segment([prompt] * 10, children=children))


def test_rows_of_one_prompt_come_together_and_what_they_share_counts_once() -> None:
    rows = [pair(0, 1, 7, 8), pair(1, 2, 7, 8), pair(2, 1, 7, 9), pair(3, 2, 8, 9), pair(4, 1, 8, 9)]
    assert plan_micro_batches(rows, budget=38) == [[0, 2, 4, 1, 3]]
    assert plan_micro_batches(rows, budget=19) == [[0, 2, 4], [1, 3]]
    assert plan_micro_batches(rows, budget=18) == [[0], [1], [2], [3], [4]]
    assert plan_micro_batches(rows, budget=40, share_prefix=False) == [[0], [1], [2], [3], [4]]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(4, 6)), min_size=1, max_size=12),
    st.integers(16, 60),
)
def test_what_is_planned_is_what_is_packed(sizes: list[tuple[int, int, int]], budget: int) -> None:
    rows = [pair(n, *size) for n, size in enumerate(sizes)]
    plan = plan_micro_batches(rows, budget=budget)
    assert sorted(n for micro in plan for n in micro) == list(range(len(rows)))
    assert all(pack([rows[n] for n in micro]).num_tokens <= budget for micro in plan)


def test_a_budget_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens is 0; it must be above 0"):
        plan_micro_batches([row(0, 1)], budget=0)
