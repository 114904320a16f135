"""Caches tokenised examples on disk: rows are tokenised once, and again when anything they depend on changes.

An entry's name is a digest of the rows themselves, the tokenizer, the options, and the code that makes examples; where
one of these cannot be determined exactly (a user's transform or datamodule, a template that writes today's date),
nothing is cached.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from inspect import isfunction
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..sequences import example
from ..utils.files import atomic_file
from .example_store import ExampleStore
from .files import RowFile, RowSource
from .filtered_rows import FilteredRows
from .joined_rows import JoinedRows
from .sources import MemoryRows, RenamedRows
from .transformed_rows import PairedRows, TransformedRows

# Below this number, tokenising rows is faster than a look-up.
LEAST_ROWS = 2000
# Options of datamodules that select the rows, which the source's digest covers, or the order and size of batches.
NOT_OF_EXAMPLES = (
    *("train", "val", "test", "predict", "tokenizer", "columns", "transform", "filters", "pair_by", "partners", "seed"),
    *("global_batch_size", "eval_batch_size", "drop_last", "group_by_prompt", "shuffle", "streaming", "shuffle_buffer"),
)
_MOST_ENTRIES = 16
_ENTRY = re.compile(r"[0-9a-f]{64}\.npz")
_PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow", "numpy")
_OWN = __name__.rpartition(".")[0]


def cache_folder() -> Path | None:
    """Returns the folder of entries: ``RLHF_LIGHTNING_CACHE`` or the user's cache; ``None`` if the variable is 0."""
    chosen = os.environ.get("RLHF_LIGHTNING_CACHE")
    if chosen is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_lightning"
    return None if chosen in ("", "0") else Path(chosen).expanduser()


def entry_name(source: RowSource, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str | None:
    """Returns the name of an entry; ``None`` where its dependencies cannot be determined exactly.

    Args:
        source: the rows.
        tokenizer: tokenises them.
        options: all else that an example depends on, as plain values.
    """
    rows, words = _digest_of_rows(source), _digest_of_tokenizer(tokenizer)
    if rows is None or words is None:
        return None
    try:
        content = json.dumps([rows, words, _code(), options], sort_keys=True)
    # An option that is not a plain value, such as a user's function.
    except TypeError:
        return None
    return blake2b(content.encode(), digest_size=32).hexdigest()


def read_entry(name: str) -> tuple[ExampleStore, dict[str, int]] | None:
    """Reads the examples of an entry and the report on them; ``None`` if it is missing or damaged."""
    folder = cache_folder()
    path = None if folder is None else folder / f"{name}.npz"
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        about = json.loads(arrays.pop("about").tobytes())
        # A damaged disk must not change what is trained on.
        if about["digest"] != _digest_of_arrays(arrays):
            return None
        store = ExampleStore.from_arrays(arrays, about["row_ids"], about["fields"])
        # The time of the last use, by which old entries are removed.
        os.utime(path)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return store, about["report"]


def write_entry(name: str, store: ExampleStore, report: Mapping[str, int]) -> None:
    """Writes examples under a name, unless their fields cannot be stored exactly; a full disk is not an error."""
    folder = cache_folder()
    arrays, row_ids, fields = store.to_arrays()
    try:
        about = {"row_ids": row_ids, "fields": fields, "report": dict(report), "digest": _digest_of_arrays(arrays)}
        written = json.dumps(about)
    except (TypeError, ValueError):
        return

    # JSON turns some values into others (tuples, keys that are numbers): only what comes back the same is cached.
    again = json.loads(written)["fields"]
    if folder is None or any(repr(one) != repr(two) for one, two in zip(again, fields, strict=True)):
        return
    try:
        # Runs on one machine or several may make the same entry at the same time.
        with atomic_file(folder / f"{name}.npz", writer=f".{uuid4().hex}") as file:
            np.savez(file, allow_pickle=False, about=np.frombuffer(written.encode(), np.uint8), **arrays)
        entries = sorted((file for file in folder.iterdir() if _ENTRY.fullmatch(file.name)), key=_used)
        for old in entries[:-_MOST_ENTRIES]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def _used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process removed it
        return 0.0


def _digest_of_arrays(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{len(arrays[name])}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _digest_of_rows(source: RowSource) -> Any:
    """Digests all that determines a source's rows and their ids; ``None`` where that is unknown."""
    # Rows on disk: by their bytes, and by the name and suffix that decide on their ids and reader.
    if isinstance(source, RowFile):
        with source.path.open("rb") as file:
            digest = blake2b(digest_size=32)
            while block := file.read(1 << 20):
                digest.update(block)
        return [type(source).__name__, source.name, source.path.suffix.lower(), digest.hexdigest()]

    # Several parts: by the digest of each.
    if isinstance(source, JoinedRows):
        parts = [_digest_of_rows(part) for part in source.parts]
        return None if None in parts else [type(source).__name__, source.name, parts, getattr(source, "time", 0)]

    # Rows in memory, if JSON can represent them.
    if isinstance(source, MemoryRows):
        if not isinstance(source.rows, list):
            return None
        try:
            return [source.name, blake2b(json.dumps(source.rows).encode(), digest_size=32).hexdigest()]
        except TypeError:
            return None

    # Rows that are changed on the way: by the change and by what it changes.
    inner = getattr(source, "inner", None)
    rows = None if inner is None else _digest_of_rows(inner)
    return None if rows is None else _digest_of_change(source, rows)


def _digest_of_change(source: RowSource, rows: Any) -> Any:
    """Digests what a source makes of other rows, given their digest."""
    if isinstance(source, RenamedRows):
        return ["renamed", sorted(source.columns.items()), rows]
    if isinstance(source, PairedRows):
        return ["paired", list(source.weights.items()), rows]
    if isinstance(source, FilteredRows):
        own = all(type(each).__module__.startswith(f"{_OWN}.") for each in source.filters)
        return ["filtered", [each.fingerprint for each in source.filters], rows] if own else None
    if isinstance(source, TransformedRows) and isfunction(source.transform):
        function = source.transform
        # Only transforms of this package, whose code is part of the key; a user's function may read anything.
        if function.__module__.startswith(f"{_OWN}.") and function.__closure__ is None:
            return ["transformed", function.__module__, function.__qualname__, rows]
    return None


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collects all that determines the tokens; ``None`` if a tokenizer or template depends on anything else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = tokenizer.chat_template
    known = type(tokenizer).__module__.startswith("transformers.")
    # A template that writes today's date gives other tokens tomorrow.
    if backend is None or not known or "strftime_now" in json.dumps(template):
        return None
    # Settings are attributes as well: add_bos_token, the special tokens, a longest length.
    settings = {key: repr(value) for key, value in vars(tokenizer).items() if key != "_tokenizer"}
    return [type(tokenizer).__qualname__, backend.to_str(), template, settings]


@cache
def _code() -> list[str]:
    """Returns a digest of this package's code that makes examples, and the versions of the packages it calls."""
    room = Path(__file__).parent
    rooms = (room, room.parent / "datamodules")
    files = [file for room in rooms for file in room.rglob("*.py")] + [Path(example.__file__)]
    digest = blake2b(digest_size=32)
    for file in sorted(files):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in _PACKAGES)]
