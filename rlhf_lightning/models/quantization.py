"""Quantised weights: their configuration, and layers that compute the same in training and in evaluation."""

from __future__ import annotations

from typing import Literal

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, PreTrainedModel

Quantization = Literal["nf4", "fp4", "int8"]


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Makes the bitsandbytes config for a model that computes in ``dtype``."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


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
    """Makes quantised layers compute the same function, and a differentiable one, in every mode."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In evaluation on a CPU with AVX512-BF16, bitsandbytes repacks the weight in place for a kernel that
            # computes in bfloat16 and has no backward: later training steps would silently lose most of their gradient.
            module.support_avx512bf16_for_cpu = False
        elif type(module) is Linear8bitLt:
            module.__class__ = SteadyLinear8bit
