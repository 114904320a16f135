"""The rows of a run, written as they come: a file of JSON Lines that the same run continues, and its summary.

A row is one line, written with one call, so that a process that is stopped or killed leaves whole lines and at most the
beginning of one. The first rank writes into the output itself, the others next to it, and when all have finished their
rows are joined in the order of prompts. Until then rows are in the order in which they were finished. The summary next
to the output, ``NAME.summary.json``, holds what the rows depend on: another run is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..utils.files import hidden_sibling, hold, json_line, json_values, release, write_atomically

_RANK = ".rlhf_lightning.rank"
_WRITER = "rlhf_lightning"

Key: TypeAlias = tuple[int, int]  # the number of a prompt, and of one of its samples


class Output:
    """The file of rows of a run with its summary.

    Args:
        path: the file.
        origin: everything that the rows depend on.
        keys: of all rows, in order.
    """

    def __init__(self, path: str | Path, origin: Mapping[str, Any], keys: Sequence[Key]) -> None:
        self.path = Path(path).expanduser()
        self.summary_path = self.path.with_suffix(".summary.json")
        if self.summary_path == self.path:
            raise ValueError(f"output {str(path)!r} is the name of a summary: write to a file such as out.jsonl")
        # As JSON gives it back, so that it compares equal to what a summary holds.
        self.origin: dict[str, Any] = json.loads(json.dumps(json_values(origin)))
        self.keys = keys
        self.summary: dict[str, Any] = {}
        self._descriptor: int | None = None

    # Before the run, on the first rank.

    def open(self) -> set[Key]:
        """Locks the output, checks that it is this run's, and returns the keys of the rows that it has.

        Raises:
            ValueError: it is another run's, or was not written by a run, or is damaged; nothing is changed then.
        """
        hold(self.path)
        hold(self.summary_path)
        self.summary = self._read_summary()
        kept = [place for place in (self.path, *self._of_ranks()) if place.exists()]
        if self.path.is_dir() or (kept and not self.summary):
            raise ValueError(
                f"output {str(self.path)!r} exists and was not written by generate: write to another file, or move it "
                "away"
            )
        before = self.summary.get("origin", {})
        if changed := [name for name in {**self.origin, **before} if self.origin.get(name) != before.get(name)]:
            if kept:
                raise ValueError(
                    f"output {str(self.path)!r} was begun with different {' and '.join(changed)}: continue with the "
                    "same, write to another file, or move it away"
                )
            self.summary = {}
        rows = self._rows(kept)
        self._join(rows, finished=False)
        return set(rows)

    def _read_summary(self) -> dict[str, Any]:
        if not self.summary_path.exists():
            return {}
        try:
            found = json.loads(self.summary_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("written_by") != _WRITER:
            raise ValueError(
                f"{str(self.summary_path)!r} exists and was not written by generate: write to another file, or move it "
                "away"
            )
        # Outputs that differ in their suffix alone have one summary.
        rows = self.path.with_name(str(found.get("output", self.path.name)))
        if rows != self.path and rows.exists():
            raise ValueError(
                f"output {str(self.path)!r} has the summary of {str(rows)!r}, {self.summary_path.name!r}: write to a "
                "file of another name, or move that one away"
            )
        return found

    def _of_ranks(self) -> list[Path]:
        pattern = hidden_sibling(self.path, _RANK).name.replace("[", "[[]").replace("?", "[?]")
        return sorted(self.path.parent.glob(f"{pattern}*"))

    def _rows(self, places: Iterable[Path]) -> dict[Key, bytes]:
        """Reads rows, without a last one that was cut off."""
        found: dict[Key, bytes] = {}
        known = set(self.keys)
        for place in places:
            lines = place.read_bytes().split(b"\n")
            # A crash may leave a part of a line, or zeros that the disk had not replaced yet.
            for number, line in enumerate(lines[:-1], start=1):
                if number == len(lines) - 1 and not line.strip(b"\0"):
                    break
                key = _key(line)
                if key not in known:
                    raise ValueError(
                        f"line {number} of {str(place)!r} is damaged or no row of this run: remove the line, or write "
                        "to another file"
                    )
                found.setdefault(key, line)
        return found

    # During the run.

    def begin(self, rank: int) -> None:
        """Opens the file that a rank writes to."""
        place = hidden_sibling(self.path, f"{_RANK}{rank}") if rank else self.path
        place.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""
        assert self._descriptor is not None
        line = json_line(json_values(row)).encode()
        while line:
            line = line[os.write(self._descriptor, line) :]

    def end(self) -> None:
        """Closes the file of this rank."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    # After the run, on the first rank.

    def join(self) -> list[dict[str, Any]]:
        """Joins the rows of all ranks in their order, and returns them.

        Raises:
            ValueError: rows are missing.
        """
        rows = self._rows(place for place in (self.path, *self._of_ranks()) if place.exists())
        if len(rows) < len(self.keys):
            raise ValueError(
                f"{len(self.keys) - len(rows)} of {len(self.keys)} rows are missing in {str(self.path)!r}: run the "
                "same command again (several ranks must share the folder)"
            )
        self._join(rows, finished=True)
        return [json.loads(rows[key]) for key in self.keys]

    def _join(self, rows: Mapping[Key, bytes], *, finished: bool) -> None:
        """Brings all rows into the output: in the order of prompts, or as they are while some are missing."""
        keys = self.keys if finished else list(rows)
        content = b"".join(rows[key] + b"\n" for key in keys)
        if self.path.exists() and self.path.read_bytes() == content:
            pass
        elif rows or self.path.exists():
            write_atomically(self.path, content.decode())
        for place in self._of_ranks():
            place.unlink()

    def save(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary."""
        self.summary = {"written_by": _WRITER, **summary, "output": self.path.name, "origin": self.origin}
        write_atomically(self.summary_path, json.dumps(json_values(self.summary), indent=2, ensure_ascii=False) + "\n")

    def release(self) -> None:
        """Lets other processes write here."""
        release(self.summary_path)
        release(self.path)


def _key(line: bytes) -> Key | None:
    try:
        row = json.loads(line)
        return int(row["index"]), int(row["sample"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
