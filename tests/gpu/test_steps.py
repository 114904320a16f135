"""One step of every method: on the device as on the CPU in fp32, and in half a precision near that."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from .steps import EIGHT, distance, gradients, save_model

CPU = torch.device("cpu")
NEAR = {"32-true": 1e-4, "bf16-mixed": 0.1, "bf16-true": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)


@cache
def exact(name: str, folder: str) -> dict[str, Tensor]:
    return gradients(name, folder, CPU)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", EIGHT)
def test_half_precision_is_near(name: str, precision: str, device: torch.device, folder: str) -> None:
    if device.type == "cpu" and name not in ("sft", "dpo", "reward"):
        pytest.skip("three methods are enough on the CPU")
    assert distance(gradients(name, folder, device, precision), exact(name, folder)) < NEAR[precision]


@pytest.mark.parametrize("name", EIGHT)
def test_single_precision_is_that_of_the_cpu(name: str, cuda: torch.device, folder: str) -> None:
    assert distance(gradients(name, folder, cuda), exact(name, folder)) < NEAR["32-true"]


@pytest.mark.parametrize("budget", [40, 8192])
@pytest.mark.parametrize("name", EIGHT)
def test_flex_attention_gives_the_same_step(name: str, budget: int, cuda: torch.device, folder: str) -> None:
    options: dict[str, Any] = {"attention": "flex", "micro_batch_tokens": budget}
    assert distance(gradients(name, folder, cuda, **options), exact(name, folder)) < 1e-3


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_budget_changes_no_step(name: str, device: torch.device, folder: str) -> None:
    found = gradients(name, folder, device, micro_batch_tokens=40)
    assert distance(found, exact(name, folder)) < NEAR["32-true"]
