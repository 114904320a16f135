"""Sources of rows: a file, a folder, a dataset on disk or on the hub, an embedded task, or memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl

import numpy as np

from .cell_checks import describe_columns, is_missing
from .files import ACCEPTED, RowSource, is_row_file, is_text_file, open_file
from .joined_rows import JoinedRows, distinct
from .tasks import is_task, open_task

if TYPE_CHECKING:
    import datasets

    Source: TypeAlias = str | Sequence[str] | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.IterableDataset
else:
    # Without classes: the command line would parse a file of rows as the configuration of such an object.
    Source = str | list[str] | list[dict[str, Any]]

# Names of a datamodule's splits on disk and on the hub.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# Metadata files that datasets and the hub store next to the rows.
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class MemoryRows(RowSource):
    """Rows that are already objects: a list of dictionaries, a ``datasets.Dataset`` or a streamed one.

    Args:
        name: what the user called them.
        rows: the rows.
        num_rows: their number; ``None`` if unknown.
        fingerprint: the one of ``datasets``; computed from the rows if omitted.
    """

    def __init__(self, name: str, rows: Any, *, num_rows: int | None, fingerprint: str | None = None) -> None:
        super().__init__(name)
        self.rows = rows
        self._num_rows = num_rows
        self._fingerprint = fingerprint

    @property
    def num_rows(self) -> int | None:
        """Number of rows; ``None`` if unknown."""
        return self._num_rows

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the rows, or the fingerprint of their dataset."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    def _stored(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.rows, start=1)


class RenamedRows(RowSource):
    """Renames the columns of a source.

    Args:
        inner: the source.
        columns: new name -> the row's column.
    """

    def __init__(self, inner: RowSource, columns: Mapping[str, str]) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.columns = dict(columns)

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored."""
        return self.inner.raw()

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored, the source's parts in a random order."""
        return self.inner.shuffled(draw)

    def parse(self, stored: Any) -> dict[str, Any]:
        """Makes a dictionary of a stored row and renames its columns."""
        row = self.inner.parse(stored)
        for ours, theirs in self.columns.items():
            if theirs not in row:
                raise ValueError(
                    f"no column {theirs!r} for columns={{{ours!r}: {theirs!r}}}{describe_columns(row, theirs)}"
                )

        # A name that is taken must not silently replace another column.
        renamed = set(self.columns.values())
        kept = {name: value for name, value in row.items() if name not in renamed}
        for ours, theirs in self.columns.items():
            if not is_missing(kept.get(ours)):
                raise ValueError(
                    f"columns={{{ours!r}: {theirs!r}}} would overwrite the row's own column {ours!r}: rename that one, "
                    f"too, as in columns={{{ours!r}: {theirs!r}, 'old_{ours}': {ours!r}}}"
                )
        return kept | {ours: row[theirs] for ours, theirs in self.columns.items()}

    @property
    def num_rows(self) -> int | None:
        """Number of rows; ``None`` if unknown."""
        return self.inner.num_rows

    @property
    def fingerprint(self) -> str:
        """A digest of the rows and the new names."""
        named = f"{self.inner.fingerprint}{sorted(self.columns.items())}"
        return blake2b(named.encode(), digest_size=16).hexdigest()


def open_source(
    source: Source,
    *,
    split: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> RowSource:
    """Opens the rows that a user's description names; reads only what is needed to choose the reader.

    A string is tried as an embedded task (``"sums:preference?rows=100"``), as a file (.jsonl, .json, .csv, .txt,
    .parquet, .arrow), as a folder of such files or of ``datasets.save_to_disk``, and then as an id on the
    Hugging Face hub; the last two take options, as in ``"org/name?split=test&config=main&revision=v2"``.

    Args:
        source: the string, a list of such strings, a list of dictionaries, or a ``datasets`` dataset.
        split: the split to read of a folder or a hub dataset that has several: ``"train"``, ``"validation"``,
            ``"test"``.
        streaming: stream a hub dataset instead of downloading it first.
        columns: new name of a column -> its name in the rows.

    Returns:
        A source that yields ``(row_id, row)``.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it cannot be read, is empty, or has no such split.

    Example:
        >>> list(open_source([{"question": "2+2=", "completion": "4"}], columns={"prompt": "question"}))
        [('memory:1', {'completion': '4', 'prompt': '2+2='})]
    """
    opened = _open(source, split, streaming)
    return RenamedRows(opened, columns) if columns else opened


def is_remote(source: Any) -> bool:
    """Tells whether a source, or one in a list of them, can only be a dataset on the hub.

    Example:
        >>> is_remote("org/name?split=test"), is_remote("sums:prompts"), is_remote([{"prompt": "2+2="}])
        (True, False, False)
    """
    if isinstance(source, str):
        name = source.partition("?")[0]
        here = Path(source).expanduser().exists() or Path(name).expanduser().exists()
        return not (here or is_task(source)) and _is_hub_id(name)
    return isinstance(source, Sequence) and any(isinstance(item, str) and is_remote(item) for item in source)


def _open(source: Any, split: str | None, streaming: bool) -> RowSource:
    if isinstance(source, (str, Path)):
        return _open_string(str(source), split, streaming)
    if isinstance(source, Sequence):
        return _open_list(source, split, streaming)
    # `datasets` is recognised by its attributes, because importing it takes seconds.
    if hasattr(source, "_fingerprint") and hasattr(source, "__len__"):
        return MemoryRows("dataset", source, num_rows=len(source), fingerprint=source._fingerprint)
    if hasattr(source, "features") and hasattr(source, "__iter__"):
        return MemoryRows("dataset", source, num_rows=_known_rows(source), fingerprint=_describe(source))
    raise ValueError(
        f"cannot read rows from {type(source).__name__}: give a path, a hub id, a task, a list of these, "
        "a list of dictionaries or a datasets.Dataset"
    )


def _open_list(source: Sequence[Any], split: str | None, streaming: bool) -> RowSource:
    if not source:
        raise ValueError("an empty list has no rows: give at least one row or source")
    if all(isinstance(item, Mapping) for item in source):
        return MemoryRows("memory", source, num_rows=len(source))
    if not all(isinstance(item, (str, Path)) for item in source):
        kinds = ", ".join(sorted({type(item).__name__ for item in source}))
        raise ValueError(f"cannot read rows from a list of {kinds}: give a list of dictionaries or a list of paths")
    parts = distinct(_open_string(item, split, streaming) for item in map(str, source))
    return parts[0] if len(parts) == 1 else JoinedRows(", ".join(map(str, source)), parts)


def _open_string(source: str, split: str | None, streaming: bool) -> RowSource:
    path = Path(source).expanduser()
    if not path.exists() and is_task(source):
        rows = open_task(source)
        if not rows:
            raise ValueError(f"{source!r} has no rows: ask for at least one")
        return MemoryRows(source, rows, num_rows=len(rows))
    # A query belongs to the name only if no such file exists.
    wanted: dict[str, str] = {}
    if not path.exists() and "?" in source:
        source, wanted = _split_query(source)
        path, split = Path(source).expanduser(), wanted.pop("split", split)
    if path.is_file():
        return open_file(source, path)
    if path.is_dir():
        return _open_folder(source, path, split)
    if not _is_hub_id(source):
        raise FileNotFoundError(
            f"no file, folder or dataset {source!r}: give a file ({ACCEPTED}), a folder of such files, "
            "a hub id like 'org/name' or a task like 'sums:preference'"
        )
    return _open_hub(source, split, streaming, wanted)


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not is_row_file(source) and not source.startswith(".")


def _split_query(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.partition("?")
    keys = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [key for key in keys if key not in ("split", "config", "revision")]
    if unknown or not keys:
        raise ValueError(f"cannot read {query!r} in {source!r}: allowed are split=, config= and revision=")
    return name, keys


def _open_folder(name: str, path: Path, split: str | None) -> RowSource:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        import datasets

        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[_pick_split(name, list(loaded), split)]
        return MemoryRows(name, loaded, num_rows=len(loaded), fingerprint=loaded._fingerprint)
    # Otherwise all row files below the folder; where their names tell splits, those of the wanted one.
    files = sorted(file for file in path.rglob("*") if file.is_file() and _has_rows(file.relative_to(path)))
    # Notes and licences are texts too: where there are other rows, texts are not read.
    files = [file for file in files if not is_text_file(file)] or files
    if not files:
        raise ValueError(f"the folder {name!r} has no file to read: put files of {ACCEPTED} there")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    named = [key for key in by_split if key is not None]
    if named:
        _refuse_strays(name, path, by_split)
        files = by_split[_pick_split(name, named, split)]
    parts = [open_file(f"{name.rstrip('/')}/{file.relative_to(path)}", file) for file in files]
    return parts[0] if len(parts) == 1 else JoinedRows(name, parts)


def _has_rows(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return is_row_file(file) and not hidden and file.name not in _ABOUT_ROWS


def _refuse_strays(name: str, path: Path, by_split: Mapping[str | None, Sequence[Path]]) -> None:
    """Refuses files without a split next to files of splits: it is unclear whether to read them."""
    if None not in by_split:
        return
    strays = ", ".join(str(file.relative_to(path)) for file in by_split[None])
    named = [str(file.relative_to(path)) for split, files in by_split.items() if split is not None for file in files]
    raise ValueError(
        f"the folder {name!r} has files of splits ({', '.join(named)}) and files of none ({strays}): give one file, "
        f"such as '{name.rstrip('/')}/{named[0]}', or move or rename the others"
    )


def _split_of(file: Path) -> str | None:
    # Whole words, so that "contest.jsonl" is not a test split.
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((split for split, names in _SPLITS.items() if any(word in names for word in words)), None)


def _pick_split(name: str, found: Sequence[str], wanted: str | None) -> str:
    if wanted is None and len(found) == 1:
        return found[0]
    # The exact name first, then its usual synonyms.
    for candidate in (wanted, *_SPLITS.get(wanted or "train", ())):
        if candidate in found:
            return str(candidate)
    raise ValueError(
        f"{name!r} has no split {wanted or 'train'!r} (found: {', '.join(found)}): write '{name}?split={found[0]}'"
    )


def _open_hub(name: str, split: str | None, streaming: bool, wanted: Mapping[str, str]) -> RowSource:
    import datasets

    try:
        loaded = datasets.load_dataset(name, wanted.get("config"), revision=wanted.get("revision"), streaming=streaming)
    except Exception as error:  # whatever a download can raise, the user needs to know which source it was
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{name!r} is not a file or folder here, and the hub has no such dataset ({reason}): give a file "
            f"({ACCEPTED}), a folder of such files, a hub id like 'org/name?config=main' or a task like 'sums:prompts'"
        ) from error
    rows = loaded[_pick_split(name, list(loaded), split)]
    if streaming:
        return MemoryRows(name, rows, num_rows=_known_rows(rows), fingerprint=_describe(rows))
    return MemoryRows(name, rows, num_rows=len(rows), fingerprint=rows._fingerprint)


def _known_rows(rows: Any) -> int | None:
    splits = getattr(rows.info, "splits", None) or {}
    known = splits.get(str(rows.split)) if rows.split is not None else None
    return getattr(known, "num_examples", None) or None


def _describe(rows: Any) -> str:
    # A stream has no fingerprint: its metadata must serve as one.
    return f"{rows.info.dataset_name}/{rows.info.config_name}/{rows.info.version}/{rows.split}/{_known_rows(rows)}"
