"""Building an optimizer on groups of parameters: rates of their own, and no weight decay where it does not belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def build_optimizer(
    build: Callable[[Any], Optimizer], groups: Sequence[Any], exempt: Iterable[nn.Parameter]
) -> Optimizer:
    """Builds an optimizer; where it decays weights, those that are exempt form groups without decay.

    Args:
        build: from parameters or groups of them to an optimizer.
        groups: parameters, or groups with the factor ``lr_ratio`` of the rate where they have one.
        exempt: what no decay is for; a group that says its own ``weight_decay`` is left as it is.
    """
    optimizer = build([dict(group) if isinstance(group, dict) else group for group in groups])
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        optimizer = build(_split(groups, {id(parameter) for parameter in exempt}))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_ratio", 1.0)
    return optimizer


def without_decay(module: nn.Module) -> list[nn.Parameter]:
    """Norms, biases and other vectors: pulling these to 0 regularises nothing (gains of norms would fall from 1)."""
    return [p for name, p in module.named_parameters() if p.ndim < 2 or name.rpartition(".")[2] == "bias"]


def _split(groups: Sequence[Any], exempt: set[int]) -> list[dict[str, Any]]:
    """Each group as two: what is decayed, and what is not."""
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
