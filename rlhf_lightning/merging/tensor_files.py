"""Reads and writes safetensors files a few rows at a time, without mapping them into memory.

The format: eight bytes with the length of a JSON header, the header with each tensor's type, shape and bytes, then the
bytes. A mapped file would count as memory of the process; here only what is read is held.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..models.safetensors_io import read_json
from .methods.base import matrix_shape

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_HASH_PART = 1 << 20
# Bytes that are written before they are flushed.
_FLUSHED_PART = 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in a safetensors file.

    Args:
        file: the file.
        dtype: of its elements.
        shape: its shape.
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def rows(self, first: int, count: int) -> Tensor:
        """Reads some rows of the tensor as a matrix (see ``matrix_shape``).

        Raises:
            ValueError: the file ends before them.
        """
        rows, columns = matrix_shape(self.shape)
        count = min(count, rows - first)
        found = torch.empty((count, columns), dtype=self.dtype)
        self.read_into(found, first)
        return found

    def whole(self) -> Tensor:
        """Reads the whole tensor in its own shape."""
        return self.rows(0, matrix_shape(self.shape)[0]).view(self.shape)

    def read_into(self, out: Tensor, first: int) -> None:
        """Reads rows into a contiguous matrix of the same type, as many as it has.

        Raises:
            ValueError: the file ends before them.
        """
        _, columns = matrix_shape(self.shape)
        view, done = raw_bytes(out), 0
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first * columns * self.dtype.itemsize)
            while done < len(view):
                part = file.readinto(view[done:])
                if not part:
                    raise ValueError(f"{str(self.file)!r} ends within a tensor: copy or export it again")
                done += part


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file.

    Raises:
        ValueError: the file is damaged or cut short, or holds a type that cannot be merged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is incomplete")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise ValueError(f"its tensor {name!r} has the type {entry['dtype']}, which cannot be merged")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the size of its tensor {name!r} does not fit its shape")
            if 8 + length + end > size:
                raise ValueError(f"it is cut short: its tensor {name!r} is incomplete")
            found[name] = StoredTensor(path, dtype, shape, 8 + length + start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} is damaged ({reason}): copy or export it again") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a model's folder.

    Raises:
        ValueError: the folder holds no such file, or lacks one that the index names.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{str(index)!r} has no weight_map: export the model again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{str(folder)!r} lacks {missing[0]!r}, which its index names: copy or export it again")
        return files
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    others = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.iterdir())[:3]
    raise ValueError(
        f"{str(folder)!r} holds no model.safetensors and no {INDEX} (it holds {', '.join(others) or 'nothing'}): give "
        "a folder that save_pretrained wrote"
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Finds all tensors in a model's folder."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found |= read_header(file)
    return found


# Writing.


@dataclass(frozen=True)
class Shard:
    """One file that will be written.

    Args:
        file: its name.
        tensors: names and shapes, in order.
        dtypes: of each tensor.
    """

    file: str
    tensors: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def header(self) -> bytes:
        """Returns the header of the file, padded to a multiple of eight bytes."""
        place, content = 0, {"__metadata__": {"format": "pt"}}
        for name, shape in self.tensors.items():
            size = math.prod(shape) * self.dtypes[name].itemsize
            entry: Any = {"dtype": _NAMES[self.dtypes[name]], "shape": shape, "data_offsets": [place, place + size]}
            content[name] = entry
            place += size
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.tensors.items())


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], most_bytes: int
) -> list[Shard]:
    """Distributes tensors over files of at most ``most_bytes``, in their order; a larger tensor has its own file."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if groups[-1] and used + size > most_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    many = len(groups) > 1
    return [
        Shard(
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" if many else "model.safetensors",
            {name: tuple(shapes[name]) for name in group},
            {name: dtypes[name] for name in group},
        )
        for number, group in enumerate(groups, start=1)
    ]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor without a copy of them."""
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class HashingWriter:
    """Writes a file, computes its sha256 and flushes it to the disk in other threads, so that none waits for another.

    Systems keep gigabytes of written pages in memory before they begin to store them; without early flushes the last
    one would take as long as all of them.

    Args:
        file: opened for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._parts: Queue[Any] = Queue(maxsize=4)
        self._flushes: Queue[Any] = Queue()
        self._unflushed = 0
        self._error: OSError | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._hash, self._flush)]
        for thread in self._threads:
            thread.start()

    def write(self, part: bytes | memoryview) -> None:
        """Appends bytes, which must not change afterwards."""
        self._parts.put(part)
        self._file.write(part)
        self._unflushed += len(part)
        if self._unflushed >= _FLUSHED_PART and self._flushes.empty():
            self._flushes.put(True)
            self._unflushed = 0

    def finish(self) -> str:
        """Flushes the file; returns the digest of everything that was written.

        Raises:
            OSError: the disk is full, or damaged.
        """
        self._parts.put(None)
        self._flushes.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def _hash(self) -> None:
        while (part := self._parts.get()) is not None:
            self._digest.update(part)

    def _flush(self) -> None:
        while self._flushes.get() is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:  # told once: the last flush would not repeat it
                self._error = error
                return


def file_digest(path: Path) -> str:
    """Computes the sha256 of a file without mapping it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_PART))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class BackgroundDigests:
    """Hashes files in another thread while the merge runs.

    Args:
        files: the files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(dict.fromkeys(files))
        self._found: dict[Path, str] = {}
        self._error: OSError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for file in self._files:
                if self._stopped.is_set():
                    return
                self._found[file] = file_digest(file)
        except OSError as error:
            self._error = error

    def result(self) -> dict[Path, str]:
        """Waits for all digests."""
        self._thread.join()
        if self._error is not None:
            raise ValueError(f"cannot read {self._error.filename!r} ({self._error.strerror})") from self._error
        return self._found

    def stop(self) -> None:
        """Ends the thread after the current file."""
        self._stopped.set()


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """Returns names, sizes and times of files: cheap, and enough to notice that an input changed while merging."""
    found = []
    for file in files:
        status = file.stat()
        found.append([str(file), status.st_size, status.st_mtime_ns])
    return found


def iterate_rows(tensor: StoredTensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """Yields a tensor as blocks of ``step`` rows, each with the number of its first row."""
    rows, _ = matrix_shape(tensor.shape)
    for first in range(0, rows, step):
        yield first, tensor.rows(first, step)
