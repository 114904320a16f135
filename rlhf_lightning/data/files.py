"""Readers of row files: JSON lines, JSON lists, CSV, text, Parquet and Arrow, each row with its number."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from .cell_checks import RepeatedKeys, read_object, short

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = tuple(text + packed for text in SUFFIXES[:4] for packed in _OPENERS)
_BLOCK, _SAMPLED_BLOCKS = 1 << 20, 256
ACCEPTED = ", ".join(SUFFIXES) + " (text also with .gz, .bz2 or .xz)"


class FilteredRowError(Exception):
    """Raised for a valid row that a transform or a filter drops; its text names which."""


class RowSource:
    """Rows that can be read again and again in one fixed order.

    Reading takes two steps, so that a shuffle buffer holds rows as they are stored and a resumed run skips rows
    without parsing them: :meth:`raw` yields ``(row_id, stored row)``, :meth:`parse` makes a dictionary of one.

    Args:
        name: what the user called the source; row ids are ``"<name>:<number>"``, where the number is the line in a
            text file and otherwise the row, both counted from 1.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored.

        Raises:
            ValueError: without any.
        """
        empty = True
        for number, stored in self._stored():
            empty = False
            yield f"{self.name}:{number}", stored
        if empty:
            raise ValueError(f"{self.name!r} has no rows: write at least one")

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows with the source's parts in a random order; rows keep their order within a part.

        Parts are the files of a folder or a list, and the row groups of a Parquet file; a source without parts is not
        reordered. Row ids are those of :meth:`raw`.

        Args:
            draw: the generator that draws the order.
        """
        return self.raw()

    def parse(self, stored: Any) -> dict[str, Any]:
        """Makes a dictionary of a stored row.

        Raises:
            FilteredRowError: for a row that a transform or a filter drops.
            ValueError: saying what is wrong with the row, but not where it is.
        """
        if not isinstance(stored, Mapping):
            raise ValueError(f"a row is {type(stored).__name__} ({short(stored)}), expected columns with their values")
        return dict(stored)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for row_id, stored in self.raw():
            try:
                row = self.parse(stored)
            except FilteredRowError:
                continue
            except ValueError as error:
                raise ValueError(f"{row_id}: {error}") from error
            yield row_id, row

    @property
    def num_rows(self) -> int | None:
        """Number of rows; ``None`` where it is not known without the network."""
        raise TypeError(f"{type(self).__name__} does not say how many rows it has")

    @property
    def fingerprint(self) -> str:
        """A digest that changes with the rows."""
        raise TypeError(f"{type(self).__name__} has no fingerprint")

    def _stored(self) -> Iterator[tuple[int, Any]]:
        raise TypeError(f"{type(self).__name__} has no rows")


class RowFile(RowSource):
    """A file of rows, with a fingerprint by which an edited file is noticed.

    Args:
        name: what the user called the file.
        path: where it is.
    """

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self.path = path

    @cached_property
    def num_rows(self) -> int | None:
        """Number of rows in the file."""
        return sum(1 for _ in self._stored())

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the file's size and bytes; above a GiB, a quarter of a GiB of evenly spaced blocks is read."""
        size = self.path.stat().st_size
        digest = blake2b(str(size).encode(), digest_size=16)
        stride = max(1, size // _SAMPLED_BLOCKS) if size > 4 * _SAMPLED_BLOCKS * _BLOCK else _BLOCK
        with self.path.open("rb") as file:
            for start in range(0, size, stride):
                file.seek(start)
                digest.update(file.read(_BLOCK))
        return digest.hexdigest()

    def _open(self) -> IO[bytes]:
        packed = _OPENERS.get(self.path.suffix.lower())
        # A compressed file opened in "rb" is an IO[bytes] in all but its declared type.
        return self.path.open("rb") if packed is None else cast(IO[bytes], packed(self.path, "rb"))

    def _lines(self) -> Iterator[bytes]:
        with self._open() as file:
            try:
                yield from file
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                if self.path.suffix.lower() not in _OPENERS:
                    raise
                kind = {".gz": "gzip", ".bz2": "bzip2"}.get(self.path.suffix.lower(), "xz")
                raise ValueError(f"{self.name!r} is not a complete {kind} file: {_one_line(error)}") from error


class JsonLines(RowFile):
    """One JSON object per line; empty lines are skipped but counted, so that numbers match those of an editor."""

    def _stored(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield number, line

    def parse(self, stored: bytes) -> dict[str, Any]:
        """Reads one line."""
        try:
            # Editors on Windows begin files with a byte-order mark, which utf-8-sig drops.
            row = json.loads(stored.decode("utf-8-sig"), object_pairs_hook=read_object)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8 (byte {error.start} of the line), expected one JSON object per line"
            ) from error
        except json.JSONDecodeError as error:
            found = short(stored.decode("utf-8-sig").strip())
            raise ValueError(
                f"not JSON ({error.msg} at character {error.pos + 1}): {found}, expected one JSON object per line"
            ) from error
        except RecursionError as error:
            raise ValueError("JSON with hundreds of lists in lists, expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"a JSON {type(row).__name__} ({short(row)}), expected one JSON object per line")
        _check_once(row)
        return row


class JsonList(RowFile):
    """One JSON list of objects, read as a whole."""

    def _stored(self) -> Iterator[tuple[int, Any]]:
        try:
            rows = json.loads(b"".join(self._lines()).decode("utf-8-sig"), object_pairs_hook=read_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name!r} is not a JSON list of objects: {_one_line(error)}") from error
        yield from enumerate(rows, start=1)

    def parse(self, stored: Any) -> dict[str, Any]:
        """Checks one object of the list and returns it as a dictionary."""
        _check_once(stored)
        return super().parse(stored)


class CsvTable(RowFile):
    """Comma-separated values whose first row names the columns; the number of a row is the line on which it starts."""

    def _stored(self) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
        # The csv module's limit of 131,072 characters a cell is too low for long conversations.
        csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(self._lines()))
        reader = csv.reader(lines, strict=True)

        # A quoted cell may span lines, so a row is named after the line on which it starts.
        start, header = 1, None
        try:
            for cells in reader:
                if cells and header is None:
                    header = cells
                    _check_names(self.name, header)
                elif cells and header is not None:
                    yield start, (header, cells)
                start = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.name}:{start}: not comma-separated values: {_one_line(error)}") from error

    def parse(self, stored: tuple[list[str], list[str]]) -> dict[str, Any]:
        """Pairs the header's names with the cells of one row."""
        header, cells = stored
        if len(header) != len(cells):
            raise ValueError(f"{len(cells)} cells, expected {len(header)} as in the header ({', '.join(header)})")
        return dict(zip(header, cells, strict=True))


class TextLines(RowFile):
    """One prompt per line, as it stands there without its line end; empty lines are skipped but counted."""

    def _stored(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(self._lines(), start=1):
            # The byte-order mark that editors on Windows write first is not of the text.
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, text

    def parse(self, stored: bytes) -> dict[str, Any]:
        """Makes a row with the column ``prompt`` of one line."""
        try:
            return {"prompt": stored.removesuffix(b"\n").removesuffix(b"\r").decode()}
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start} of the line), expected one prompt per line") from error


class ParquetTable(RowFile):
    """A Parquet file, read a few hundred rows at a time."""

    @cached_property
    def num_rows(self) -> int | None:
        """Number of rows by the file's metadata."""
        with self._file() as file:
            return int(file.metadata.num_rows)

    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.name!r} is not a Parquet file: {_one_line(error)}") from error

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows with the file's row groups in a random order."""
        with self._file() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes]).tolist()
            for group in draw.permutation(len(sizes)).tolist():
                for number, row in self._rows(file, starts[group], [group]):
                    yield f"{self.name}:{number}", row

    def _stored(self) -> Iterator[tuple[int, Any]]:
        with self._file() as file:
            yield from self._rows(file, 0, None)

    def _rows(self, file: pq.ParquetFile, number: int, groups: list[int] | None) -> Iterator[tuple[int, Any]]:
        """Yields the rows of some row groups, numbered from ``number + 1``."""
        _check_names(self.name, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=256, row_groups=groups)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.name!r} is truncated after row {number}: {_one_line(error)}") from error
            for row in rows:
                number += 1
                yield number, row


class ArrowTable(RowFile):
    """An Arrow file in either layout: the stream that ``datasets`` writes, or the file with a footer."""

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as mapped:
            try:
                try:
                    yield from pa.ipc.open_stream(mapped)
                except (pa.ArrowInvalid, OSError):
                    mapped.seek(0)
                    file = pa.ipc.open_file(mapped)
                    for index in range(file.num_record_batches):
                        yield file.get_batch(index)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{self.name!r} is not an Arrow file: {_one_line(error)}") from error

    @cached_property
    def num_rows(self) -> int | None:
        """Number of rows in the record batches."""
        return sum(int(batch.num_rows) for batch in self._batches())

    def _stored(self) -> Iterator[tuple[int, Any]]:
        number = 0
        for batch in self._batches():
            if number == 0:
                _check_names(self.name, batch.schema.names)
            for offset in range(0, batch.num_rows, 256):
                for row in batch.slice(offset, 256).to_pylist():
                    number += 1
                    yield number, row


def is_row_file(path: str | Path) -> bool:
    """Tells whether a name has a suffix that :func:`open_file` reads.

    Example:
        >>> is_row_file("pairs.jsonl.gz"), is_row_file("notes.md")
        (True, False)
    """
    return str(path).lower().endswith(SUFFIXES + COMPRESSED)


def is_text_file(path: str | Path) -> bool:
    """Tells whether a file of rows holds a prompt per line, as its suffix says.

    Example:
        >>> is_text_file("prompts.TXT.gz"), is_text_file("prompts.txt.csv")
        (True, False)
    """
    return str(path).lower().endswith((".txt", *(f".txt{packed}" for packed in _OPENERS)))


def open_file(name: str, path: Path) -> RowSource:
    """Opens one file of rows by its suffix.

    Args:
        name: what the user called it, for row ids and messages.
        path: where it is.

    Returns:
        The source of its rows.

    Raises:
        ValueError: for an unsupported suffix, and for an empty file.
    """
    if not is_row_file(path):
        raise ValueError(f"cannot tell how to read {name!r} by its suffix: rename or convert it to one of {ACCEPTED}")
    if path.stat().st_size == 0:
        raise ValueError(f"{name!r} is empty: write at least one row")
    suffix = [part.lower() for part in path.suffixes if part.lower() in SUFFIXES][-1]
    if suffix == ".json":
        return (JsonList if _starts_with_bracket(JsonLines(name, path)) else JsonLines)(name, path)
    readers: dict[str, type[RowFile]] = {
        ".jsonl": JsonLines,
        ".csv": CsvTable,
        ".txt": TextLines,
        ".parquet": ParquetTable,
        ".arrow": ArrowTable,
    }
    return readers[suffix](name, path)


def _starts_with_bracket(file: JsonLines) -> bool:
    return next((line.decode("utf-8-sig", "replace").lstrip()[:1] for _, line in file._stored()), "") == "["


def _check_names(source: str, names: Sequence[str]) -> None:
    """Refuses a table that has two columns of one name: the second would replace the first."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{source!r} has two columns {twice!r}: rename or delete one of them")


def _check_once(value: Any) -> None:
    """Refuses a JSON object that has a key twice, at any depth."""
    if isinstance(value, RepeatedKeys):
        raise ValueError(f"the key {value.key!r} appears twice in one object: keep one of them")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, (dict, list)):
            _check_once(inner)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
