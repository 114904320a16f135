"""Reads a GGUF file back, and compares what it computes and how it reads text with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .gguf_metadata import ROPE_FACTORS, read_config
from .gguf_tensors import default_frequencies, gguf_package
from .proof import Expected, compare_models, compare_tokenizers


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file's metadata and tensors."""
    reader = gguf_package().GGUFReader(str(path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def load_file(path: Path) -> PreTrainedModel:
    """Loads a file with the loader of transformers, and the config that the file describes.

    Raises:
        ValueError: it does not load.
    """
    metadata, tensors = read_metadata(path)
    config = read_config(metadata, list(tensors))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the file does not load: {(str(error).splitlines() or [''])[0]}") from error
    if ROPE_FACTORS in tensors:
        factors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = default_frequencies(model) / factors
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def check_model(path: Path, expected: Expected, prompts: Sequence[str]) -> float:
    """Compares a file with what the rounded weights compute.

    Args:
        path: the file.
        expected: of the model that it was made from, with weights rounded as in the file.
        prompts: texts, which errors name.

    Returns:
        The largest difference of logits, relative to their spread.

    Raises:
        ValueError: it does not load, or computes something else.
    """
    model = load_file(path)
    try:
        return compare_models(model, expected, prompts)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the file does not run: {(str(error).splitlines() or [''])[0]}") from error


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Compares a file's tokenizer with the model's.

    Raises:
        ValueError: it does not load, or reads a prompt or names a special token differently.
    """
    try:
        other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer does not load: {(str(error).splitlines() or [''])[0]}") from error
    compare_tokenizers(tokenizer, other, prompts)
