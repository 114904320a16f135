"""Measures a module in the middle of training, outside of Lightning's validation, without a trace in the run."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import lightning
import torch

from ..models import evaluating
from .position import set_up_validation
from .resume import random_state, set_random_state
from .validation_rows import ValidationRows


def measure_validation(
    trainer: lightning.Trainer, module: lightning.LightningModule, *, num_batches: int | None = None
) -> dict[str, float]:
    """Computes loss and metrics of the validation set with the current weights; every rank calls it.

    Nothing is logged, no callback is called, and random states are those of before.

    Args:
        trainer: a trainer that fits.
        module: its ``PostTrainingModule``.
        num_batches: of each data loader, from the first; all that the trainer validates by default.

    Returns:
        By the names that validation logs them under, such as ``val/loss``; empty without validation rows.
    """
    own: Any = module
    set_up_validation(trainer)
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    counts = [min(count, math.inf if num_batches is None else num_batches) for count in loop._max_batches or ()]

    # A measurement within training must leave no trace: random states and the rows of a running validation come back.
    device = torch.device(own.device)
    states, kept = random_state(device), {name: getattr(own, name) for name in own.of_validation}
    own.validation_rows = rows = ValidationRows(own)
    try:
        with torch.no_grad(), evaluating(own):
            for number, (loader, count) in enumerate(zip(loaders, counts, strict=True)):
                place = (number,) if len(loaders) > 1 else ()
                for index, batch in enumerate(islice(loader, None if math.isinf(count) else int(count))):
                    moved = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                    trainer.strategy.validation_step(moved, index, *place)
            found = rows.summaries(len(loaders))
    finally:
        for name, value in kept.items():
            setattr(own, name, value)
        set_random_state(states, device)
    return {f"val/{name}{end}": float(value) for end, values in found.items() for name, value in values.items()}
