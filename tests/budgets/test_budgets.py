"""The cost of a step on a GPU stays within its limits; and the trace counts what a card would do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_lightning.utils.transfer import to_device, to_host

from .measure import costs, decoding_with
from .table import GROUPS
from .trace import Trace, traced_cuda

SLOW_GROUPS = ("paged cache", "int8 cache")


@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=[pytest.mark.slow] * (group in SLOW_GROUPS)) for group in GROUPS]
)
def test_costs_stay_within_their_limits(group: str) -> None:
    found = {budget.what: (budget.count(), budget.limit) for budget in GROUPS[group]()}
    assert found
    assert {what: pair for what, pair in found.items() if pair[0] > pair[1]} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copies", "of_step", "waits"),
    [
        ("dpo-rpo", 1, 0, 1),
        ("dpo-ld-wpo", 1, 0, 1),
        ("dpo-turns", 1, 0, 1),
        ("simpo-alphapo", 1, 0, 1),
        ("kto-apo", 1, 0, 1),
        ("reward-ensemble", 1, 0, 1),
        ("reward-ratings", 1, 0, 1),
        ("process-tokens", 2, 0, 1),
        ("grpo-coupled", 2, 0, 2),
        ("grpo-gdpo", 3, 0, 3),  # two steps on the same trees
        ("grpo-steps", 1, 0, 1),
        ("ppo-whitened", 4, 0, 3),  # two steps, a micro-batch more in each
        # Rows of the whole batch are scored, read, and their slopes copied back.
        ("dpo-coupled", 1, 1, 2),
    ],
)
def test_no_variant_waits_within_a_micro_batch(name: str, copies: int, of_step: int, waits: int) -> None:
    cost = costs(name)
    assert cost.micro_batch.waits == {}
    assert cost.micro_batch.totals["uploads"] == copies
    assert (cost.step.totals["uploads"], cost.step.totals["waits"]) == (of_step, waits)


def test_the_trace_tells_steps_of_other_shapes_apart() -> None:
    # Keys of the dynamic cache become longer with every token.
    assert any(shape.startswith("attention ") for shape in decoding_with("dynamic").new_shapes)


def counted(run: object) -> Trace:
    assert callable(run)
    with traced_cuda() as tracer:
        run(tracer)
        return tracer.take()


def test_the_trace_counts_operators_and_no_views() -> None:
    def run(tracer: object) -> None:
        values = torch.zeros(2, 3, device="cuda")  # 1
        row = values.T[0].view(1, 2).detach()
        empty = torch.empty_like(row)
        assert torch.equal(empty.copy_(row + 1).cpu(), torch.ones(1, 2))  # 2

    assert counted(run).operators == {"zeros": 1, "add": 1, "copy_": 1}


def test_the_trace_counts_a_backward_pass() -> None:
    def run(tracer: object) -> None:
        layer = nn.Linear(3, 2, bias=False).to("cuda")
        states = torch.ones(4, 3, device="cuda", requires_grad=True)
        tracer.take()  # type: ignore[attr-defined]
        layer(states).sum().backward()

    # The product; its sum; the gradient of that and both of the product.
    assert counted(run).operators == {"mm": 3, "sum": 1, "ones_like": 1}


def test_the_trace_counts_attention_as_one_operator() -> None:
    def run(tracer: object) -> None:
        query = torch.ones(1, 2, 3, 8, device="cuda", requires_grad=True)
        mask = torch.ones(3, 3, dtype=torch.bool, device="cuda")
        tracer.take()  # type: ignore[attr-defined]
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        torch.autograd.grad(out, query, torch.ones_like(out))

    found = counted(run)
    assert (found.operators["attention"], found.operators["attention_backward"]) == (1, 1)
    assert found.totals["masks"] == 1
    assert set(found.operators) == {"attention", "attention_backward", "ones_like", "add"}


@pytest.mark.parametrize(
    ("reads", "waits"),
    [
        (lambda values: values.sum().item(), (1, 1)),
        (lambda values: values.tolist(), (1, 1)),
        (lambda values: bool(values.any()), (1, 1)),
        (lambda values: values[values > 1], (0, 1)),
        (lambda values: values.nonzero(), (0, 1)),
        (lambda values: torch.bincount(values, minlength=9), (0, 1)),
        (lambda values: values.unique(), (0, 1)),
        (lambda values: values.repeat_interleave(values), (0, 1)),
        (lambda values: values.repeat_interleave(values, output_size=6), (0, 0)),
        (lambda values: values.repeat_interleave(2), (0, 0)),
        (lambda values: values[values], (0, 0)),
        (lambda values: to_host({"a": values, "b": values + 1}), (1, 1)),
    ],
)
def test_the_trace_sees_where_the_host_waits(reads: object, waits: tuple[int, int]) -> None:
    def run(tracer: object) -> None:
        values = torch.arange(4, device="cuda")
        tracer.take()  # type: ignore[attr-defined]
        reads(values)  # type: ignore[operator]

    found = counted(run)
    assert (found.totals["reads"], found.totals["waits"]) == waits


@pytest.mark.parametrize(
    ("copies", "waits"),
    [
        (lambda: torch.ones(3).to("cuda"), 1),
        (lambda: torch.ones(3).to("cuda", non_blocking=True), 1),
        (lambda: torch.tensor([1, 2], device="cuda"), 1),
        (lambda: torch.zeros(3, device="cuda").copy_(torch.ones(3)), 1),
        (lambda: torch.zeros(3, device="cuda")[torch.tensor([1, 2])], 1),
        (lambda: torch.ones(3, pin_memory=True).to("cuda", non_blocking=True), 0),
        (lambda: to_device({"a": torch.ones(3), "b": torch.ones(2)}, "cuda"), 0),
    ],
)
def test_the_trace_sees_copies_to_the_device(copies: object, waits: int) -> None:
    assert callable(copies)
    found = counted(lambda tracer: copies())
    assert (found.totals["uploads"], found.totals["waits"]) == (1, waits)
