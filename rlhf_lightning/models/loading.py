"""Loads tokenizers, and causal language models that are ready for training.

Unlike with transformers alone, the dtype is the requested one, the model is in training mode, a weight that is missing
in a checkpoint is an error instead of random, and quantised layers compute the same in training and in evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..sequences import ATTENTION_NAMES, register_attention
from ..utils.packaged_configs import packaged_config
from ..utils.quiet import without_load_report
from .adapters import LOADING_ERRORS, add_adapter, load_adapter, locate_base, lora_config
from .compiled_layers import compile_layers
from .dropout import recompute, set_dropout
from .meta_init import skeletons_wanted, weights_device
from .own_attention import EAGER, set_attention
from .quantization import Quantization, quantization_config, steady_quantised_layers
from .safetensors_io import damaged_weights, first_line, read_json

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    A tokenizer without padding token pads with the end-of-sequence token; only masks decide which positions count, so
    the choice cannot change a result.

    Args:
        source: a folder or hub id with a tokenizer; for an adapter without one, its base model's is loaded.

    Raises:
        ValueError: the folder has no tokenizer, or that has no end-of-sequence token.

    Example:
        >>> load_tokenizer("runs/sft/export").eos_token  # doctest: +SKIP
        '<eos>'
    """
    place = locate(source, what="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except LOADING_ERRORS as error:
        # A folder of an adapter may lack a tokenizer: its base has one.
        adapter = find_adapter_config_file(place)
        base = read_json(adapter).get("base_model_name_or_path") if adapter else None
        if base:
            return load_tokenizer(locate_base(base, place))
        raise ValueError(f"no tokenizer in {str(source)!r} ({_without_tokenizer(place, first_line(error))}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {str(source)!r} has no end-of-sequence token, without which no completion can end: "
            "set eos_token in its tokenizer_config.json"
        )
    # Padding is masked, so that any token will do.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without_tokenizer(place: str, reason: str) -> str:
    """Says why a place has no tokenizer, and what to pass instead."""
    folder = Path(place)
    if not folder.is_dir():
        where = f"not a folder, {str(folder.absolute())!r}, and not loaded from the hub: {reason}"
        return f"{where}): pass an existing folder, or a hub id that is cached or can be reached"
    # The folder of a run instead of its export.
    export = folder / "model"
    near = f"; did you mean {str(export)!r}?" if (export / "tokenizer_config.json").is_file() else ""
    advice = "pass as tokenizer a folder that holds tokenizer.json and tokenizer_config.json, or a hub id"
    return f"{reason}): {advice}{near}"


def first_difference(expected: Mapping[str, int], tokens: Mapping[str, int]) -> str | None:
    """Describes the first token that two vocabularies number differently; ``None`` where they are equal.

    Example:
        >>> first_difference({"a": 0, "b": 1}, {"a": 0, "c": 1})
        "the token 'b' is 1 in one and missing in the other"
    """
    if tokens == expected:
        return None
    last = sys.maxsize
    odd = min(
        (token for token in {**expected, **tokens} if expected.get(token) != tokens.get(token)),
        # Two tokens that are exchanged share their smaller number: the first vocabulary's order decides.
        key=lambda token: (min(expected.get(token, last), tokens.get(token, last)), expected.get(token, last)),
    )
    places = expected.get(odd, "missing"), tokens.get(odd, "missing")
    return f"the token {odd!r} is {places[0]} in one and {places[1]} in the other"


def load_causal_lm(
    model: str | Path,
    *,
    dtype: torch.dtype,
    init: Literal["pretrained", "random"] = "pretrained",
    quantization: Quantization | None = None,
    lora: Mapping[str, Any] | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    attn_implementation: str | None = None,
    trainable: bool = True,
    headless: bool = False,
) -> PreTrainedModel | PeftModel:
    """Loads a causal language model, in training mode and in the requested dtype.

    LoRA (Hu et al. 2021, arXiv 2106.09685): ``W x + (alpha / r) B A x`` with ``W`` frozen. QLoRA (Dettmers et al. 2023,
    arXiv 2305.14314): ``W`` in 4 bits with doubly quantised scales, products in ``dtype``, or in the precision of
    autocast where there is one. Adapters are kept in fp32 where ``dtype`` is a half precision.

    A folder or hub id that holds an adapter loads its base model and continues training the adapter; a second, frozen
    adapter ``ref`` keeps the loaded weights, because with the adapter off the reference would be the base.

    LLM.int8() on CUDA selects outlier columns over the whole batch, so that the last digits of int8 results depend on
    the batch; those of ``nf4`` and ``fp4`` do not.

    Args:
        model: a folder or hub id of a model or an adapter; with ``init="random"``, config.json is enough.
        dtype: float32, bfloat16, float16 or float64, for every weight that is not quantised.
        init: ``random`` draws weights from torch's random state instead of reading them.
        quantization: ``nf4``, ``fp4`` or ``int8`` by bitsandbytes; only adapters can be trained then.
        lora: arguments of peft's ``LoraConfig``, such as ``{"r": 16, "lora_alpha": 32}``; ``target_modules`` is
            ``"all-linear"`` unless given.
        dropout: every dropout rate in training, overriding those of the config and of ``lora``; 0 leaves them, since
            the mode switches dropout off (see ``switch_off_dropout``).
        gradient_checkpointing: keep layer inputs only and recompute the rest in the backward pass.
        compile: run decoder layers compiled, see ``compile_layers``; not with quantised weights.
        attn_implementation: a name that transformers knows; None is the model's default.
        trainable: False freezes everything and leaves the model in evaluation mode, as for a reference.
        headless: allow a missing output projection, as in a sequence classifier; it is then random and must not be
            used.

    Raises:
        ValueError: nothing is found, weights are missing, or the options contradict each other.

    Example:
        >>> model = load_causal_lm("runs/sft/export", dtype=torch.bfloat16, lora={"r": 16})  # doctest: +SKIP
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # doctest: +SKIP
        1081344
    """
    _check_options(dtype=dtype, init=init, quantization=quantization, lora=lora, trainable=trainable)
    config = lora_config(lora) if lora is not None else None
    place = locate(model, what="model")
    adapter = find_adapter_config_file(place)
    if quantization is not None and trainable and lora is None and adapter is None:
        raise ValueError(f"quantization={quantization!r} without lora leaves nothing to train: pass lora={{'r': 16}}")
    for kernel, name in ATTENTION_NAMES.items():
        if name == attn_implementation:
            register_attention(kernel)
    load = partial(
        _load_base,
        dtype=dtype,
        quantization=quantization,
        attn_implementation=attn_implementation,
        headless=headless,
    )

    # An adapter brings its base model with it; otherwise the folder holds the model itself.
    loaded: PreTrainedModel | PeftModel
    if adapter is not None:
        if lora is not None or init == "random":
            raise ValueError(
                f"{str(model)!r} holds an adapter, which is trained further: remove lora and init, "
                "or pass the base model's folder to start a new adapter"
            )
        loaded = load_adapter(place, adapter, lambda base: load(locate(base, what="base model")), trainable=trainable)
    elif init == "random":
        loaded = _random_model(place, dtype=dtype, attn_implementation=attn_implementation)
    else:
        base = load(place)
        if trainable and lora is None and getattr(base, "quantization_method", None) is not None:
            raise ValueError(f"the weights in {str(model)!r} are quantised and stay frozen: pass lora={{'r': 16}}")
        loaded = base if config is None else add_adapter(base, config, _written(model))

    # After adapters were added, since they have rates as well.
    if dropout:
        set_dropout(loaded, dropout)
    if gradient_checkpointing:
        _enable_checkpointing(loaded)
    if compile:
        compile_layers(loaded)
    return loaded.train() if trainable else loaded.requires_grad_(False).eval()


def load_adapted_lm(
    model: str | Path, adapter: str | Path, *, dtype: torch.dtype, attn_implementation: str | None = None
) -> PeftModel:
    """Loads a causal language model with an adapter on it, frozen and in evaluation mode.

    Args:
        model: a folder or hub id of the base model, whichever one the adapter names.
        adapter: a folder or hub id of an adapter.
        dtype: of the base model's weights.
        attn_implementation: as for ``load_causal_lm``.

    Raises:
        ValueError: one of them is not found, or the adapter does not fit the model.
    """
    place = locate(adapter, what="adapter")
    config = find_adapter_config_file(place)
    if config is None:
        raise ValueError(f"adapter {str(adapter)!r} holds no adapter_config.json: give the folder of an adapter")
    if find_adapter_config_file(locate(model, what="model")) is not None:
        raise ValueError(f"model {str(model)!r} holds an adapter itself: give its base model, or leave out adapter")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "trainable": False}
    loaded = load_adapter(place, config, lambda base: load_causal_lm(model, **options), trainable=False)  # type: ignore[arg-type, return-value]
    return loaded.requires_grad_(False).eval()


def load_adapted_tokenizer(model: str | Path, adapter: str | Path | None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model with an adapter on it: the adapter's own, if its folder has one.

    Raises:
        ValueError: neither has a tokenizer.
    """
    own = adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file()
    return load_tokenizer(adapter if own and adapter is not None else model)


def _check_options(
    *,
    dtype: torch.dtype,
    init: str,
    quantization: str | None,
    lora: Mapping[str, Any] | None,
    trainable: bool,
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}: use one of {', '.join(map(str, _DTYPES))}")
    if init not in ("pretrained", "random"):
        raise ValueError(f"init is {init!r}: use 'pretrained' or 'random'")
    if quantization not in (None, "nf4", "fp4", "int8"):
        raise ValueError(f"quantization is {quantization!r}: use 'nf4', 'fp4' or 'int8', or omit it")
    if init == "random" and quantization is not None:
        raise ValueError(
            f"quantization={quantization!r} with init='random' would freeze random weights: remove one of them"
        )
    if init == "random" and lora is not None:
        raise ValueError("lora with init='random' would adapt random weights that stay frozen: remove one of them")
    if lora is not None and not trainable:
        raise ValueError(f"trainable=False with a new adapter, lora={dict(lora)!r}: remove lora")
    if quantization is not None and dtype == torch.float64:
        raise ValueError(f"quantization={quantization!r} does not compute in float64: use float32, bfloat16 or float16")


def locate(source: str | Path, *, what: str) -> str:
    """Resolves a folder here or in the package's configs to an absolute path; returns a hub id unchanged."""
    path = packaged_config(source) or Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise ValueError(f"the {what} {str(source)!r} is a file: pass the folder that holds it")
    text = str(source)
    # A hub id has at most one slash; anything else was meant as a path.
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ValueError(f"there is no folder {str(path.absolute())!r} to load the {what} from")
    return text


def _written(source: str | Path) -> str:
    """Returns the base's name for an adapter's config: as the user wrote it, with a home folder expanded."""
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)


def _load_base(
    place: str,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None,
    attn_implementation: str | None,
    headless: bool,
) -> PreTrainedModel:
    """Reads a model, and refuses an incomplete one."""
    # Under fsdp2 only rank 0 reads weights.
    if skeletons_wanted():
        return _random_model(place, dtype=dtype, attn_implementation=attn_implementation)

    config = read_config(place)
    arguments: dict[str, Any] = {"dtype": dtype}
    stored = getattr(config, "quantization_config", None)
    if stored is not None and quantization is not None:
        raise ValueError(f"the weights of {place!r} are quantised already: remove quantization={quantization!r}")
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, dtype)
    if quantization is not None or stored is not None:
        # On the caller's default device (say, the trainer's), and not on any accelerator there is.
        arguments["device_map"] = {"": torch.get_default_device()}
    # Of a classifier the heads differ, as they must; what else is missing is an error below.
    expected = headless and str((config.architectures or ("",))[0]).endswith("ForSequenceClassification")
    try:
        with without_load_report() if expected else nullcontext():
            loaded: Any = _with_attention(
                partial(AutoModelForCausalLM.from_pretrained, place, output_loading_info=True, **arguments),
                attn_implementation,
            )
    except LOADING_ERRORS as error:
        reason = damaged_weights(place) or first_line(error)
        raise ValueError(f"cannot load a causal language model from {place!r}: {reason}") from error

    # A headless model may lack its output projection, which nothing reads; any other missing weight is an error.
    model, report = loaded
    head = model.get_output_embeddings() if headless else None
    idle = {name for name, module in model.named_modules() if module is head and head is not None}
    if missing := sorted(key for key in report["missing_keys"] if key.rpartition(".")[0] not in idle):
        raise ValueError(
            f"{len(missing)} weights of {type(model).__name__} are missing in {place!r}, the first {missing[0]!r}: "
            "the checkpoint is incomplete or belongs to another architecture"
        )
    steady_quantised_layers(model)
    return model  # type: ignore[no-any-return]


def _with_attention(build: Callable[..., Any], attn_implementation: str | None) -> Any:
    """Builds a model with a registered attention where its class supports that, else with its own eager one."""
    if attn_implementation is None:
        return build()
    if attn_implementation not in ATTENTION_NAMES.values():
        return build(attn_implementation=attn_implementation)
    # Classes without support accept any name, but add a mask of another form to their scores.
    built = build(attn_implementation=EAGER)
    set_attention(built[0] if isinstance(built, tuple) else built, attn_implementation)
    return built


def _random_model(place: str, *, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    read_config(place)
    try:
        with weights_device():
            model: PreTrainedModel = _with_attention(
                lambda **arguments: AutoModelForCausalLM.from_config(read_config(place), dtype=dtype, **arguments),
                attn_implementation,
            )
        return model
    except LOADING_ERRORS as error:
        raise ValueError(
            f"cannot build a causal language model from {place}/config.json: {first_line(error)}"
        ) from error


def read_config(place: str) -> PreTrainedConfig:
    """Reads a model's config.

    Args:
        place: a folder or hub id, as ``locate`` gives it.

    Raises:
        ValueError: the folder has no config, or it cannot be read.
    """
    folder = Path(place)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{place!r} holds no config.json: pass a folder that save_pretrained wrote, or a hub id")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place)
        return config
    except LOADING_ERRORS as error:
        if folder.is_dir():
            raise ValueError(f"cannot read {place}/config.json: {first_line(error)}") from error
        raise ValueError(
            f"{place!r} is not a folder (looked for {str(folder.absolute())!r}) and could not be loaded from the hub "
            f"({first_line(error)}): pass an existing folder, or a hub id that is cached or can be reached"
        ) from error


def _enable_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Turns on checkpointing without re-entrance.

    It does not need the first layer's input to require a gradient, so adapters need no hook on the embeddings (which
    would also send the backward pass through layers below the first adapter).
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"{type(base).__name__} cannot checkpoint ({first_line(error)}): leave gradient_checkpointing off"
        ) from error
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = recompute
