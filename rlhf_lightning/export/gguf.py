"""Exports a model as a GGUF file, which llama.cpp and programs on it read."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.files import PARTIAL, flush_to_disk, hidden_sibling
from ..utils.validation import check_choice
from .gguf_metadata import ROPE_FACTORS, check_config, context_length, needs_factors, write_config
from .gguf_mixes import MIXES, quantiser
from .gguf_proof import check_model, check_tokenizer
from .gguf_tensors import (
    FILE_TYPES,
    TYPES,
    byte_shape,
    gguf_package,
    named_tensors,
    quantised,
    rope_factors,
    rounded,
    tensor_types,
)
from .gguf_tokenizer import tokenizer_fields, write_tokenizer
from .proof import continued, encoded_prompts, load_source

_MAGIC = b"GGUF"
# A key near the beginning of each file, by which it is known as the package's.
_MARK = "rlhf_lightning.export"
_PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}


@dataclass(frozen=True)
class GGUFExport:
    """A file that was written and checked.

    Args:
        path: of the file.
        types: number of tensors by the type that they are stored in.
        logit_error: largest difference between the file's logits and those of the rounded weights, relative to the
            logits' spread.
        rounding: largest difference between logits of rounded and unrounded weights, relative to their spread: what
            the type costs.
        greedy_agreement: share of greedy tokens, given the same text before them, that rounding leaves as they were.
    """

    path: Path
    types: dict[str, int]
    logit_error: float
    rounding: float
    greedy_agreement: float


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    type: str = "q8_0",
    check_prompts: Sequence[str] = ("2+2=", "What is the capital of France?"),
    say: Callable[[str], None] = lambda line: None,
) -> GGUFExport:
    """Writes a model, its tokenizer and its chat template as one file, and proves that the file is the model.

    The file is loaded again with transformers' reader of such files, and with a config that is made of its metadata
    alone. On the prompts and their greedy continuations its logits must equal those of the model with weights rounded
    as the type rounds them, to 1e-4 of their spread, the greedy tokens must be equal, and the tokenizer must read the
    prompts and name special tokens as the model's does. Otherwise there is no file.

    Args:
        model: folder or hub id of a Llama, Mistral, Qwen2, Qwen3, Gemma 2 or Phi-3, or of a LoRA adapter on one, which
            is merged.
        output: the file; an earlier export there is replaced.
        type: of matrices: ``f32``, ``f16``, ``bf16``; ``q8_0``, ``q5_0`` or ``q4_0`` (so many bits, and a scale for
            every 32), ``q5_1`` or ``q4_1`` (an offset as well);
            or mixes of K-quants (blocks of 256), rounded by llama.cpp's own quantiser, which the extra ``llama-cpp``
            brings: ``q4_k_s``, ``q4_k_m``, ``q5_k_s``, ``q5_k_m`` or ``q6_k``. Vectors are stored in f32. Rows that 256
            does not divide have q5_0, q5_1 and q8_0 instead of q4_k, q5_k and q6_k; rows that 32 does not divide, f16.
        check_prompts: texts to check with, at least one; take some that the model is for.
        say: called with a line for each part of the work.

    Returns:
        The path, and what rounding costs.

    Raises:
        ValueError: the package ``gguf`` (or, for K-quants, llama.cpp) is missing, the model or its tokenizer has no
            place in the format, or the file does not compute what the model computes.

    Example:
        >>> export_gguf("runs/dpo/model", "model.gguf", type="q8_0", check_prompts=["2+2="])  # doctest: +SKIP
    """
    check_choice("type", type, TYPES)
    gguf_package()
    if type in MIXES:
        quantiser()
    target = Path(output).expanduser().resolve()
    _check_target(target)
    with tempfile.TemporaryDirectory() as scratch:
        loaded, tokenizer = load_source(model, Path(scratch))
    architecture = check_config(loaded.config)
    positions = context_length(loaded.config)
    prompts = encoded_prompts(tokenizer, check_prompts, positions)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = hidden_sibling(target, PARTIAL)
    try:
        types = write_file(fresh, loaded, tokenizer, architecture, type)
        say(f"wrote {sum(types.values())} tensors; loading the file again")
        if not tokenizer_fields(tokenizer, int(loaded.config.vocab_size)).merges:
            warnings.warn(
                "the tokenizer has single characters and no merges: transformers reads such a file, llama.cpp does not",
                stacklevel=2,
            )
        before = continued(loaded, prompts, positions)
        _round(loaded, architecture, type)
        after = continued(loaded, prompts, positions)
        try:
            check_tokenizer(fresh, tokenizer, check_prompts)
            error = check_model(fresh, after, check_prompts)
        except ValueError as reason:
            raise ValueError(f"the export is not the model, and was removed: {reason}") from reason
        flush_to_disk(fresh)
        fresh.replace(target)
        flush_to_disk(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
    say(f"{target}: equal to {error:.1g} of the logits' spread")
    cost, agreement = _cost(loaded, before)
    return GGUFExport(target, types, error, cost, agreement)


def write_file(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: str, type: str
) -> dict[str, int]:
    """Writes a file tensor by tensor, unchecked.

    Args:
        path: the file.
        model: the model, in fp32.
        tokenizer: its tokenizer.
        architecture: its name in the format.
        type: of matrices.

    Returns:
        The number of tensors by type.
    """
    gguf = gguf_package()
    writer: Any = gguf.GGUFWriter(str(path), architecture)
    try:
        fields = tokenizer_fields(tokenizer, int(model.config.vocab_size))
        writer.add_bool(_MARK, True)
        writer.add_name(_name(architecture, fields.tokens))
        writer.add_file_type(FILE_TYPES[type])
        if type.startswith("q"):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_config(writer, model.config, architecture)
        write_tokenizer(writer, fields)

        # The table of tensors comes first, so that one tensor at a time is in memory.
        tensors = {place: tensor for place, (_, tensor) in named_tensors(model, architecture).items()}
        if needs_factors(model.config):
            tensors[ROPE_FACTORS] = rope_factors(model)
        kinds = tensor_types(model, tensors, type)
        for place, tensor in tensors.items():
            shape, dtype = byte_shape(tuple(tensor.shape), kinds[place])
            size = dtype.itemsize
            for length in shape:
                size *= length
            kind = gguf.GGMLQuantizationType[kinds[place].upper()]
            writer.add_tensor_info(place, shape, dtype, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, tensor in tensors.items():
            writer.write_tensor_data(quantised(tensor, kinds[place]))
    finally:
        writer.close()
    return dict(Counter(kinds.values()))


def _name(architecture: str, tokens: Sequence[str]) -> str:
    """Names the file, whose name tells loaders how to treat it: by the architecture.

    llama.cpp looks up tokens of Phi-3 in files of that name, and does not load them without.
    """
    return architecture if architecture != "phi3" or set(tokens) >= _PHI3_TOKENS else "model"


@torch.no_grad()
def _round(model: PreTrainedModel, architecture: str, type: str) -> None:
    """Rounds a model's weights as the file does; the order of rows changes no block."""
    state, named = model.state_dict(), named_tensors(model, architecture)
    kinds = tensor_types(model, {place: tensor for place, (_, tensor) in named.items()}, type)
    for place, (name, _) in named.items():
        if kinds[place] != "f32":
            state[name].copy_(rounded(state[name], kinds[place]))


def _cost(model: PreTrainedModel, before: Any) -> tuple[float, float]:
    """Compares rounded weights with unrounded ones on the same texts."""
    worst, same, count = 0.0, 0, 0
    with torch.no_grad():
        for row, length, logits_LV in zip(before.tokens, before.lengths, before.logits, strict=True):
            found_LV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
            spread = float((logits_LV - logits_LV.mean(-1, keepdim=True)).square().mean().sqrt())
            worst = max(worst, float((found_LV - logits_LV).abs().max()) / max(spread, 1e-12))
            answers = slice(length - 1, len(row))
            same += int((found_LV[answers].argmax(-1) == logits_LV[answers].argmax(-1)).sum())
            count += len(row) - length + 1
    return worst, same / count


def _check_target(target: Path) -> None:
    """Refuses to replace what is no export."""
    if target.is_dir():
        raise ValueError(f"output {str(target)!r} is a folder: name a file, such as model.gguf")
    if target.is_file():
        with target.open("rb") as file:
            begins = file.read(1024)
        if begins and not (begins.startswith(_MAGIC) and _MARK.encode() in begins):
            raise ValueError(
                f"output {str(target)!r} exists and was not written by this package: move it away, or choose another "
                "name"
            )
