"""Building an optimizer on parameter groups: relative learning rates, and no weight decay of norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


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
