"""Tensors of a GGUF file: their names, their order of rows, and what each type rounds them to."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .gguf_mixes import BLOCK, MIXES, NARROW, mixed_type, quantise

Array = npt.NDArray[Any]

TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", *MIXES)
# Rows of this many values are quantised together.
_BLOCK: Final = 32
# Numbers of the file types, as loaders show them.
FILE_TYPES: Final = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
    **{"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18},
}


def gguf_package() -> Any:
    """Imports the package ``gguf``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: pip install 'rlhf-lightning[gguf]' (or pip install gguf)"
        ) from error


def tensor_type(name: str, shape: tuple[int, ...], type: str, *, layers: int = 1, tied: bool = False) -> str:
    """Returns the type that a tensor is stored in: vectors in f32, and rows that no block divides in f16.

    Args:
        name: in the file.
        shape: of the tensor.
        type: of the file.
        layers: of the model.
        tied: whether the embedding is the output as well.

    Example:
        >>> tensor_type("blk.0.attn_norm.weight", (64,), "q8_0"), tensor_type("blk.0.attn_q.weight", (8, 48), "q8_0")
        ('f32', 'f16')
    """
    if len(shape) < 2:
        return "f32"
    kind = mixed_type(name, type, layers=layers, tied=tied) if type in MIXES else type
    if kind in NARROW and shape[-1] % BLOCK:
        kind = NARROW[kind]
    return "f16" if kind.startswith("q") and shape[-1] % _BLOCK else kind


def tensor_types(model: nn.Module, tensors: Mapping[str, Tensor], type: str) -> dict[str, str]:
    """Returns the type of each tensor of a model's file."""
    config: Any = model.config
    layers, tied = int(config.num_hidden_layers), bool(config.tie_word_embeddings)
    return {
        place: tensor_type(place, tuple(tensor.shape), type, layers=layers, tied=tied)
        for place, tensor in tensors.items()
    }


def quantised(tensor: Tensor, type: str) -> Array:
    """Converts a tensor to the bytes of a type."""
    gguf = gguf_package()
    data = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    kind = gguf.GGMLQuantizationType[type.upper()]
    if type in NARROW:
        rows = quantise(data.reshape(-1, data.shape[-1]), int(kind), int(byte_shape(data.shape, type)[0][-1]))
        return rows.reshape(byte_shape(data.shape, type)[0])
    found: Array = gguf.quants.quantize(data, kind)
    return found


def rounded(tensor: Tensor, type: str) -> Tensor:
    """Returns the values that a tensor has after it was stored in a type, in fp32."""
    if type == "f32":
        return tensor.detach().float()
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[type.upper()]
    return torch.from_numpy(np.array(gguf.quants.dequantize(quantised(tensor, type), kind))).reshape(tensor.shape)


def byte_shape(shape: tuple[int, ...], type: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Returns the shape and numpy type of a tensor's stored form."""
    gguf = gguf_package()
    if type in ("f32", "f16"):
        return shape, np.dtype(np.float32 if type == "f32" else np.float16)
    return tuple(gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[type.upper()])), np.dtype(np.uint8)


def named_tensors(model: nn.Module, architecture: str) -> dict[str, tuple[str, Tensor]]:
    """Lists the tensors of a file.

    Args:
        model: a causal language model of transformers.
        architecture: its name in the format.

    Returns:
        By name in the file, the name in the model and the tensor, with rows as the format orders them.

    Raises:
        ValueError: the format has no place for a tensor.
    """
    gguf = gguf_package()
    config: Any = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"the tensor {name!r} has no place in a GGUF file of {architecture}")
        found[place] = name, ordered(tensor, place, config, architecture)
    return found


def ordered(tensor: Tensor, place: str, config: Any, architecture: str) -> Tensor:
    """Returns a tensor as the format has it.

    Llama's files rotate neighbouring pairs of a head, where transformers rotates its halves, so rows of queries and
    keys are interleaved. Gemma's norms multiply by 1 + w, and its files hold the whole factor.
    """
    if architecture == "llama" and (".attn_q." in place or ".attn_k." in place):
        heads = config.num_attention_heads if ".attn_q." in place else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if architecture == "gemma2" and "norm" in place:
        return tensor.float() + 1
    return tensor


def rope_factors(model: nn.Module) -> Tensor:
    """Returns the default rotary frequencies divided by the model's, ``(head size / 2,)``."""
    rotary: Any = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    frequencies: Tensor = rotary.inv_freq.float().cpu()
    return default_frequencies(model) / frequencies


def default_frequencies(model: nn.Module) -> Tensor:
    """Computes the rotary frequencies that the base alone gives."""
    config: Any = model.config
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / float(config.rope_parameters["rope_theta"]) ** exponents
