"""One optimizer step on a device, as the gradient that it takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches
from ..invariance.methods import METHODS

EIGHT = ("sft", "reward", "process", "dpo", "simpo", "kto", "grpo", "ppo")


def save_model(folder: Path, **sizes: Any) -> str:
    """A tiny model with heads of 16 numbers, the least that FlexAttention takes on CUDA."""
    return str(save_tiny_model(folder, "llama", hidden_size=64, intermediate_size=96, **sizes))


def device_trainer(device: torch.device, precision: str, **options: Any) -> lightning.Trainer:
    """A silent trainer on one device."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "num_sanity_val_steps": 0, **quiet, **options}
    return lightning.Trainer(precision=precision, **settings)  # type: ignore[arg-type]


class Gradients(lightning.Callback):
    """Returns the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self.take(pl_module))

    def take(self, module: lightning.LightningModule) -> None:
        if not self.found:
            weights = {name: p for name, p in module.named_parameters() if p.requires_grad and p.grad is not None}
            self.found = {name: p.grad.detach().double().cpu() for name, p in weights.items() if p.grad is not None}


def gradients(
    name: str, folder: str, device: torch.device, precision: str = "32-true", **options: Any
) -> dict[str, Tensor]:
    """The gradient of a method's first step on six rows, in fp64 on the CPU."""
    torch.manual_seed(0)
    method = METHODS[name]
    settings = {"max_grad_norm": None, **method.options, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    module = method.module(folder, **settings)
    module.configure_model()  # here, so that heads are drawn from the CPU's random numbers for every device
    taken = Gradients()
    run = device_trainer(device, precision, max_steps=1, callbacks=[taken])
    run.fit(module, Batches(ExampleBatch(method.rows(6))))
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    return taken.found


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    assert found.keys() == expected.keys()
    size = sum(float(weight.square().sum()) for weight in expected.values()) ** 0.5
    assert size > 1e-6, "there is no gradient to compare"
    return sum(float((found[n] - weight).square().sum()) for n, weight in expected.items()) ** 0.5 / size
