"""Reads an adapter's folder as if it were a whole model: each tensor of its base with the adapter's difference.

Computed from the formulas of LoRA (Hu et al., 2021, arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA
(arXiv:2402.09353), in the precision of the merge and for some rows at a time:

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) for rsLoRA
    W' = m (W + s B A) / ||W + s B A||        for DoRA, the norm over the inputs of each output
    b' = b + s c        with a bias c of the adapter's second layer (``lora_bias``)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.safetensors_io import read_json
from .tensor_files import StoredTensor, read_header

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options that change the function of the layers in another way than the formulas above.
_INEXACT = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Options under which the base's own weights were changed before training, so that the folder of the base is not it.
_OTHER_BASE = ("corda_config", "loftq_config", "lora_ga_config")
_OTHER_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraTensor:
    """The adapter of one weight.

    Args:
        a_rI: the first factor.
        b_Or: the second.
        scale: s.
        magnitude_O: m of DoRA; ``None`` without it.
        transposed: whether the weight is stored as inputs x outputs (Conv1D, embeddings).
    """

    a_rI: Tensor
    b_Or: Tensor
    scale: float
    magnitude_O: Tensor | None
    transposed: bool

    def delta(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Computes s B A for some rows of the weight as it is stored."""
        a_rI, b_Or = self.a_rI.to(dtype), self.b_Or.to(dtype)
        if self.transposed:
            return (b_Or @ a_rI[:, first : first + count]).T.mul_(self.scale)
        return (b_Or[first : first + count] @ a_rI).mul_(self.scale)


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of the base with the adapter's difference; read like a ``StoredTensor``.

    Args:
        base: the base's tensor.
        lora: the adapter of it.
        dtype: that the sum is computed in.
    """

    base: StoredTensor
    lora: LoraTensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.base.shape

    @property
    def file(self) -> Path:
        """File of the base's tensor."""
        return self.base.file

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.base.elements

    def rows(self, first: int, count: int) -> Tensor:
        """Computes some rows of the adapted weight."""
        lora = self.lora
        if lora.magnitude_O is not None and lora.transposed:
            return self._rows_of_transposed_dora()[first : first + count]
        weight = self.base.rows(first, count).to(self.dtype)
        weight = weight + lora.delta(first, len(weight), self.dtype)
        if lora.magnitude_O is None:
            return weight
        magnitude = lora.magnitude_O.to(self.dtype)[first : first + count]
        return weight.mul_((magnitude / weight.norm(dim=1))[:, None])

    def _rows_of_transposed_dora(self) -> Tensor:
        """Computes a whole weight stored as inputs x outputs: norms over the inputs need all rows."""
        assert self.lora.magnitude_O is not None
        weight = self.base.rows(0, self.base.shape[0]).to(self.dtype)
        weight = weight + self.lora.delta(0, len(weight), self.dtype)
        return weight.mul_(self.lora.magnitude_O.to(self.dtype) / weight.norm(dim=0))


@dataclass(frozen=True)
class ShiftedBias:
    """A bias of the base plus the bias of the adapter's second layer.

    Args:
        base: the base's bias.
        shift_O: s c.
    """

    base: StoredTensor
    shift_O: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bias."""
        return self.base.shape

    @property
    def file(self) -> Path:
        """File of the base's bias."""
        return self.base.file

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.base.elements

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the sum."""
        return self.shift_O.dtype

    def rows(self, first: int, count: int) -> Tensor:
        """Computes the bias, as one row."""
        return self.base.rows(0, 1).to(self.dtype) + self.shift_O[None]


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds an adapter."""
    return (folder / "adapter_config.json").is_file()


def check_exact(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses adapters that no weight of a whole model equals.

    Raises:
        ValueError: naming the option.
    """
    where = f"the adapter {str(folder)!r}"
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where} is of the type {config.get('peft_type')}: only LoRA adapters can be merged exactly")
    for name in _INEXACT:
        if config.get(name):
            raise ValueError(f"{where} has {name}={config[name]!r}, with which it equals no weights: merge others")
    init = str(config.get("init_lora_weights", ""))
    changed = next((name for name in _OTHER_BASE if config.get(name)), None)
    if changed or init.startswith(_OTHER_INIT):
        raise ValueError(
            f"{where} was initialised with {changed or init}, which changes the base's weights: export it merged "
            "(merge_adapter=True), and merge that folder"
        )


def adapted_tensors(
    folder: Path, base: Mapping[str, StoredTensor], *, dtype: torch.dtype
) -> dict[str, StoredTensor | AdaptedTensor | ShiftedBias]:
    """Reads an adapter as the tensors of a whole model.

    Args:
        folder: of the adapter.
        base: tensors of its base model.
        dtype: to compute sums in.

    Raises:
        ValueError: the adapter cannot be merged exactly, or does not fit the base.
    """
    config = read_json(folder / "adapter_config.json")
    check_exact(config, folder)
    stored = read_header(folder / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    # peft stores adapted embeddings with their own weights.
    own = {key: tensor for key, tensor in stored.items() if ".base_layer." in key}
    base = {**base, **{key.removeprefix(_PREFIX).replace(".base_layer.", "."): t for key, t in own.items()}}
    found: dict[str, StoredTensor | AdaptedTensor | ShiftedBias] = dict(base)
    for key, tensor in stored.items():
        if key in own:
            continue
        path = key.removeprefix(_PREFIX)
        match = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\..+)?", path
        )
        if match is None:
            # Trained in full: biases, and modules_to_save.
            if path not in base or base[path].shape != tensor.shape:
                raise ValueError(f"{str(folder / WEIGHTS)!r} has {key!r}, which its base model does not have")
            found[path] = tensor
            continue
        kind = match[2] + ("_bias" if match[3] == ".bias" else "")
        parts.setdefault(match[1], {})[kind] = _whole(tensor)
    for path, factors in parts.items():
        found |= _adapted(path, factors, config, base, folder, dtype)
    return found


def _adapted(
    path: str,
    factors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: Mapping[str, StoredTensor],
    folder: Path,
    dtype: torch.dtype,
) -> dict[str, AdaptedTensor | ShiftedBias]:
    """Combines the factors of one layer with its weight and bias."""
    embedding = "lora_embedding_A" in factors
    a_rI = factors.get("lora_embedding_A", factors.get("lora_A"))
    b_Or = factors.get("lora_embedding_B", factors.get("lora_B"))
    if a_rI is None or b_Or is None:
        raise ValueError(f"{str(folder / WEIGHTS)!r} has only one of the two factors of {path!r}: export it again")
    weight = base.get(f"{path}.weight")
    plain, flipped = (b_Or.shape[0], a_rI.shape[1]), (a_rI.shape[1], b_Or.shape[0])
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    # A model may mix both layouts; the flag of the config decides for square weights only.
    if weight is not None and not embedding and plain != flipped:
        transposed = weight.shape == flipped
    shape = flipped if transposed else plain
    if weight is None or weight.shape != shape:
        has = "no such weight" if weight is None else f"one of shape {weight.shape}"
        raise ValueError(
            f"the adapter {str(folder)!r} changes {path}.weight of shape {shape}, and its base model has {has}: give "
            "the base that it was trained on"
        )
    scale = lora_scale(path, len(a_rI), config)
    magnitude = factors.get("lora_magnitude_vector")
    lora = LoraTensor(a_rI, b_Or, scale, None if magnitude is None else magnitude.flatten(), transposed)
    found: dict[str, AdaptedTensor | ShiftedBias] = {f"{path}.weight": AdaptedTensor(weight, lora, dtype)}
    if "lora_B_bias" in factors:
        bias = base.get(f"{path}.bias")
        if bias is None:
            raise ValueError(
                f"the adapter {str(folder)!r} has a bias for {path!r}, whose layer has none: it equals no weights of "
                "the base model"
            )
        found[f"{path}.bias"] = ShiftedBias(bias, scale * factors["lora_B_bias"].to(dtype).flatten())
    return found


def lora_scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """Returns the factor of B A, from the layer's own alpha and rank."""
    alpha = _by_pattern(path, config.get("alpha_pattern") or {}, config["lora_alpha"])
    declared = _by_pattern(path, config.get("rank_pattern") or {}, config["r"])
    if declared != rank:
        raise ValueError(f"the factors of {path!r} have rank {rank}, and adapter_config.json says {declared}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a path, as peft reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _whole(tensor: StoredTensor) -> Tensor:
    rows, _ = (1, 0) if len(tensor.shape) < 2 else (tensor.shape[0], 0)
    return tensor.rows(0, rows).view(tensor.shape)
