"""Where files that come with the package are: ``configs/...`` means the same in a clone and in an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def packaged_config(path: str | Path) -> Path | None:
    """The packaged file or folder that ``configs/...`` stands for where there is none of that name here.

    Args:
        path: what the user wrote.

    Returns:
        The packaged place; ``None`` if the path exists as it is, or if nothing of that name is packaged.

    Example:
        >>> packaged_config("my-configs/dpo.yaml") is None
        True
    """
    path = Path(path)
    if path.is_absolute() or path.parts[:1] != ("configs",) or path.exists():
        return None
    packaged = _PACKAGE / path
    return packaged if packaged.exists() else None


def nearest_config(path: str | Path) -> str:
    """``"; did you mean 'configs/dpo/default.yaml'?"`` for a path that is nearly one, or nothing.

    Args:
        path: of a file that is not there.
    """
    root, path = _PACKAGE, Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):  # as it was written
        path = path.relative_to(Path.cwd())
    packaged = [file.relative_to(root).as_posix() for file in sorted((root / "configs").rglob("*.yaml"))]
    beside = [str(file) for file in sorted(path.expanduser().parent.glob("*.y*ml"))]
    near = difflib.get_close_matches(str(path), [*beside, *packaged], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
