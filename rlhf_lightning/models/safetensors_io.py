"""Reads files of a model that may be damaged: partly copied, or cut short by a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights in a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"cannot read {str(path)!r}: {_damaged(path, error)}") from error


def damaged_weights(folder: str | Path) -> str | None:
    """Describes the first incomplete safetensors file of a folder; None where all are complete.

    A file's header gives its length but no checksum: changed bytes are not detected.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return _damaged(path, error)
    return None


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a JSON object")
    return content


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error, cut to 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".:") if lines else type(error).__name__


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name} is damaged ({str(error).splitlines()[0]}); copy or export it again"
