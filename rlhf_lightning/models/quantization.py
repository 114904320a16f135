"""Quantised weights: their configuration, and layers that compute the same in training and in evaluation."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, fix_4bit_weight_quant_state_from_module
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

Quantization = Literal["nf4", "fp4", "int8"]


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Makes the bitsandbytes config for a model that computes in ``dtype`` where there is no autocast."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


class AutocastLinear4bit(Linear4bit):
    """A 4-bit layer that multiplies in the precision of autocast where there is one, as other linear layers do.

    bitsandbytes multiplies in the ``compute_dtype`` that a layer was made with, fp32 under mixed precision, also where
    everything around it is in half precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, ``(..., in) -> (..., out)``."""
        if not torch.is_autocast_enabled(x.device.type):
            found: Tensor = super().forward(x)
            return found
        fix_4bit_weight_quant_state_from_module(self)
        weight: Any = self.weight
        dtype = torch.get_autocast_dtype(x.device.type)
        # The backward pass dequantises to the precision that the state names.
        state = copy.copy(weight.quant_state)
        state.dtype = dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state)
        return product


class SteadyLinear8bit(Linear8bitLt):
    """An 8-bit layer that computes the same in training and in evaluation.

    On a CPU bitsandbytes multiplies by dequantised weights in training, but also quantises activations in evaluation,
    so that a policy would differ from its own reference before the first step. The layer uses its mode for nothing
    else.
    """

    @property
    def training(self) -> bool:
        """Always True."""
        return True

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignores the mode."""


def steady_quantised_layers(model: PreTrainedModel) -> None:
    """Makes quantised layers compute the same function, and a differentiable one, in every mode and precision."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In evaluation on a CPU with AVX512-BF16, bitsandbytes repacks the weight in place for a kernel that
            # computes in bfloat16 and has no backward: later training steps would silently lose most of their gradient.
            module.support_avx512bf16_for_cpu = False
            if type(module) is Linear4bit:
                module.__class__ = AutocastLinear4bit
        elif type(module) is Linear8bitLt:
            module.__class__ = SteadyLinear8bit
