"""Opens the models of a merge, and checks that they can be merged: the same tensors, tokenizer and vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..models.loading import first_difference, locate
from ..models.safetensors_io import first_line, read_json
from .adapter_files import CONFIG, is_adapter, read_adapter
from .adapter_weights import Derived, adapted_tensors
from .tensor_files import StoredTensor, stored_tensors, weight_files

Readable = StoredTensor | Derived

# Of a model on the hub: weights, configs and tokenizer.
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# Files of a tokenizer and of generation, copied into the merged folder where they are there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


@dataclass(frozen=True)
class Source:
    """One model of a merge.

    Args:
        folder: as the user named it, resolved.
        tensors: its tensors, in the order of the file.
        files: all files that they are read from.
        config: of the model.
    """

    folder: Path
    tensors: dict[str, Readable]
    files: list[Path]
    config: dict[str, Any]

    @property
    def adapter(self) -> bool:
        """Whether it is an adapter on a base."""
        return is_adapter(self.folder)


def open_source(model: str | Path, *, base: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Source:
    """Opens the folder of a model or of an adapter.

    Args:
        model: the folder.
        base: of an adapter, its base model's folder instead of the one in its config.
        dtype: that an adapter is added to its base in.

    Raises:
        ValueError: the folder is missing, damaged, or an adapter that equals no weights.
    """
    folder = find_folder(model)
    check_headless(folder)
    if not is_adapter(folder):
        _check_plain(folder)
        return Source(folder, dict(stored_tensors(folder)), weight_files(folder), _config(folder))
    named = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"the adapter {str(folder)!r} names no base model: give base=")
    root = find_folder(named)
    _check_plain(root)
    adapter = read_adapter(folder)
    tensors = adapted_tensors(adapter, stored_tensors(root), dtype=dtype)
    return Source(folder, dict(tensors), [*weight_files(root), adapter.file], _config(root))


def find_folder(model: str | Path) -> Path:
    """Returns the folder of a model, which is downloaded if it is on the hub.

    Raises:
        ValueError: there is none.
    """
    folder = Path(locate(model, what="model"))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"there is no folder {str(model)!r}, and it could not be loaded from the hub ({first_line(error)}): pass "
            "an existing folder, or a hub id that is cached or can be reached"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _check_plain(folder: Path) -> None:
    """Refuses models whose weights are quantised."""
    if _config(folder).get("quantization_config"):
        raise ValueError(f"the weights in {str(folder)!r} are quantised: merge the model that they were made from")
    check_headless(folder)


def check_headless(folder: Path) -> None:
    """Refuses models that have a head in a file of its own.

    Raises:
        ValueError: there is one.
    """
    if (folder / "reward_head.safetensors").is_file():
        raise ValueError(
            f"{str(folder)!r} has a head in reward_head.safetensors, which a merge would not see: export a single "
            "linear head as a classifier (the default of a RewardModule), and merge that"
        )


def check_same(sources: Sequence[Source]) -> None:
    """Checks that all models have the same tensors, tied embeddings, and tokenizer.

    Raises:
        ValueError: naming the tensor or token, and the folder.
    """
    first = sources[0]
    for other in sources[1:]:
        _check_tensors(first, other)
        _check_config(first, other)
    check_tokenizers([source.folder for source in sources])


def _check_tensors(first: Source, other: Source) -> None:
    names = str(first.folder), str(other.folder)
    if odd := [name for name in (*first.tensors, *other.tensors) if (name in first.tensors) != (name in other.tensors)]:
        has, lacks = names if odd[0] in first.tensors else names[::-1]
        tied = " (is its embedding tied in one and not in the other?)" if "lm_head" in odd[0] else ""
        raise ValueError(
            f"{len(odd)} tensors are not in all models: {odd[0]!r} is in {has!r} and not in {lacks!r}{tied}"
        )
    for name, tensor in first.tensors.items():
        shapes = tensor.shape, other.tensors[name].shape
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the tensor {name!r} has the shape {shapes[0]} in {names[0]!r} and {shapes[1]} in {names[1]!r}: only "
                "models of one architecture and vocabulary can be merged"
            )


def _check_config(first: Source, other: Source) -> None:
    for key in ("model_type", "tie_word_embeddings", "vocab_size"):
        values = first.config.get(key), other.config.get(key)
        if values[0] != values[1]:
            raise ValueError(
                f"{key} is {values[0]!r} in {str(first.folder)!r} and {values[1]!r} in {str(other.folder)!r}: only "
                "models of one architecture can be merged"
            )


def check_tokenizers(folders: Sequence[Path]) -> None:
    """Compares vocabularies, where there are any.

    Raises:
        ValueError: naming the token that differs.
    """
    found = [(folder, vocabulary(folder)) for folder in folders]
    known = [(folder, tokens) for folder, tokens in found if tokens is not None]
    for folder, tokens in known[1:]:
        expected_folder, expected = known[0]
        odd = first_difference(expected, tokens)
        if odd is not None:
            raise ValueError(
                f"the tokenizers of {str(expected_folder)!r} and {str(folder)!r} differ: {odd}; only models of one "
                "vocabulary can be merged"
            )


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Reads a tokenizer's tokens and their numbers; ``None`` where the folder has no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path)
    listed: Any = content.get("model", {}).get("vocab", {})
    tokens = listed if isinstance(listed, Mapping) else {entry[0]: n for n, entry in enumerate(listed)}
    return {**tokens, **{entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}}


def chat_template_differs(sources: Sequence[Source]) -> bool:
    """Tells whether the models have different chat templates, which a merge cannot combine."""
    return len({_template_digest(source.folder) for source in sources} - {None}) > 1


def _template_digest(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()
