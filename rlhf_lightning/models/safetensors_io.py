"""Files of a model that may be damaged: half copied, or cut short by a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"cannot read {str(path)!r}: {_damaged(path, error)}") from error


def damaged_weights(folder: str | Path) -> str | None:
    """What is wrong with the first safetensors file of a folder that is not whole; None where nothing is.

    A file's header says how long it is, and nothing what its bytes should be: one that was changed is not noticed.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return _damaged(path, error)
    return None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

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
    """What an error of a library says first, without its advice."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".:") if lines else type(error).__name__


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name} is damaged ({str(error).splitlines()[0]}); copy or export it again"
