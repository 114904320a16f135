"""LoRA adapters: checks their options, adds them to a model, loads them again, and keeps tied ones tied."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .reference import ADAPTER_COPY
from .rotary import take_long_rotary
from .safetensors_io import damaged_weights, first_line, read_json

# Errors that the libraries raise for a bad folder, file or hub id.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)

# Options with which the adapter's layers do not compute W x + (alpha / r) B A x in every row, or with which the
# base model differs from its folder: references, merges and exports would not fit.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


# Adapters of the further members of an ensemble of reward models are called this with the member's number.
MEMBER_PREFIX = "member_"
# Stored with an adapter that was trained with rotary frequencies that differ from its base's default.
ROPE_PARAMETERS = "rope_parameters.json"
_IF_THERE: dict[str, Any] = {
    f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
}


class TiedLinear(nn.Module):
    """Computes one of the two products of a LoRA adapter on an output projection that is tied to the embedding.

    It has no weight of its own, so that both layers are trained as one on whatever device they are.

    Args:
        source: the embedding layer.
        name: the embedding's matrices, ``lora_embedding_A`` or ``lora_embedding_B``; the transpose of the adapter's
            one is the weight.
        adapter: the adapter's name.
    """

    bias = None

    def __init__(self, source: nn.Module, name: str, adapter: str) -> None:
        super().__init__()
        self.__dict__["source"] = source  # not a submodule: its weights belong to the embedding
        self.name = name
        self.adapter = adapter

    @property
    def weight(self) -> Tensor:
        """The weight matrix, a transposed view of the embedding's."""
        matrices: Mapping[str, Tensor] = getattr(self.__dict__["source"], self.name)
        return matrices[self.adapter].t()

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the weight, ``(..., in) -> (..., out)``."""
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype))


def lora_config(lora: Mapping[str, Any]) -> LoraConfig:
    """Makes peft's config of the option ``lora``.

    Args:
        lora: arguments of ``LoraConfig``; ``target_modules`` is ``"all-linear"`` unless given.

    Raises:
        ValueError: for an unknown option, or one with which the adapter could not be exported, merged or trained.
    """
    allowed = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    # Unknown and unsupported options are refused before the model is loaded.
    for key, value in lora.items():
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"use fields of peft's LoraConfig such as {'r'!r}"
            raise ValueError(f"lora has no option {key!r}: {hint}")
        if key in _UNSUPPORTED and value:
            raise ValueError(
                f"lora's {key} is {value!r}, with which the adapter could not be exported, merged or used as a "
                "reference as it was trained: remove it"
            )
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora}
    if options.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(
            f"lora's init_lora_weights is {options['init_lora_weights']!r}, which changes the frozen weights, so that "
            "the exported adapter would not fit its base: use true or 'gaussian'"
        )
    if options["task_type"] != "CAUSAL_LM":
        raise ValueError(f"lora's task_type is {options['task_type']!r}: remove it, or write 'CAUSAL_LM'")

    # The default for modules would add adapters besides the parameters that the user named.
    if "target_parameters" in lora and "target_modules" not in lora:
        options["target_modules"] = None
    try:
        return LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={dict(lora)!r} is refused by peft: {first_line(error)}") from error


def add_adapter(base: PreTrainedModel, config: LoraConfig, source: str) -> PeftModel:
    """Adds a new adapter to a model.

    Args:
        base: the model.
        config: the adapter's.
        source: name of the base in the exported adapter: a hub id, or a folder as the user wrote it.

    Raises:
        ValueError: the model cannot have such an adapter.
    """
    try:
        with _quiet_peft():
            model = get_peft_model(base, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot add a LoRA adapter to {type(base).__name__}: {first_line(error)}") from error

    # The name as the user wrote it, so that an export can be loaded elsewhere.
    config.base_model_name_or_path = source
    _tie(model, "default")
    return cast(PeftModel, model)


def load_adapter(place: str, config_file: str, load: Callable[[str], PreTrainedModel], *, trainable: bool) -> PeftModel:
    """Loads an adapter on its base model and, where it will be trained, a frozen copy of it.

    A base given as a relative path is searched from the working directory, and then from the adapter's folder and its
    parents, so that a folder with both can be moved as a whole.

    Args:
        place: the adapter's folder or hub id.
        config_file: its ``adapter_config.json``.
        load: loads a base model by its name.
        trainable: whether it will be trained further.

    Raises:
        ValueError: the adapter or its base cannot be loaded.
    """
    # Reject other kinds of adapters before the base model is loaded, which may take minutes.
    config = read_json(config_file)
    kind, source = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ValueError(f"the adapter in {place!r} is of type {kind!r}: only LORA adapters can be trained further")
    if not source:
        raise ValueError(f"the adapter in {place!r} names no base model: set base_model_name_or_path in {config_file}")
    unsupported = next((name for name in _UNSUPPORTED if config.get(name)), None)
    if unsupported is not None and trainable:
        raise ValueError(f"the adapter in {place!r} was made with {unsupported}, which cannot be trained further")

    # A wrong base is reported together with the file that names it.
    source = locate_base(source, place)
    try:
        base = load(source)
    except ValueError as error:
        raise ValueError(f"{error} (it is the base_model_name_or_path in {config_file})") from error

    # The adapter was trained with these settings, which may differ from the base's.
    _take_generation_config(base, place)
    if cached_file(place, ROPE_PARAMETERS, **_IF_THERE):
        take_long_rotary(base)

    try:
        with _quiet_peft():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, place, is_trainable=trainable)
            _tie(model, "default")
            if trainable:
                _add_copy(model)
    except (*LOADING_ERRORS, UserWarning) as error:
        reason = damaged_weights(place) or first_line(error)
        raise ValueError(f"cannot load the adapter in {place!r} on {source!r}: {reason}") from error
    model.peft_config["default"].base_model_name_or_path = source
    return model


def locate_base(source: str, place: str | Path) -> str:
    """Finds the base model of an adapter: as written, or relative to the adapter's folder or a parent.

    Args:
        source: the adapter's ``base_model_name_or_path``.
        place: the adapter's folder.

    Returns:
        The source as written, or an absolute path where it was found from the adapter's folder.
    """
    path, folder = Path(source).expanduser(), Path(place).resolve()
    if path.is_absolute() or path.exists() or not folder.is_dir():
        return source
    # A relative path was relative to the folder in which training ran, which is often above the adapter's.
    found = (above / path for above in (folder, *folder.parents) if (above / path / "config.json").is_file())
    return str(next(found, source))


def tied_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Returns the weights that tied layers share, under the names that peft stores them by."""
    tied = {name: module for name, module in model.named_modules() if isinstance(module, TiedLinear)}
    ending = f".{adapter}"
    return {f"{n.removesuffix(ending)}.weight": m.weight for n, m in tied.items() if n.endswith(ending)}


def num_members(model: nn.Module) -> int:
    """Returns the number of members of an ensemble that take turns on a model: 1 of any other model."""
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    return 1 + sum(part.startswith(MEMBER_PREFIX) for part in parts)


def _tie(model: Any, adapter: str) -> None:
    """Makes the adapter of a tied output projection use the embedding's weights.

    peft makes separate parameters in the same memory, which diverge when the model is moved to another device, and
    which an optimizer updates one after the other.
    """
    config = model.peft_config[adapter]
    base = model.get_base_model()
    source, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not (config.ensure_weight_tying and getattr(config, "target_modules_to_tie", None)):
        return
    if not isinstance(source, LoraLayer) or not isinstance(head, LoraLayer):
        return
    if adapter not in head.lora_A:
        # peft does not find the tied layers of a second adapter.
        first = next(iter(head.lora_A))
        layer: Any = head
        layer.update_layer(adapter, head.r[first], head.lora_alpha[first], config)
    leaf = next(name for name, module in base.named_modules() if module is source).rpartition(".")[2]
    if leaf != "embed_tokens":
        raise ValueError(
            f"lora's ensure_weight_tying with target_modules: peft ties adapters of embeddings called embed_tokens, "
            f"and this model's is {leaf!r}: use modules_to_save, or remove ensure_weight_tying"
        )
    embedding: Any = source
    head.lora_A[adapter] = TiedLinear(embedding, "lora_embedding_B", adapter)
    head.lora_B[adapter] = TiedLinear(embedding, "lora_embedding_A", adapter)
    head.kwargs.pop("tied_adapter", None)


def _add_copy(model: PeftModel) -> None:
    """Adds a frozen copy of the loaded adapter.

    Biases belong to the base model's layers and not to an adapter: peft allows only one adapter with biases, and the
    reference policy keeps copies of them.
    """
    config: Any = copy.deepcopy(model.peft_config["default"])
    # Trained biases belong to the base model; the reference keeps its own copies of them.
    config.bias, config.inference_mode = "none", True
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(ADAPTER_COPY, config)
    _tie(model, ADAPTER_COPY)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            parts = name.split(".")
            # In the precision of the original, which peft may have chosen otherwise.
            if ADAPTER_COPY in parts:
                own = ".".join("default" if part == ADAPTER_COPY else part for part in parts)
                parameter.data = parameter.data.to(state[own].dtype)
                parameter.copy_(state[own])
            parameter.requires_grad_(name in trainable)


def _take_generation_config(base: PreTrainedModel, place: str) -> None:
    """Takes the generation config, with its end tokens, from an adapter's folder."""
    if (Path(place) / "generation_config.json").is_file() and base.can_generate():
        base.generation_config = GenerationConfig.from_pretrained(place)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hides warnings of peft 0.21 about its own calls, which users cannot fix."""
    with warnings.catch_warnings():
        # It calls transformers 5.23 by a deprecated name, and adds its own patterns for fused experts.
        warnings.filterwarnings("ignore", message=r".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys .*: \['\.\*[\\]+\.gate_up_proj'\]")
        yield
