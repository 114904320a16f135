"""Replaces folders as a whole: whenever the process is killed, the old folder or the new one is complete.

The new folder is written under a hidden name. Then, by renaming alone, the old one moves aside and the new one takes
its place. Before the old one is deleted it is renamed to the name of unfinished folders, so a folder under the name of
replaced ones is complete and can be restored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .files import MARKER, PARTIAL, REPLACED, flush_to_disk, hidden_sibling, mark, read_marker


def replace_folder(target: Path, kind: str, write: Callable[[Path], object], *, resumes: bool = False) -> None:
    """Writes a folder under a hidden name, flushes it to disk, and renames it to its place.

    Args:
        target: the place; an earlier folder, which the caller has checked to be replaceable, stays until then.
        kind: of its content, such as ``model``; see ``files.mark``.
        write: writes the files into the folder that it is given.
        resumes: keep an unfinished folder, and give it to ``write`` next time. It may hold anything that a killed
            process of the package left. After a ``ValueError`` it is removed nevertheless: bad input stays bad.

    Raises:
        ValueError: the disk is full or cannot be written, or a file that is not the package's has the hidden name.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "model"
        >>> replace_folder(target, "model", lambda folder: (folder / "weights").write_text("1"))
        >>> replace_folder(target, "model", lambda folder: (folder / "weights").write_text("2"))
        >>> (target / "weights").read_text(), len(list(target.parent.iterdir()))
        ('2', 1)
    """
    fresh, old = hidden_sibling(target, PARTIAL), hidden_sibling(target, REPLACED)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target, keeps_unfinished=resumes)
    if read_marker(fresh) is None and fresh.exists():
        raise ValueError(f"{str(fresh)!r} was not written by this package: move it away")
    fresh.mkdir(exist_ok=True)
    replaces = target.exists()
    try:
        mark(fresh, kind, [path.name for path in fresh.iterdir()])  # so that a killed process leaves a folder of ours
        write(fresh)
        mark(fresh, kind)
        for path in (*fresh.rglob("*"), fresh):
            flush_to_disk(path)
        if replaces:
            target.rename(old)
        fresh.rename(target)
    except BaseException as error:
        if replaces and not target.exists():
            old.rename(target)
        if not resumes or isinstance(error, ValueError):
            with suppress(OSError):
                discard(fresh)
        if isinstance(error, OSError | SafetensorError):
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"cannot write the model to {str(target)!r} ({reason}): free disk space or choose another folder; an "
                "export that was there is untouched"
            ) from error
        raise
    flush_to_disk(target.parent)
    if replaces:
        with suppress(OSError):
            recover(target)


def recover(folder: Path, *, keeps_unfinished: bool = False) -> None:
    """Cleans up after a process that was killed while it replaced a folder.

    Restores the old folder if the new one did not reach its place, and deletes the others; both only where their list
    shows that the package wrote them.

    Args:
        folder: the folder that was being written.
        keeps_unfinished: leave an unfinished folder for ``replace_folder`` to resume from.
    """
    fresh, old = hidden_sibling(folder, PARTIAL), hidden_sibling(folder, REPLACED)
    for left in (fresh, old):
        if read_marker(left) is None:
            _remove_empty(left)
    is_replaced = read_marker(old) is not None

    # The old folder was moved aside and the new one never arrived.
    if is_replaced and not folder.exists():
        old.rename(folder)
        is_replaced = False
    if read_marker(fresh) is not None and (is_replaced or not keeps_unfinished):
        discard(fresh)

    # Renamed as unfinished first: a partly deleted folder must never be restored.
    if is_replaced and not fresh.exists():
        old.rename(fresh)
        discard(fresh)


def discard(folder: Path) -> None:
    """Deletes a folder that the package wrote, its list last, so that a killed process leaves a recognised folder."""
    # The list goes last: without it, the rest would look like a user's files.
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    shutil.rmtree(folder)


def _remove_empty(folder: Path) -> None:
    """Removes a folder that was just made or is nearly deleted: it holds at most the beginning of its list."""
    begun = hidden_sibling(folder / MARKER, PARTIAL)
    if folder.is_dir() and not folder.is_symlink() and all(path == begun for path in folder.iterdir()):
        begun.unlink(missing_ok=True)
        folder.rmdir()
