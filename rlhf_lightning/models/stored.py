"""Files of weights that may be damaged: half copied, or cut short by a full disk."""

from __future__ import annotations

from pathlib import Path

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


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name} is damaged ({str(error).splitlines()[0]}); copy or export it again"
