"""Exports a trained model as a plain Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..utils.files import check_replaceable, on_first_rank, write_atomically
from ..utils.folders import replace_folder
from .adapters import ROPE_PARAMETERS, tied_state
from .half_weights import HalfLinear
from .merged_weights import merged_state, trained_adapter
from .rotary import long_rotary_parameters

log = logging.getLogger(__name__)

Convert = Callable[[PreTrainedModel, dict[str, Tensor]], tuple[PreTrainedModel, dict[str, Tensor]]]


def save_pretrained(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge_adapter: bool = False,
    convert: Convert | None = None,
    extra_files: Callable[[Path], object] | None = None,
    note: Callable[[Path], object] | None = None,
    end_tokens: Sequence[int] | None = None,
) -> Path:
    """Writes a model and its tokenizer as a Hugging Face folder: safetensors, config, tokenizer, chat template.

    The folder is written under a hidden name next to its place, flushed to disk, and renamed when it is complete; an
    earlier one stays until then. A killed process leaves the old folder or the new one (between two renames, the old
    one under a hidden name; the next call restores it). The model itself is unchanged, so training can continue.

    Merging computes ``W + (alpha / r) B A`` in the dtype of ``W``; quantised weights are dequantised first and written
    in the model's dtype, since quantising the sum again would lose part of the training.

    Where several processes train one model, every rank calls this; sharded weights are gathered and rank 0 writes.

    Args:
        model: a causal language model, or one with a LoRA adapter.
        tokenizer: its tokenizer.
        folder: destination; an export of the same kind (model or adapter, with or without a head) is replaced, and
            a folder with other files is refused.
        merge_adapter: add the adapter to the weights and write the whole model, instead of the adapter alone.
        convert: turns the model and its whole state dict into another model and its state dict, which is then written;
            not for an adapter alone.
        extra_files: writes the files of a head into the folder, on the rank that writes; it is then of another kind.
        note: writes more files, which do not make it a folder of another kind.
        end_tokens: tokens that end trained answers; by default the tokenizer's end-of-sequence token. They are written
            into ``generation_config.json``, before those of the model, so that generation ends there.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: the place is taken by something else, or the model cannot be written that way.

    Example:
        >>> save_pretrained(model, tokenizer, "runs/dpo/export", merge_adapter=True)  # doctest: +SKIP
        PosixPath('/home/me/runs/dpo/export')
    """
    target = Path(folder).expanduser().resolve()
    kind = export_kind(model, merge_adapter=merge_adapter, with_head=extra_files is not None)
    on_first_rank(lambda: check_replaceable(target, kind))
    # Gathering weights is collective, so every rank does it; only the first one writes.
    adapted = model if isinstance(model, PeftModel) and not merge_adapter else None
    ends = [tokenizer.eos_token_id] if end_tokens is None else list(end_tokens)
    write = _model_writer(model, convert, ends) if adapted is None else _adapter_writer(adapted, ends)
    writers: list[Callable[[Path], object]] = [write, tokenizer.save_pretrained]
    writers += [more for more in (extra_files, note) if more is not None]
    with _without_progress_bars():
        on_first_rank(lambda: replace_folder(target, kind, lambda place: [each(place) for each in writers]))
    return target


# Contents of the folder.


def _adapter_writer(model: PeftModel, end_tokens: Sequence[Any]) -> Callable[[Path], None]:
    """Gathers the trained adapter; returns a function that writes it in peft's own layout."""
    adapter = trained_adapter(model)
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs between processes
            setattr(config, name, sorted(value))
    # Embeddings are never resized here, and the check for that would query the hub.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    state = {name: _whole(tensor) for name, tensor in (state | tied_state(model, adapter)).items()}
    base = cast(PreTrainedModel, model.get_base_model())
    generation, rotary = _generation_config(base, end_tokens), long_rotary_parameters(base)
    if rotary is not None and _is_writer():
        log.warning(
            "the adapter was trained with LongRoPE's frequencies for long sequences: elsewhere, load its base "
            "with the rope_parameters in %s next to it, or export the whole model (merge_adapter=True)",
            ROPE_PARAMETERS,
        )

    def write(place: Path) -> None:
        config.save_pretrained(str(place))
        if generation is not None:
            generation.save_pretrained(str(place))
        if rotary is not None:
            write_atomically(place / ROPE_PARAMETERS, json.dumps(rotary, indent=2) + "\n")
        # Copies, since safetensors refuses two names for the same memory, as tied modules have.
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})

    return write


def _model_writer(
    model: PreTrainedModel | PeftModel, convert: Convert | None, end_tokens: Sequence[Any]
) -> Callable[[Path], None]:
    """Gathers all weights, with an adapter merged; returns a function that writes them in transformers' layout."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base is model and getattr(base, "quantization_method", None) is not None:
        raise ValueError("the model is quantised and has no adapter: there is nothing in it that its source lacks")
    state = merged_state(model) if isinstance(model, PeftModel) else base.state_dict()
    state = {name: _whole(tensor) for name, tensor in state.items()}
    for name, module in base.named_modules():
        if isinstance(module, HalfLinear) and f"{name}.weight" in state:  # written in the precision it was loaded in
            state[f"{name}.weight"] = state[f"{name}.weight"].float()
    if convert is not None:
        base, state = convert(base, state)
    shell = _shell(base, state, end_tokens)
    return lambda place: shell.save_pretrained(place, state_dict=dict(state))


def _shell(base: PreTrainedModel, state: dict[str, Tensor], end_tokens: Sequence[Any]) -> PreTrainedModel:
    """Makes a shallow copy of a model for ``save_pretrained``, which changes the config of the model it saves."""
    # fully_shard has changed the class: its base is the one that can be loaded.
    plain = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    shell: Any = plain.__new__(plain)
    shell.__dict__.update(base.__dict__)
    shell.config = copy.deepcopy(base.config)
    # Quantisation and placement belong to this run and not to the written weights.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        shell.config.__dict__.pop(name, None)
    for name in ("hf_quantizer", "hf_device_map", "quantization_method", "_hf_peft_config_loaded"):
        shell.__dict__.pop(name, None)
    _settle_ties(shell, state)
    if (generation := _generation_config(shell, end_tokens)) is not None:
        shell.generation_config = generation
    return cast(PreTrainedModel, shell)


def _generation_config(model: PreTrainedModel, end_tokens: Sequence[Any]) -> GenerationConfig | None:
    """Copies a model's generation config and puts the end tokens of trained answers before its own."""
    if not model.can_generate():
        return None
    config: Any = copy.deepcopy(model.generation_config)
    try:
        config.validate(strict=True)
    except ValueError as error:
        log.warning("the generation config is invalid and is not exported: %s", str(error).splitlines()[0])
        config = GenerationConfig.from_model_config(model.config)
    # The first end token is the one that generate() pads with.
    before = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [int(token) for token in dict.fromkeys((*end_tokens, *before)) if token is not None]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return cast(GenerationConfig, config)


def _settle_ties(shell: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Keeps one of two tied weights, or unties them in the config if an adapter has made them differ."""
    tied: dict[str, str] = getattr(shell, "all_tied_weights_keys", None) or {}
    pairs = [(copy_of, kept) for copy_of, kept in tied.items() if copy_of in state and kept in state]
    # Still equal: one copy in the file, as transformers expects.
    if all(torch.equal(state[copy_of], state[kept]) for copy_of, kept in pairs):
        for copy_of, _ in pairs:
            del state[copy_of]
        return
    shell.config.tie_word_embeddings = False
    shell.config.get_text_config().tie_word_embeddings = False
    shell.all_tied_weights_keys = {}


def export_kind(model: nn.Module, *, merge_adapter: bool = False, with_head: bool = False) -> str:
    """Names the kind of folder that ``save_pretrained`` writes for a model; one kind never replaces another."""
    kind = "adapter" if isinstance(model, PeftModel) and not merge_adapter else "model"
    return f"{kind} with a head" if with_head else kind


def _whole(tensor: Tensor) -> Tensor:
    """Returns an unsharded tensor, on the CPU of the rank that writes."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if _is_writer() else tensor.detach()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hides transformers' progress bars: nested in a trainer's, in a notebook, they would recurse endlessly."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _is_writer() -> bool:
    return not _is_distributed() or dist.get_rank() == 0
