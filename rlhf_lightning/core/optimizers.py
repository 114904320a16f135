"""Building an optimizer on parameter groups: relative learning rates, and no weight decay of norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .lr_schedules import WarmupSchedule


def build_optimizer(
    build: Callable[[Any], Optimizer], groups: Sequence[Any], exempt: Iterable[nn.Parameter]
) -> Optimizer:
    """Builds an optimizer; if it has weight decay, exempt parameters are put in groups without decay.

    Args:
        build: function from parameters or groups of them to an optimizer.
        groups: parameters, or groups with an optional ``lr_ratio``, which multiplies their learning rate.
        exempt: parameters without decay; a group with its own ``weight_decay`` is left unchanged.
    """
    optimizer = build([dict(group) if isinstance(group, dict) else group for group in groups])
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        optimizer = build(_split(groups, {id(parameter) for parameter in exempt}))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_ratio", 1.0)
    return optimizer


def without_decay(module: nn.Module) -> list[nn.Parameter]:
    """Returns norms, biases and other vectors: decay to 0 does not regularise these (gains of norms start at 1)."""
    return [p for name, p in module.named_parameters() if p.ndim < 2 or name.rpartition(".")[2] == "bias"]


def _split(groups: Sequence[Any], exempt: set[int]) -> list[dict[str, Any]]:
    """Splits each group into one with decay and one without."""
    given = [group for group in groups if isinstance(group, dict)] or [{"params": list(groups)}]
    split: list[dict[str, Any]] = []
    for group in given:
        if "weight_decay" in group:
            split.append(group)
            continue
        decayed = [parameter for parameter in group["params"] if id(parameter) not in exempt]
        others = [parameter for parameter in group["params"] if id(parameter) in exempt]
        split += [{**group, "params": decayed}] if decayed else []
        split += [{**group, "params": others, "weight_decay": 0.0}] if others else []
    return split


def build_optimizer_and_scheduler(
    module: Any, build: Callable[[Any], Optimizer], build_scheduler: Callable[[Optimizer], Any] | None
) -> OptimizerLRScheduler:
    """Builds a module's optimizer on its trainable parameters, and a schedule that is stepped with every step.

    Args:
        module: a ``PostTrainingModule``.
        build: function from parameters or groups of them to an optimizer.
        build_scheduler: function from the optimizer to a scheduler; ``None`` for none.

    Raises:
        ValueError: nothing is trainable, or the scheduler waits for a metric.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "nothing is trainable: give lora={'r': 16}, remove quantization, or call unfreeze() after freeze()"
        )
    optimizer = build_optimizer(build, module.parameter_groups(parameters), without_decay(module))
    if build_scheduler is None:
        return optimizer
    scheduler = build_scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "lr_scheduler is ReduceLROnPlateau, which waits for a metric; schedules step with every optimizer step "
            "here: use rlhf_lightning.core.WarmupSchedule or another torch schedule, or override "
            "configure_optimizers and return it with its monitor"
        )
    if isinstance(scheduler, WarmupSchedule) and scheduler.total_steps is None:
        scheduler.set_total_steps(module.num_steps())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
