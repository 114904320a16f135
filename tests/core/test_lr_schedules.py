"""Schedules against their formula, and their length filled in by the module."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.core import WarmupSchedule


def rates(total: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = WarmupSchedule(optimizer, total_steps=total, **options)  # type: ignore[arg-type]
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_by_hand() -> None:
    expected = [1.0, 2.0] + [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 4))) for n in range(4)]
    assert rates(6, warmup_steps=2, decay="cosine", min_ratio=0.1) == pytest.approx(expected)


def test_linear_and_constant_by_hand() -> None:
    assert rates(5, warmup_steps=1, decay="linear") == pytest.approx([2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates(4, warmup_steps=0.5, decay="constant") == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_a_length_that_comes_later_sets_the_first_rate_too() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = WarmupSchedule(optimizer, warmup_steps=0.5)
    schedule.set_total_steps(8)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be at least 0"),
        ({"min_ratio": 2.0}, "min_ratio is 2.0; it must lie in"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(3, **options)
