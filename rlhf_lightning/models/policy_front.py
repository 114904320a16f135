"""Policies that were trained with a compressor, and the compressor that goes with their folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .decoder_identity import decoder_identity, difference
from .loading import locate
from .reward_head import stored_file
from .safetensors_io import read_json

if TYPE_CHECKING:
    from .context_compressor import ContextCompressor

FRONT_FILE = "front.json"


def front_note(compressor: ContextCompressor) -> Callable[[Path], object]:
    """Returns a function that writes into a policy's folder whose summaries it was trained with: the model's before."""
    text = json.dumps({"decoder": compressor.identity}, indent=2) + "\n"
    return lambda place: (place / FRONT_FILE).write_text(text, encoding="utf-8")


def first_decoder(source: str | Path | None, model: nn.Module) -> dict[str, Any]:
    """Returns the identity of the model that a policy was before it was trained with a compressor.

    Args:
        source: the policy's folder or hub id, if it has one; without a note, the policy has not been trained so.
        model: the policy itself.
    """
    note = None if source is None else stored_file(locate(source, what="model"), FRONT_FILE)
    found: dict[str, Any] = decoder_identity(model) if note is None else read_json(note)["decoder"]
    return found


def compressor_of(folder: str | Path, model: nn.Module, source: str | Path | None) -> ContextCompressor:
    """Loads the compressor that goes with a model: on the model itself, or on the one that the model once was.

    A policy that was trained with a compressor has other weights since then, and its summaries are still those of the
    weights before. A second model is loaded then, unless the policy is an adapter, which is switched off for them.

    Args:
        folder: folder or hub id of the compressor.
        model: the model, on its device.
        source: its folder or hub id, if it has one.

    Raises:
        ValueError: the compressor is of another model.
    """
    # Imported here, since most engines have no learned compressor.
    from .context_compressor import ContextCompressor

    first = first_decoder(source, model)
    if difference(first, decoder_identity(model)) is None:
        return ContextCompressor.from_pretrained(folder, model=model)
    weight = next(model.parameters())
    found = ContextCompressor.from_pretrained(folder, dtype=weight.dtype, device=weight.device)
    if reason := difference(first, found.identity):
        raise ValueError(
            f"the compressor in {str(folder)!r} is of another model ({reason}) than the one that {str(source)!r} was "
            "trained with: use that"
        )
    return found
