"""Switches dropout off, or sets it to one rate, wherever a model has it.

A model is random in training mode only, so dropout is switched off by the mode: in evaluation mode nothing is dropped,
whether by a module, a function within a forward pass, an adapter or a skipped layer, and no router adds noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def switch_off_dropout(module: nn.Module) -> None:
    """Makes a module compute the same in training as in evaluation; layers that checkpoint activations still do.

    Args:
        module: holds models; its own mode is unchanged.
    """
    for part in module.children():
        part.eval()
        for layer in part.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True  # transformers' condition; see recompute


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a layer of transformers and recomputes it in the backward pass, in the mode of its submodules.

    Args:
        function: a layer's ``forward`` as transformers passes it, a ``partial`` whose first argument is the layer; or
            a method of the layer, as models outside of transformers pass it.
        args: of the layer.
        kwargs: of the layer.
    """
    bound: Any = function
    layer: nn.Module = bound.args[0] if hasattr(bound, "args") else bound.__self__
    if any(part.training for part in layer.children()):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        layer.training = False
        try:
            return function(*args, **kwargs)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Sets every dropout rate of a model: of hidden states, attention weights, embeddings, adapters.

    The model's config, which is exported with it, is unchanged. Layer dropout is set to 0.

    Args:
        model: a model of transformers, possibly with adapters; changed in place.
        rate: in [0, 1).
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = rate
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Dropout(p=rate)
        # Rates are also numbers in attributes that a layer passes to functions, such as that of attention weights.
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, name, 0.0 if _leaves_layers_out(name) else rate)
        # Layers that read their rate from the config in every forward.
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            module.config = _Rated(config, rate)  # type: ignore[assignment]


def layerdrop_rate(model: nn.Module) -> float:
    """Returns the highest rate at which a model randomly skips whole layers in its present mode; 0 if it never does.

    Args:
        model: in the mode in which it will run.
    """
    rates = [
        float(value)
        for module in model.modules()
        if module.training
        for name, value in vars(module).items()
        if "layerdrop" in name and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return max(rates, default=0.0)


class _Rated:
    """Wraps a config for layers that look up their dropout rates in every forward; all else is the config's."""

    def __init__(self, config: PreTrainedConfig, rate: float) -> None:
        self._config, self._rate = config, rate

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_rate"):  # while it is copied
            raise AttributeError(name)
        value = getattr(self._config, name)
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            return 0.0 if _leaves_layers_out(name) else self._rate
        return value


def _leaves_layers_out(name: str) -> bool:
    return "layerdrop" in name or "drop_path" in name
