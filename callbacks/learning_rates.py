"""Changes the learning rates of a run that is on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Learning rates in an optimizer's groups and in a schedule.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def scale_learning_rates(trainer: Any, factor: float) -> None:
    """Multiplies the learning rates of a trainer's optimizers and the peaks of their schedules.

    Args:
        trainer: a trainer that fits.
        factor: above 0.
    """
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in _RATES:
                if isinstance(group.get(name), float | int | Tensor):
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        _scale_schedule(config.scheduler, factor)


def _scale_schedule(schedule: Any, factor: float) -> None:
    for name in ("base_lrs", "_last_lr"):
        if isinstance(getattr(schedule, name, None), list):
            setattr(schedule, name, [rate * factor for rate in getattr(schedule, name)])
    for inner in getattr(schedule, "_schedulers", ()):
        _scale_schedule(inner, factor)
