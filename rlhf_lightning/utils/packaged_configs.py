"""Finds files that come with the package: ``configs/...`` means the same in a clone and in an installed wheel."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def packaged_config(path: str | Path) -> Path | None:
    """Finds the packaged file or folder for ``configs/...`` if it does not exist in the current folder.

    Args:
        path: what the user wrote.

    Returns:
        The packaged path; ``None`` if the path exists, or is not packaged.

    Example:
        >>> packaged_config("my-configs/dpo.yaml") is None
        True
    """
    path = Path(path)
    if path.is_absolute() or path.parts[:1] != ("configs",) or path.exists():
        return None
    packaged = _PACKAGE / path
    return packaged if packaged.exists() else None


def with_packaged_configs(args: Sequence[str]) -> Iterator[str]:
    """Points ``--config configs/...`` to the packaged file if no such file exists in the current folder.

    Args:
        args: a command line.

    Example:
        >>> list(with_packaged_configs(["--config", "mine.yaml", "--config=mine.yaml"]))
        ['--config', 'mine.yaml', '--config=mine.yaml']
    """
    previous = ""
    for argument in args:
        flag, _, value = argument.partition("=")
        if flag in ("--config", "-c") and value:
            yield f"{flag}={packaged_config(value) or value}"
        elif previous in ("--config", "-c"):
            yield str(packaged_config(argument) or argument)
        else:
            yield argument
        previous = argument


def nearest_config(path: str | Path) -> str:
    """Returns ``"; did you mean 'configs/dpo/default.yaml'?"`` for a similar path, or an empty text.

    Args:
        path: of a missing file.
    """
    root, path = _PACKAGE, Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):  # as it was written
        path = path.relative_to(Path.cwd())
    packaged = [file.relative_to(root).as_posix() for file in sorted((root / "configs").rglob("*.yaml"))]
    siblings = [str(file) for file in sorted(path.expanduser().parent.glob("*.y*ml"))]
    near = difflib.get_close_matches(str(path), [*siblings, *packaged], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
