"""Runs one optimizer step (SGD, learning rate 1, no clipping) or one validation, and returns what can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_lightning.sequences import Example, ExampleBatch

from .methods import Method

# Relative tolerances: fp64 to rounding, fp32 to accumulation order.
TOLERANCE = {"64-true": 1e-10, "32-true": 1e-5}


def whole(parameter: Tensor) -> Tensor:
    """A parameter's value, gathered where it is sharded; every rank calls it."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


class Batches:
    """A sized loader of given batches (Lightning takes a bare list for a list of loaders)."""

    def __init__(self, *batches: ExampleBatch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ExampleBatch]:
        return iter(self.batches)


class Outcome(NamedTuple):
    """A step's weight updates by parameter name, everything that was logged, and how weights are rounded.

    An update is the difference of weights, each rounded in proportion to itself, not to the update.
    """

    updates: dict[str, Tensor]
    metrics: dict[str, float]
    rounding: Mapping[str, float] = MappingProxyType({})


def trainer(precision: str = "64-true", **options: Any) -> lightning.Trainer:
    """A silent trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", **{"precision": precision, "devices": 1, **quiet, **options})


def step(
    method: Method,
    folder: str,
    examples: list[Example],
    precision: str = "64-true",
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """One optimizer step on one global batch, or on this rank's share of it."""
    torch.manual_seed(0)
    settings = {"max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=1.0), **method.options, **options}
    module = method.module(folder, **settings)
    run = trainer(precision, max_steps=1, num_sanity_val_steps=0, **(trainer_options or {}))
    before: dict[str, Tensor] = {}

    class Snapshot(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            before.update({n: whole(p).clone() for n, p in pl_module.named_parameters()})

    run.callbacks.append(Snapshot())
    run.fit(module, Batches(ExampleBatch(examples)))
    updates = {name: whole(p) - before[name] for name, p in module.named_parameters()}
    rounding = {name: torch.finfo(start.dtype).eps * float(start.norm()) for name, start in before.items()}
    return Outcome(updates, {k: float(v) for k, v in run.callback_metrics.items()}, rounding)


def validate(
    method: Method,
    folder: str,
    examples: list[Example],
    batch_size: int,
    trainer_options: dict[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    **options: Any,
) -> dict[str, float]:
    """One pass over a validation set in batches of a given global size; a rank may get empty ones, as from a loader."""
    torch.manual_seed(0)
    module = method.module(folder, **method.options, **options)
    chunks = [examples[n : n + batch_size] for n in range(0, len(examples), batch_size)]
    batches = [ExampleBatch(chunk[rank::world]) for chunk in chunks]
    return trainer(**(trainer_options or {})).validate(module, Batches(*batches), verbose=False)[0]


def assert_same(outcome: Outcome, expected: Outcome, tolerance: float) -> None:
    """Compares updates in norm per tensor, and what was logged."""
    assert outcome.updates.keys() == expected.updates.keys()
    largest = max(float(u.norm()) for u in expected.updates.values())
    assert largest > 1e-4, "the step changed nothing: the comparison would be empty"
    for name, update in expected.updates.items():
        error = float((outcome.updates[name] - update).norm())
        # A tensor without gradient in exact arithmetic holds rounding noise alone: it is compared with the whole step.
        scale = max(float(update.norm()), 1e-4 * largest)
        assert error <= tolerance * scale + expected.rounding.get(name, 0.0), (
            f"{name}: relative error {error / scale:.1e}"
        )
    assert_same_metrics(outcome.metrics, expected.metrics, tolerance)


def assert_same_metrics(metrics: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    """Compares logged values relative to the size of the log-probs that they are made of (logged in fp32)."""
    assert metrics.keys() == expected.keys()
    scale = max([1.0, *(abs(v) for k, v in expected.items() if "logps" in k)])
    for name, value in expected.items():
        assert math.isfinite(value), name
        assert abs(metrics[name] - value) <= max(tolerance, 2e-7) * max(scale, abs(value)), (name, metrics[name], value)
