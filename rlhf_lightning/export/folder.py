"""Exports a model as a Hugging Face folder with a model card, proved by loading it again, and uploads it if asked."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..merging.adapter_files import is_adapter
from ..merging.merge import merge, parse_size
from ..merging.sources import find_folder
from ..merging.tensor_files import stored_tensors
from ..models import load_causal_lm, load_tokenizer
from ..models.adapters import ROPE_PARAMETERS
from ..models.safetensors_io import first_line
from ..utils.files import check_replaceable, hold, release
from ..utils.folders import replace_folder
from ..utils.validation import check_choice
from .model_card import HUB_ID, ModelCard
from .proof import Expected, compare_models, compare_tokenizers, continued, encoded_prompts, load_source

CARD = "README.md"
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "generation_config.json", ROPE_PARAMETERS)
# Of this machine: not uploaded.
_LOCAL = [".rlhf_lightning", "merge_manifest.json"]


@dataclass(frozen=True)
class FolderExport:
    """A folder that was written and checked.

    Args:
        path: of the folder.
        logit_error: largest difference between the folder's logits and those of the source rounded alike, relative to
            the logits' spread.
        url: of the uploaded model; ``None`` without ``push_to_hub``.
    """

    path: Path
    logit_error: float
    url: str | None = None


def export_folder(
    model: str | Path,
    output: str | Path,
    *,
    merge_adapter: bool = True,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    card: ModelCard | None = None,
    check_prompts: Sequence[str] = ("2+2=", "What is the capital of France?"),
    push_to_hub: str | None = None,
    private: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> FolderExport:
    """Writes a model, its tokenizer and a model card as a Hugging Face folder, and proves that the folder is the model.

    Weights are streamed from disk to disk, as merges are, and a manifest has their sha256 (``merging.verify``). The
    folder is loaded again before it has its name: on the prompts and their greedy continuations its logits must equal
    those of the model with weights rounded alike, to 1e-4 of their spread, the greedy tokens must be equal, and so must
    the tokenizer. Otherwise there is no folder, and an earlier export stays.

    Args:
        model: folder or hub id of a causal language model, or of a LoRA adapter on one.
        output: the folder to write; an earlier export there is replaced, and anything else is refused.
        merge_adapter: write an adapter as a whole model; ``False`` writes the adapter alone.
        dtype: of whole models: ``float32``, ``bfloat16`` or ``float16``; as stored by default.
        max_shard_size: of a file of a whole model, such as ``5GB``.
        card: what the model card says; by default what the model's folder records.
        check_prompts: texts to check with, at least one; take some that the model is for.
        push_to_hub: id of a repository on the Hugging Face hub, such as ``me/my-model``, which the finished folder is
            uploaded to; nothing is uploaded without it. The manifest, which names folders here, is left out.
        private: whether a repository that does not exist yet is made private.
        say: called with a line for each part of the work.

    Returns:
        The folder, and how far its logits are from the model's.

    Raises:
        ValueError: an option is out of range, the place is taken, the folder does not compute what the model computes,
            or the upload failed; the finished folder stays then.

    Example:
        >>> card = ModelCard(license="apache-2.0", method="DPO", metrics={"val/rewards/accuracies": 0.81})
        >>> export_folder("runs/dpo/model", "export", card=card, dtype="bfloat16")  # doctest: +SKIP
    """
    if dtype is not None:
        check_choice("dtype", dtype, _DTYPES)
    parse_size(max_shard_size)
    if push_to_hub is not None and not HUB_ID.fullmatch(push_to_hub):
        raise ValueError(f"push_to_hub is {push_to_hub!r}; it must be an id such as me/my-model")
    source, target = find_folder(model), Path(output).expanduser().resolve()
    alone = is_adapter(source) and not merge_adapter
    if alone and dtype is not None:
        raise ValueError(f"dtype is {dtype!r} with merge_adapter=False: an adapter alone keeps its own type")
    if source.resolve() == target:
        raise ValueError(f"output {str(target)!r} is the model itself: choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        expected, tokenizer = load_source(source, Path(scratch))
    positions = int(expected.config.get_text_config().max_position_embeddings)
    prompts = encoded_prompts(tokenizer, check_prompts, positions)
    kind, errors = "adapter" if alone else "model", []

    def write(place: Path) -> None:
        if alone:
            for name in _ADAPTER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, place / name)
        else:
            _write_model(source, place, dtype, max_shard_size, say)
            _round(expected, place)
        tokenizer.save_pretrained(place)
        (place / CARD).write_text((card or ModelCard()).text(source), encoding="utf-8")
        errors.append(_prove(place, tokenizer, continued(expected, prompts, positions), check_prompts))

    hold(target)
    try:
        check_replaceable(target, kind)
        replace_folder(target, kind, write)
    finally:
        release(target)
    say(f"{target}: equal to {errors[0]:.1g} of the logits' spread")
    return FolderExport(target, errors[0], None if push_to_hub is None else _push(target, push_to_hub, private, say))


def _write_model(source: Path, place: Path, dtype: str | None, max_shard_size: str, say: Callable[[str], None]) -> None:
    """Writes whole weights with their config and manifest: the mean of one model is the model."""
    inner = place / "whole"
    merge("linear", models=[source], output=inner, dtype=dtype, max_shard_size=max_shard_size, keep=True, say=say)
    for path in inner.iterdir():
        if path.name != ".rlhf_lightning":
            path.rename(place / path.name)
    shutil.rmtree(inner)


def _prove(place: Path, tokenizer: PreTrainedTokenizerBase, expected: Expected, check_prompts: Sequence[str]) -> float:
    """Loads a folder again, and compares it with the model; returns the largest difference of logits.

    Raises:
        ValueError: it is not the model.
    """
    try:
        found, other = _loaded(place)
        compare_tokenizers(tokenizer, other, check_prompts)
        return compare_models(found, expected, check_prompts)
    except ValueError as reason:
        raise ValueError(f"the export is not the model, and was removed: {reason}") from reason


def _loaded(place: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what was written, in fp32 (an adapter with its base)."""
    options: dict[str, Any] = {"dtype": torch.float32, "trainable": False, "attn_implementation": "eager"}
    model: Any = load_causal_lm(place, **options)
    return model.eval(), load_tokenizer(place)


@torch.no_grad()
def _round(model: PreTrainedModel, place: Path) -> None:
    """Rounds a model's weights to the types of a folder's tensors."""
    stored = {name: tensor.dtype for name, tensor in stored_tensors(place).items() if tensor.dtype.is_floating_point}
    kinds = set(stored.values())
    for name, weight in model.state_dict().items():
        # Families whose files name tensors differently have one type throughout.
        kind = stored.get(name, next(iter(kinds)) if len(kinds) == 1 else weight.dtype)
        if weight.is_floating_point():
            weight.copy_(weight.to(kind))


# The hub.


def _push(folder: Path, repository: str, private: bool, say: Callable[[str], None]) -> str:
    """Uploads a finished folder; returns its address.

    Raises:
        ValueError: it could not be uploaded.
    """
    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=_LOCAL)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the model is complete in {str(folder)!r}, and could not be uploaded to {repository!r} "
            f"({first_line(error)}): log in with `hf auth login`, and export again"
        ) from error
    say(f"uploaded to {url}")
    return url
