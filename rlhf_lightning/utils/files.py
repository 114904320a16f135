"""Writes files atomically, and replaces only folders that the package wrote.

The package never deletes or replaces other files. A folder that it fills holds a hidden list of its files
(``.rlhf_lightning``); before a folder is replaced or emptied, ``check_replaceable`` refuses one without a list, one
with a file that is not listed, and one with content of another kind. Unfinished files and folders have names that no
other program uses. ``hold`` keeps a second run out of a place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

MARKER = ".rlhf_lightning"
# Suffixes of the hidden names of an unfinished file or folder, of a folder that is being replaced, and of a lock.
PARTIAL, REPLACED, LOCK = ".rlhf_lightning.partial", ".rlhf_lightning.old", ".rlhf_lightning.lock"
_held: dict[Path, int] = {}  # places that this process holds, with the descriptor of the locked file
_made: set[Path] = set()  # folders that were made for locks, and are removed with them if they are empty


def hidden_sibling(place: Path, suffix: str) -> Path:
    """Returns the hidden sibling of a place with one of the suffixes above.

    Example:
        >>> hidden_sibling(Path("runs/model"), PARTIAL).name
        '.model.rlhf_lightning.partial'
    """
    return place.with_name(f".{place.name}{suffix}")


@contextmanager
def atomic_file(path: Path, *, writer: str = "") -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name complete or not at all, also after a crash.

    The block writes to a hidden sibling, which is flushed to disk and renamed when the block ends, and removed when
    it raises.

    Args:
        path: the file; its folder is made.
        writer: part of the sibling's name; processes that may write the same file at the same time need their own.

    Example:
        >>> with atomic_file(Path("model.bin")) as file:  # doctest: +SKIP
        ...     file.write(b"...")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden_sibling(path, f"{writer}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 with ``atomic_file``."""
    with atomic_file(path) as file:
        file.write(text.encode())


def flush_to_disk(path: Path) -> None:
    """Flushes a file, or the entries of a folder, so that they survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(row: Mapping[str, Any]) -> str:
    r"""Formats a row as a line of JSON Lines; lone surrogates, which UTF-8 cannot encode, become JSON escapes.

    Example:
        >>> json_line({"a": 1}), json_line({"a": "\ud800"})
        ('{"a": 1}\n', '{"a": "\\ud800"}\n')
    """
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def json_values(value: Any) -> Any:
    """Converts a value to what JSON has: numbers that are not finite to null, arrays to lists, unknown objects to text.

    Example:
        >>> json_values({"a": (1, float("nan")), "b": Path("c")})
        {'a': [1, None], 'b': 'c'}
    """
    if isinstance(value, Mapping):
        return {str(name): json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_values(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    plain = getattr(value, "tolist", None)  # of numpy and torch
    return json_values(plain()) if callable(plain) else str(value)


def content_hash(path: Path) -> str | None:
    """Hashes a file, or the names and contents of all files of a folder; ``None`` if the path does not exist."""
    if path.is_dir():
        digest = hashlib.sha256()
        # Names and contents in a fixed order, whatever the file system's.
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path)}\0{content_hash(file)}\n".encode())
        return digest.hexdigest()
    if not path.is_file():
        return None
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# Ownership of folders.


def mark(folder: Path, kind: str, names: Iterable[str] | None = None) -> None:
    """Writes the list of the package's files into a folder.

    Args:
        folder: an existing folder.
        kind: kind of its content, such as ``model``.
        names: paths below it that the package writes; all present files if omitted.
    """
    listed = _files(folder) if names is None else set(names)
    record = {"written_by": "rlhf_lightning", "kind": kind, "names": sorted(listed)}
    write_atomically(folder / MARKER, json.dumps(record, indent=1) + "\n")


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Reads the list in a folder, ``{"kind": ..., "names": [...]}``; ``None`` if it is missing or unreadable."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("written_by") != "rlhf_lightning":
        return None
    return record if isinstance(record.get("names"), list) and isinstance(record.get("kind"), str) else None


def listed_names(folder: Path, kind: str) -> set[str]:
    """Returns the names on a folder's list; empty without a list or with one of another kind."""
    record = read_marker(folder)
    return set(record["names"]) if record is not None and record["kind"] == kind else set()


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuses to replace a folder with content that the package did not write.

    Args:
        folder: may be missing or empty.
        kind: kind of the new content.

    Raises:
        ValueError: it is a file, has no list, holds a file that is not listed, or content of another kind.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: pass a folder to write to")
    present = _files(folder)
    if not present:
        return

    # The folder has content: it must be the package's, of the same kind, and nothing else.
    record = read_marker(folder)
    if record is None:
        raise ValueError(
            f"{str(folder)!r} exists and was not written by this package: nothing there is replaced; choose another "
            "folder, or move that one away"
        )
    if record["kind"] != kind:
        raise ValueError(
            f"{str(folder)!r} holds a {record['kind']}, and this run writes a {kind}: choose another folder, or "
            "move that one away"
        )
    if foreign := sorted(present - set(record["names"])):
        raise ValueError(
            f"{str(folder)!r} holds {foreign[0]!r}, which this package did not write and which would be deleted: move "
            "it away, or choose another folder"
        )


def check_names(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Refuses to overwrite files of certain names in a folder that the package did not write.

    Args:
        folder: may be missing, and may hold other files.
        kind: kind on the folder's list.
        names: names that will be written or deleted.

    Raises:
        ValueError: one of them exists and is not listed.
    """
    taken = sorted(name for name in set(names) - listed_names(folder, kind) if (folder / name).exists())
    if taken:
        raise ValueError(
            f"{str(folder / taken[0])!r} already exists and was not written by this package: move it away, or choose "
            "another folder"
        )


def check_shared(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Refuses to write files of certain names into a folder that may hold other files, but no list of another kind.

    Args:
        folder: may be missing.
        kind: kind on the folder's list.
        names: names that will be written.

    Raises:
        ValueError: it is a file, holds content of another kind, or one of the names exists and is not listed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: pass a folder to write to")
    # The list of another kind would be lost, and with it the right to replace what is on it.
    record = read_marker(folder)
    if record is not None and record["kind"] != kind:
        article = "an" if record["kind"][0] in "aeiou" else "a"
        raise ValueError(
            f"{str(folder)!r} is the folder of {article} {record['kind']}, and a {kind} would change it: write to a "
            "folder of its own"
        )
    check_names(folder, kind, names)


def claim(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Makes a folder and puts names on its list, which then may be written; as ``check_shared`` allows.

    Raises:
        ValueError: as ``check_shared``.
    """
    names = list(names)
    check_shared(folder, kind, names)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, kind, {*listed_names(folder, kind), *names})


def is_record(path: Path, keys: Iterable[str]) -> bool:
    """Tells whether a file is a JSON object with these keys and no others, as a record of the package is."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() == set(keys)


def _files(folder: Path) -> set[str]:
    """Lists files below a folder, including links and empty folders, without the list itself."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir() or not any(p.iterdir()))
    return {path.relative_to(folder).as_posix() for path in found} - {MARKER}


# Locks: one run in one place.


def hold(place: Path) -> None:
    """Locks a place against other processes until ``release``, or until this process ends.

    Args:
        place: a file or folder, which may be missing.

    Raises:
        ValueError: another process holds it, or a file is where its folder should be.
    """
    place = place.expanduser().absolute()
    if place in _held:
        return
    # Folders that are made for the lock are removed with it.
    missing = {folder for folder in place.parents if not folder.exists()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{str(place)!r} cannot be written ({error.strerror}): choose another folder") from error
    _made.update(missing)
    path = hidden_sibling(place, LOCK)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another process writes to {str(place)!r}: wait for it, or choose another folder"
            ) from None
        # The previous holder may have deleted the file between opening and locking it.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            _held[place] = descriptor
            return
        os.close(descriptor)


def release(place: Path) -> None:
    """Releases the lock of a place, if it is held, and removes empty folders that were made for it."""
    place = place.expanduser().absolute()
    descriptor = _held.pop(place, None)
    if descriptor is not None:
        hidden_sibling(place, LOCK).unlink(missing_ok=True)
        os.close(descriptor)
    for folder in (folder for folder in place.parents if folder in _made):
        try:
            folder.rmdir()
        except OSError:
            break
        _made.discard(folder)


def first_rank_says(answer: bool) -> bool:
    """Returns the first rank's answer on every rank; every rank calls it."""
    found = [answer]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def on_first_rank(act: Callable[[], object]) -> None:
    """Runs a function on the first rank, which writes for all, and raises its error on every rank; every rank calls it.

    Args:
        act: raises ``ValueError`` or ``OSError``.

    Raises:
        ValueError: with the message of that error.
    """
    found: list[str | None] = [None]
    cause: Exception | None = None
    is_distributed = dist.is_available() and dist.is_initialized()
    if not is_distributed or dist.get_rank() == 0:
        try:
            act()
        except (ValueError, OSError) as error:
            found, cause = [str(error)], error

    # All ranks take part, so that none waits for a rank that has failed.
    if is_distributed:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise ValueError(found[0]) from cause
