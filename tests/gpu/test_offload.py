"""Decoder blocks in host memory: the steps, and the checkpoint, of a model that is on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_lightning import FSDP2Strategy
from rlhf_lightning.sequences import ExampleBatch

from ..invariance.harness import Batches, whole
from ..invariance.methods import METHODS
from .steps import device_trainer, save_model


@pytest.fixture
def no_group_is_left_behind() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(name: str, folder: str, device: torch.device, save: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Two steps; the module, and its weights whole on the CPU."""
    torch.manual_seed(0)
    method = METHODS[name]
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    settings = {"max_grad_norm": 0.5, "micro_batch_tokens": 40, **method.options, "optimizer": optimizer}
    module = method.module(folder, **settings)
    run = device_trainer(device, "32-true", max_epochs=1, **options)
    rows = method.rows(6)
    run.fit(module, Batches(ExampleBatch(rows[:4]), ExampleBatch(rows[4:])))
    run.save_checkpoint(save)
    return module, {name: whole(p).cpu() for name, p in module.named_parameters()}


@pytest.mark.usefixtures("no_group_is_left_behind")
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_offloaded_blocks_make_the_same_steps(name: str, device: torch.device, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", initializer_range=0.05)
    _, expected = trained(name, folder, torch.device("cpu"), tmp_path / "one.ckpt")
    strategy = FSDP2Strategy(cpu_offload=True)
    module, found = trained(name, folder, device, tmp_path / "offloaded.ckpt", strategy=strategy)
    places = {p.to_local().device.type for p in module.model.model.layers.parameters() if isinstance(p, DTensor)}
    assert places == {"cpu"}
    assert next(module.model.parameters()).device.type == device.type
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-5, msg=key)
    saved = (torch.load(tmp_path / f"{run}.ckpt", weights_only=False) for run in ("one", "offloaded"))
    first, second = ([state["momentum_buffer"] for state in s["optimizer_states"][0]["state"].values()] for s in saved)
    for buffer, other in zip(first, second, strict=True):
        torch.testing.assert_close(other.cpu(), buffer, rtol=1e-3, atol=1e-5)
