"""Step losses against probabilities in plain Python and torch's own functions; aggregation against loops."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rlhf_lightning.losses.process_reward import (
    AGGREGATIONS,
    aggregate_step_logits,
    aggregate_step_scores,
    step_bce_loss,
)


@pytest.mark.parametrize("labels", [[1.0, 0.0, 1.0, 0.0], [0.9, 0.25, 0.0, 0.5], [True, False, False, True]])
def test_bce_with_hard_and_soft_labels(labels: list[float]) -> None:
    logits = torch.tensor([0.3, -2.0, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    losses = step_bce_loss(logits, torch.tensor(labels))
    probabilities = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    # Labels arrive in fp32; as numbers they are what fp32 makes of them.
    wanted = torch.tensor(labels).double().tolist()
    expected = [-y * math.log(p) - (1 - y) * math.log(1 - p) for p, y in zip(probabilities, wanted, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    losses.sum().backward()
    assert logits.grad.tolist() == pytest.approx([p - y for p, y in zip(probabilities, wanted, strict=True)], rel=1e-12)


def test_bce_agrees_with_torch_and_is_log_2_at_logit_0() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, generator=generator), torch.rand(20, generator=generator)
    torch.testing.assert_close(
        step_bce_loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    )
    assert step_bce_loss(torch.zeros(2), torch.tensor([0, 1])).tolist() == pytest.approx([math.log(2)] * 2)


def test_gradients_are_the_numerical_derivatives() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0.0, 1.0, 0.3, 0.5], dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: step_bce_loss(x, labels), logits)
    scores = torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.tensor([0, 0, 1, 1, 1])
    for aggregation in AGGREGATIONS:
        torch.autograd.gradcheck(
            lambda x, how=aggregation: aggregate_step_scores(x, index, num_sequences=2, aggregation=how), scores
        )


def test_extreme_logits_stay_finite_in_fp32() -> None:
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    losses = step_bce_loss(logits, torch.tensor([1, 1, 0, 0]))
    assert losses.tolist() == [0.0, 1e4, 1e4, 0.0]
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("aggregation", "oracle"),
    [
        ("min", min),
        ("product", math.prod),
        ("last", lambda scores: scores[-1]),
        ("mean", lambda scores: sum(scores) / len(scores)),
    ],
)
def test_aggregation(aggregation: str, oracle: Callable[[list[float]], float]) -> None:
    # Steps of different sequences may alternate; each sequence's own are in order.
    scores, index = [0.5, 0.9, 0.0, 0.8, 0.4, 0.7], [0, 1, 2, 1, 1, 0]
    expected = [oracle([s for s, i in zip(scores, index, strict=True) if i == wanted]) for wanted in range(3)]
    found = aggregate_step_scores(torch.tensor(scores), torch.tensor(index), num_sequences=3, aggregation=aggregation)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: step_bce_loss(torch.zeros(2), torch.zeros(3)),
            "logits_M has shape (2,) and labels_M (3,): give all of logits_M, labels_M the shape (M,)",
        ),
        (
            lambda: step_bce_loss(torch.zeros(2), torch.tensor([0.0, 1.5])),
            "labels_M holds 1.5, outside [0, 1]: give 0, 1 or a probability",
        ),
        (
            lambda: step_bce_loss(torch.zeros(1), torch.tensor([float("nan")])),
            "labels_M holds nan, outside [0, 1]: give 0, 1 or a probability",
        ),
        (
            lambda: aggregate_step_scores(torch.ones(1), torch.tensor([0]), num_sequences=1, aggregation="prod"),
            "aggregation is 'prod'; it must be one of min, product, last, mean; did you mean 'product'?",
        ),
        (
            lambda: aggregate_step_scores(torch.ones(1), torch.tensor([1]), num_sequences=2),
            "sequence 0 has no steps: drop it, or score it as one step",
        ),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_logits_are_aggregated_as_by_a_loop(aggregation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = [3, 1, 5]
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    index, steps = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)), torch.tensor(counts)
    rules = {
        "min": torch.min,
        "last": lambda z: z[-1],
        "mean": torch.mean,
        "product": lambda z: z.sigmoid().prod().log(),
    }
    expected = torch.stack([rules[aggregation](part) for part in logits.split(counts)])
    found = aggregate_step_logits(logits, index, steps, aggregation=aggregation)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    [one], [two] = (torch.autograd.grad((value * weights).sum(), logits) for value in (found, expected))
    torch.testing.assert_close(one, two)
    if aggregation in ("min", "last"):  # the same step decides as with probabilities
        scores = aggregate_step_scores(logits.sigmoid(), index, num_sequences=3, aggregation=aggregation)
        torch.testing.assert_close(found.sigmoid(), scores)
    with pytest.raises(ValueError, match="sequence_index_M"):
        aggregate_step_logits(logits, index[:-1], steps, aggregation=aggregation)
