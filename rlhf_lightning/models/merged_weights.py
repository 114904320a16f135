"""Merges an adapter into copies of the weights, layer by layer, without changing the layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .adapters import TiedLinear, num_members
from .half_weights import hold_frozen
from .reference import ADAPTER_COPY


def trained_adapter(model: PeftModel) -> str:
    """Returns the name of the adapter that is trained.

    Raises:
        ValueError: there are several.
    """
    names = [name for name in model.peft_config if name != ADAPTER_COPY]
    if len(names) != 1:
        raise ValueError(
            f"the model has the adapters {names}: delete all but one, with delete_adapter, before an export"
        )
    return names[0]


def merged_state(model: PeftModel) -> dict[str, Tensor]:
    """Returns the base model's state dict with the adapter merged, under the names of a model without adapters.

    Raises:
        ValueError: a layer cannot be merged, or the model has the adapters of an ensemble.
    """
    adapter = _only_adapter(model)
    base: Any = model.get_base_model()
    replaced: dict[str, dict[str, Tensor]] = {}
    for name, module in base.named_modules():
        # A replaced module brings the whole state of what is below it.
        if any(name.startswith(f"{outer}.") for outer in replaced):
            continue
        state = _replaced_state(name, module, adapter)
        if state is not None:
            replaced[name] = state

    # In the order and under the names of the model without adapters.
    merged: dict[str, Tensor] = {}
    for key, tensor in base.state_dict().items():
        outer = next((name for name in replaced if key.startswith(f"{name}.")), None)
        if outer is None:
            merged[key] = tensor
        else:
            merged.update({f"{outer}.{k}": t for k, t in replaced[outer].items()})
    return merged


def check_mergeable(model: PeftModel) -> None:
    """Merges one layer of every kind, so that a layer that cannot be merged is found before training.

    Raises:
        ValueError: a layer cannot be merged, or the model has the adapters of an ensemble.
    """
    adapter = _only_adapter(model)
    seen = set()
    for name, module in model.get_base_model().named_modules():
        layer: Any = module
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        leaf = name.rpartition(".")[2]
        # Layers of one kind are merged by the same code.
        kind = (type(module), type(inner), getattr(inner, "bias", None) is None, leaf)
        if kind not in seen:
            seen.add(kind)
            _replaced_state(name, module, adapter)


def _only_adapter(model: PeftModel) -> str:
    members = num_members(model)
    if members > 1:
        raise ValueError(
            f"merge_adapter is true, but ensemble 'adapters' has {members} adapters, which cannot become one model: "
            "set merge_adapter=False, and load the folder with RewardModel.from_pretrained"
        )
    return trained_adapter(model)


def _replaced_state(name: str, module: nn.Module, adapter: str) -> dict[str, Tensor] | None:
    """Returns the merged and dequantised state of an adapted or quantised module; None for any other module."""
    # Modules that are trained in full are taken as they are.
    if isinstance(module, ModulesToSaveWrapper):
        return dict(module.modules_to_save[adapter].state_dict())
    if isinstance(module, TrainableTokensWrapper):
        tokens: Any = module.token_adapter
        # Only one of two tied layers holds the tokens' weights.
        deltas, indices = tokens.trainable_tokens_delta, tokens.token_indices
        weight = _unsharded(tokens.get_base_layer().weight).detach().clone()
        weight[torch.tensor(indices[adapter], device=weight.device)] = _unsharded(deltas[adapter]).detach().to(weight)
        return {"weight": weight}
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which cannot be merged: export with merge_adapter=False"
        )
    if isinstance(module, BaseTunerLayer):
        if _is_quantised(module.get_base_layer()):
            return _merged_quantised(name, module, adapter)
        try:
            return _merged_plain(module, adapter)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"{name} cannot be merged ({reason}): export with merge_adapter=False") from error
    return _dequantised(module) if _is_quantised(module) else None


def _merged_plain(layer: Any, adapter: str) -> dict[str, Tensor]:
    """Applies peft's own merge, for every kind of LoRA, to a copy of one layer."""
    layer = copy.deepcopy(layer, _kept_as_they_are(layer))
    hold_frozen(layer, None)  # the sum is formed in the precision that the weights were loaded in
    # peft's merge does not know shards.
    for module in layer.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, key, nn.Parameter(parameter.full_tensor(), requires_grad=False))
    plain: Any = layer
    while isinstance(plain, BaseTunerLayer):  # adapters of single parameters are nested
        plain.merge(safe_merge=True, adapter_names=[adapter])
        plain = getattr(plain, "base_layer")  # noqa: B009
    return dict(plain.state_dict())


def _kept_as_they_are(layer: nn.Module) -> dict[int, Any]:
    """Collects objects that a copy of a layer shares with it: the layer it is tied to, and views of its adapter."""
    tied = [module.source for module in layer.modules() if isinstance(module, TiedLinear)]
    views = [getattr(module, "kwargs", {}).get("tied_adapter") for module in layer.modules()]
    return {id(each): each for each in (*tied, *views) if each is not None}


def _unsharded(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _merged_quantised(name: str, layer: Any, adapter: str) -> dict[str, Tensor]:
    state = _dequantised(layer.get_base_layer())
    if adapter not in layer.lora_A:
        return state
    if adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(adapter):
        raise ValueError(
            f"{name} has a DoRA adapter or an adapter bias on quantised weights: export with merge_adapter=False"
        )
    delta = layer.get_delta_weight(adapter)
    transposed = issubclass(getattr(layer.get_base_layer(), "source_cls", nn.Linear), Conv1D)
    delta = delta.T if transposed else delta
    # The sum is formed in the adapter's precision, so that it is rounded once.
    state["weight"] = (state["weight"].to(delta.dtype) + delta).to(state["weight"].dtype)
    return state


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit | Linear8bitLt)


def _dequantised(layer: nn.Module) -> dict[str, Tensor]:
    """Dequantises weight and bias of a bitsandbytes layer, in the layout of the layer that it replaced."""
    module: Any = layer
    if isinstance(layer, Linear4bit):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        dtype = module.compute_dtype or weight.dtype
    else:
        scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        data = module.state.CB if module.state.CB is not None else module.weight.data
        weight = int8_vectorwise_dequant(data, scales)
        dtype = weight.dtype
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
        weight = weight.T.contiguous()
    state = {"weight": weight.to(dtype)}
    if module.bias is not None:
        state["bias"] = module.bias.data
    return state
