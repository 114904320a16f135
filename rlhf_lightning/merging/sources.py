"""Opens the models of a merge, and checks that they can be merged: the same tensors, tokenizer and vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from ..models.adapters import locate_base
from ..models.loading import first_difference, locate, read_config
from ..models.safetensors_io import first_line, read_json
from .adapter_files import CONFIG, Adapter, is_adapter, read_adapter
from .adapter_weights import Derived, adapted_tensors
from .tensor_files import StoredTensor, stored_tensors, weight_files

Readable = StoredTensor | Derived

# Of a model on the hub: weights, configs and tokenizer.
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
GENERATION = "generation_config.json"
# Files of a tokenizer, copied into the merged folder where they are there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Source:
    """One model of a merge.

    Args:
        folder: as the user named it, resolved.
        root: of an adapter, the folder of its base; otherwise the same.
        tensors: its tensors, in the order of the file.
        files: all files that they are read from.
        config: of the model.
        untied: whether an adapter has made weights differ that its base ties.
    """

    folder: Path
    root: Path
    tensors: dict[str, Readable]
    files: list[Path]
    config: dict[str, Any]
    untied: bool = False

    @property
    def adapter(self) -> bool:
        """Whether it is an adapter on a base."""
        return is_adapter(self.folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of its tokenizer: an adapter without one has that of its base."""
        own = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        return self.folder if own else self.root

    def companions(self) -> list[Path]:
        """Finds the files of its tokenizer and generation config, each of the adapter's own or of its base."""
        found = [self.tokenizer_folder / name for name in TOKENIZER_FILES]
        own = (self.folder / GENERATION).is_file()
        found.append((self.folder if own else self.root) / GENERATION)
        return [path for path in found if path.is_file()]


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
        return Source(folder, folder, dict(stored_tensors(folder)), weight_files(folder), _config(folder))
    named = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"the adapter {str(folder)!r} names no base model: give base=")
    root = find_folder(base or locate_base(str(named), folder))
    _check_plain(root)
    adapter = read_adapter(folder)
    stored, ties = stored_tensors(root), _ties(root)
    tensors: dict[str, Readable] = dict(adapted_tensors(adapter, _with_copies(stored, ties), dtype=dtype))
    files = [*weight_files(root), adapter.file]
    if _differ(adapter, ties):
        return Source(folder, root, tensors, files, _untied_config(root), untied=True)

    # Still tied: what peft has trained is the embedding, and its copies follow.
    if adapter.config.get("ensure_weight_tying"):
        tensors |= {copy: tensors[kept] for copy, kept in ties.items() if kept in tensors}
    return Source(folder, root, {name: tensors[name] for name in tensors if name in stored}, files, _config(root))


# Tied weights.


def _ties(folder: Path) -> dict[str, str]:
    """Returns which weights of a model are others by a second name, such as a head that is the embedding."""
    config: Any = read_config(str(folder))
    named = getattr(transformers, (config.architectures or [""])[0], None)
    build: Any = transformers.AutoModelForCausalLM.from_config if named is None else named._from_config
    with torch.device("meta"):
        return dict(build(config).all_tied_weights_keys)


def _with_copies(stored: Mapping[str, Any], ties: Mapping[str, str]) -> dict[str, Any]:
    """Adds the names of tied weights that a file lacks: it has one of two."""
    found = dict(stored)
    for copy, kept in ties.items():
        if kept in found:
            found.setdefault(copy, found[kept])
        elif copy in found:
            found[kept] = found[copy]
    return found


def _differ(adapter: Adapter, ties: Mapping[str, str]) -> bool:
    """Tells whether an adapter has changed one of two tied weights: peft ties them only where it is asked to."""
    changed = {*adapter.trained, *(f"{path}.weight" for path in adapter.layers)}
    return not adapter.config.get("ensure_weight_tying") and not changed.isdisjoint({*ties, *ties.values()})


def _untied_config(folder: Path) -> dict[str, Any]:
    config = {**_config(folder), "tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), Mapping):
        config["text_config"] = {**text, "tie_word_embeddings": False}
    return config


def with_equal_ties(sources: Sequence[Source]) -> list[Source]:
    """Gives every model a head of its own where an adapter has untied that of one: a copy changes no model."""
    if not any(source.untied for source in sources):
        return list(sources)
    found = []
    for source in sources:
        ties = {} if source.untied else _ties(source.root)
        if ties:
            tensors, config = _with_copies(source.tensors, ties), _untied_config(source.root)
            source = replace(source, tensors=tensors, config=config, untied=True)
        found.append(source)
    return found


def find_folder(model: str | Path) -> Path:
    """Returns the folder of a model, which is downloaded if it is on the hub.

    Raises:
        ValueError: its folder cannot be found or downloaded.
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
    check_tokenizers([source.tokenizer_folder for source in sources])


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
    return len({_template_digest(source.tokenizer_folder) for source in sources} - {None}) > 1


def _template_digest(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()
