"""Building an optimizer on parameter groups: relative learning rates, and no weight decay of norms and biases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel

from ..models.backbone import decoder_blocks
from ..utils.validation import check_positive
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


def check_lr_ratios(lr_ratios: Mapping[str, float] | None, layer_lr_decay: float | None) -> None:
    """Raises unless relative learning rates are above 0, by regular expressions, and the decay of layers in (0, 1]."""
    for pattern, ratio in (lr_ratios or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"lr_ratios has {pattern!r}, which is no regular expression: {error}") from error
        check_positive(f"lr_ratios[{pattern!r}]", ratio, "1 is the optimizer's learning rate")
    if layer_lr_decay is not None:
        check_positive("layer_lr_decay", layer_lr_decay, "0.9 is usual; null is off")
        if layer_lr_decay > 1:
            raise ValueError(f"layer_lr_decay is {layer_lr_decay}; it must be at most 1 (0.9 is usual; null is off)")


def group_parameters(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    lr_ratios: Mapping[str, float] | None,
    layer_lr_decay: float | None,
    further: Mapping[int, float] | None = None,
) -> list[Any]:
    """Groups parameters by their relative learning rates; those without one come first.

    A parameter's ratio is a product: that of the first pattern found in its name, that of its layer, a further one.

    Args:
        module: names the parameters, as in its state dict; tied ones have the first of their names.
        parameters: the trainable ones.
        lr_ratios: ratios by regular expressions.
        layer_lr_decay: d; of L decoder layers the one with number i, from 0, has d^(L - 1 - i), input embeddings d^L.
        further: other ratios by the id of a parameter.

    Returns:
        The parameters if all ratios are 1, else groups with an ``lr_ratio``.

    Raises:
        ValueError: a pattern matches no name of these parameters.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers = {} if layer_lr_decay is None else _layer_ratios(module, layer_lr_decay)

    # Ratio 1 is there from the start, so that its group comes first, whichever parameter does.
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    unused = list(lr_ratios or {})
    for parameter in parameters:
        # Every pattern that matches counts as used; the first one gives the ratio.
        name = names[id(parameter)]
        matching = [pattern for pattern in lr_ratios or {} if re.search(pattern, name)]
        unused = [pattern for pattern in unused if pattern not in matching]
        ratio = (lr_ratios or {})[matching[0]] if matching else 1.0
        ratio *= layers.get(id(parameter), 1.0) * (further or {}).get(id(parameter), 1.0)
        groups.setdefault(ratio, []).append(parameter)

    if unused:
        shown = ", ".join(names[id(parameter)] for parameter in (*parameters[:1], *parameters[-1:]))
        raise ValueError(f"lr_ratios has {unused[0]!r}, which matches no trained parameter (such as {shown})")
    if len(groups) == 1:
        return list(parameters)
    return [{"params": group, "lr_ratio": ratio} for ratio, group in groups.items() if group]


def _layer_ratios(module: nn.Module, decay: float) -> dict[int, float]:
    """The ratios of the decoder layers and input embeddings of all models in a module, by the ids of parameters."""
    found: dict[int, float] = {}
    for model in module.modules():
        # A model within another, such as the decoder of one with a vocabulary, has been seen with it.
        if not isinstance(model, PreTrainedModel) or any(id(p) in found for p in model.parameters()):
            continue
        blocks = decoder_blocks(model)
        for number, block in enumerate(blocks):
            found |= {id(p): decay ** (len(blocks) - 1 - number) for p in block.parameters()}
        embeddings: nn.Module = model.get_input_embeddings()
        found |= {id(p): decay ** len(blocks) for p in embeddings.parameters()}
    return found


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
