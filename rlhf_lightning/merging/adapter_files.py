"""Reads the folder of a LoRA adapter: its factors by layer, what it trained in full, and whether it can be merged.

Legend: r rank, I inputs and O outputs of a layer (tokens and features of an embedding).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.safetensors_io import read_json
from .tensor_files import StoredTensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Options that change the function of the layers in another way than the formulas of ``adapter_weights``.
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
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\..+)?")


@dataclass(frozen=True)
class Factors:
    """The sum that an adapter adds to one layer: ``scale (B A x + c)``.

    Args:
        a_rI: the first factor.
        b_Or: the second.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias_O: c, the bias of the second factor; ``None`` without it.
        magnitude_O: of DoRA; ``None`` without it.
        embedding: whether the layer is an embedding.
    """

    a_rI: Tensor
    b_Or: Tensor
    scale: float
    bias_O: Tensor | None
    magnitude_O: Tensor | None
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Args:
        folder: of the adapter.
        config: its adapter_config.json.
        layers: factors by the path of the layer.
        trained: tensors that were trained in full (biases, and modules_to_save), by their names in the base.
        own_base: weights of the base that are stored with the adapter, by their names in the base.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, Factors]
    trained: dict[str, StoredTensor]
    own_base: dict[str, StoredTensor]

    @property
    def file(self) -> Path:
        """The file of weights."""
        return self.folder / WEIGHTS


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter.

    Raises:
        ValueError: it is damaged, or equals no weights of its base model.
    """
    config = read_json(folder / CONFIG)
    check_exact(config, folder)
    parts: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, StoredTensor] = {}
    own_base: dict[str, StoredTensor] = {}
    for key, tensor in read_header(folder / WEIGHTS).items():
        path = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(path)
        if match is None:
            # Of adapted layers, peft stores trained biases, and the weights of embeddings, which are the base's own.
            kept = own_base if path.endswith(".base_layer.weight") else trained
            kept[path.replace(".base_layer.", ".")] = tensor
        else:
            kind = match[2] + ("_bias" if match[3] == ".bias" else "")
            parts.setdefault(match[1], {})[kind] = tensor.whole()
    layers = {path: _factors(path, found, config, folder) for path, found in parts.items()}
    return Adapter(folder, config, layers, trained, own_base)


def _factors(path: str, found: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Factors:
    """Puts the tensors of one layer together."""
    a_rI = found.get("lora_embedding_A", found.get("lora_A"))
    b_Or = found.get("lora_embedding_B", found.get("lora_B"))
    if a_rI is None or b_Or is None:
        raise ValueError(f"{str(folder / WEIGHTS)!r} has only one of the two factors of {path!r}: export it again")
    if a_rI.ndim != 2 or b_Or.ndim != 2:
        raise ValueError(f"the adapter {str(folder)!r} has factors of a convolution, {path!r}: only those of matrices")
    magnitude = found.get("lora_magnitude_vector")
    bias = found.get("lora_B_bias")
    return Factors(
        a_rI,
        b_Or,
        lora_scale(path, len(a_rI), config),
        None if bias is None else bias.flatten(),
        None if magnitude is None else magnitude.flatten(),
        "lora_embedding_A" in found,
    )


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


def lora_scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """Returns the factor of B A, from the layer's own alpha and rank."""
    alpha = _by_pattern(path, config.get("alpha_pattern") or {}, config["lora_alpha"])
    declared = _by_pattern(path, config.get("rank_pattern") or {}, config["r"])
    if declared != rank:
        raise ValueError(f"the factors of {path!r} have rank {rank}, and {CONFIG} says {declared}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a path, as peft reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
