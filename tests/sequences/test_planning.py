"""Planning: every example once, no micro-batch above the budget unless one example alone is."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.sequences import Example, Segment, example_cost, plan_micro_batches


def row(number: int, prompt: int, *completions: int) -> Example:
    children = tuple(Segment([1] * length) for length in completions)
    return Example(f"rows:{number}", Segment([1] * prompt, children=children))


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


def test_a_budget_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens is 0; it must be above 0"):
        plan_micro_batches([row(0, 1)], budget=0)
