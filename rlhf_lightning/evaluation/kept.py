"""Results that an evaluation keeps in its output folder, each named after all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically
from ..utils.inputs import input_hashes
from ..utils.messages import one_line
from .results import TaskResult
from .suite import AnyTask

# Finished results of an output folder, which are not computed again.
PARTS = "parts"


def part_of(folder: Path, key: Any) -> Path:
    """Returns the file of a result in an output folder; another version of this package has another one.

    Args:
        folder: the output folder.
        key: all else that the result depends on.
    """
    from .. import __version__

    written = json.dumps([__version__, key], sort_keys=True, default=str)
    return folder / PARTS / f"{hashlib.sha256(written.encode()).hexdigest()[:24]}.json"


def read_result(part: Path, model: str, task: AnyTask) -> TaskResult:
    """Reads a model's result on a task that was kept.

    Raises:
        ValueError: the file is damaged.
    """
    with _readable(part):
        return TaskResult.read(_read(part) | {"model": model, "task": task.as_dict()})


def _read(part: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    return found


@contextmanager
def _readable(part: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"the kept result {str(part)!r} is damaged ({one_line(error)}): restore it, or delete it: it is then "
            "computed again"
        ) from error


def write_part(part: Path, result: dict[str, Any]) -> None:
    """Keeps a result."""
    part.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(part, json.dumps(result, ensure_ascii=False) + "\n")


def kept(folder: Path | None, key: Sequence[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Finds what was computed before for a key, the contents of the files that it names included, or computes it.

    Args:
        folder: the output folder; ``None`` for none.
        key: what the result depends on; its first part may name files.
        compute: returns the result.

    Raises:
        ValueError: the file of the result is damaged.
    """
    if folder is None:
        return compute()
    part = part_of(folder, [*key, input_hashes({"key": key[0]})])
    if not part.is_file():
        write_part(part, compute())
    with _readable(part):
        return _read(part)
