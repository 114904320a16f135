"""Where files that come with the package are: ``configs/...`` means the same in a clone and in an installed wheel."""

from __future__ import annotations

from pathlib import Path


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
    packaged = Path(__file__).parent / path
    return packaged if packaged.exists() else None
