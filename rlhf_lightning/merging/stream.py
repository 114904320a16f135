"""Merges models tensor by tensor from disk to disk, in a hidden folder that a killed merge resumes from.

A block of rows is read from every model, merged, rounded to the result's type and written; nothing larger is held. Each
finished file is renamed and noted in a journal, with the digest of its bytes; a merge with the same inputs and options
continues after it, and writes the same bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import PARTIAL, flush_to_disk, hidden_sibling, write_atomically
from .methods.base import Activations, Block, Found, Method, TensorView, block_rows, matrix_shape
from .sources import Readable, Source
from .tensor_files import HashingWriter, Shard, StoredTensor, raw_bytes

JOURNAL = "merge_journal.json"
# Blocks that are computed before the result of the first is needed.
_AHEAD = 4
MethodOf = Callable[[str], Method]
Surveys = Mapping[Method, Any]


@contextmanager
def worker_pool() -> Iterator[ThreadPoolExecutor]:
    """Makes as many threads as torch computes with; while they exist, each of them computes alone."""
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(workers)


@dataclass(frozen=True)
class ParallelView(TensorView):
    """A view whose blocks are read and computed on in several threads.

    Args:
        pool: the threads; none by default.
    """

    pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Block], Found]) -> Iterator[Found]:
        """Applies a function to all blocks, some of them ahead; yields its results in their order."""
        step = block_rows(self.rows, self.columns)
        if self.pool is None or step >= self.rows:
            yield from super().map(function)
            return

        def apply(first: int) -> Found:
            return function(self.read(first, min(step, self.rows - first)))

        ahead: deque[Future[Found]] = deque()
        try:
            for first in range(0, self.rows, step):
                ahead.append(self.pool.submit(apply, first))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


@dataclass
class Merge:
    """Everything that the blocks of a merge depend on.

    Args:
        models: M models.
        base: the base, where the method needs one.
        method_of: the method with the options of one tensor.
        precision: to compute in.
        dtype_of: type of each tensor of the result.
        fisher: of every model, where the method takes it.
        activations: of linear layers, by the names of their weights.
        pool: threads that blocks are computed in.
    """

    models: Sequence[Source]
    base: Source | None
    method_of: MethodOf
    precision: torch.dtype
    dtype_of: Callable[[str], torch.dtype]
    fisher: Sequence[Mapping[str, Tensor]] | None = None
    activations: Mapping[str, Activations] | None = None
    pool: ThreadPoolExecutor | None = None
    # Which of the inputs the result equals so far: base last.
    equal: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.equal = [True] * len(self.inputs)

    @property
    def inputs(self) -> list[Source]:
        """The models, and the base."""
        return [*self.models, *([] if self.base is None else [self.base])]

    def view(self, name: str) -> TensorView:
        """Returns a tensor of all models."""
        rows, columns = matrix_shape(self.models[0].tensors[name].shape)

        def read(first: int, count: int) -> Block:
            models = torch.empty((len(self.models), count, columns), dtype=self.precision)
            for source, out in zip(self.models, models, strict=True):
                self._read(source, name, first, out)
            base = None
            if self.base is not None:
                base = torch.empty((count, columns), dtype=self.precision)
                self._read(self.base, name, first, base)
            fisher = None
            if self.fisher is not None:
                parts = [each[name].reshape(rows, columns)[first : first + count] for each in self.fisher]
                fisher = torch.stack([part.to(self.precision) for part in parts])
            return Block(models, base, first, fisher)

        activations = None if self.activations is None else self.activations.get(name)
        return ParallelView(name, rows, columns, len(self.models), read, activations, self.pool)

    def _read(self, source: Source, name: str, first: int, out: Tensor) -> None:
        """Reads rows of one model, straight into place where they are stored in the precision of the merge."""
        tensor = source.tensors[name]
        if isinstance(tensor, StoredTensor) and tensor.dtype == out.dtype:
            tensor.read_into(out, first)
        else:
            out.copy_(tensor.rows(first, len(out)))
        # One pass: the sum is finite exactly if all entries are, but for overflow, which is looked at again.
        if not bool(torch.isfinite(out.sum())) and not bool(torch.isfinite(out).all()):
            raise ValueError(
                f"the tensor {name!r} of {str(tensor.file)!r} has values that are not finite: train or export the "
                "model again"
            )

    def surveys(self) -> dict[Method, Any]:
        """Looks at all tensors before the merge, for each of the options that some tensor is merged with."""
        views = [self.view(name) for name, tensor in self.models[0].tensors.items() if is_merged(tensor)]
        methods = dict.fromkeys(self.method_of(view.name) for view in views)
        return {method: method.survey(views, len(self.models)) for method in methods}

    def merged(self, name: str, surveys: Surveys) -> Iterator[Tensor]:
        """Merges one tensor block by block, in the type of the result."""
        tensors = [source.tensors[name] for source in self.inputs]
        if not is_merged(tensors[0]):
            yield from self._copied(name, tensors)
            return
        method, dtype, view = self.method_of(name), self.dtype_of(name), self.view(name)
        survey = surveys[method]
        observed = method.observe(view, survey)

        def merge(block: Block) -> Tensor:
            result = method.combine(block, view, observed, survey).to(dtype)
            if not bool(torch.isfinite(result.sum())) and not bool(torch.isfinite(result).all()):
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"the merged tensor {name!r} has values that are not finite in {kind}: give smaller weights, or "
                    "dtype='float32'"
                )
            self._compare(result, tensors, block.first_row)
            return result

        yield from view.map(merge)

    def _compare(self, result: Tensor, tensors: Sequence[Readable], first: int) -> None:
        """Notes which inputs the result still equals; each is read again only as long as it does."""
        for number, tensor in enumerate(tensors):
            if self.equal[number]:
                part = tensor.rows(first, len(result)).to(self.precision).to(result.dtype)
                if not torch.equal(part, result):
                    self.equal[number] = False

    def _copied(self, name: str, tensors: Sequence[Readable]) -> Iterator[Tensor]:
        """Copies a tensor of whole numbers, which all models must share."""
        rows, columns = matrix_shape(tensors[0].shape)
        step = block_rows(rows, columns)
        for first in range(0, rows, step):
            parts = [tensor.rows(first, step) for tensor in tensors]
            for part, tensor in zip(parts, tensors, strict=True):
                if not torch.equal(part, parts[0]):
                    raise ValueError(
                        f"the tensor {name!r} holds whole numbers, and differs in {str(tensor.file)!r}: models of "
                        "different buffers cannot be merged"
                    )
            yield parts[0]


def is_merged(tensor: Readable) -> bool:
    """Tells whether a tensor is merged; one of whole numbers is copied."""
    return tensor.dtype.is_floating_point


class Journal:
    """Notes finished files of a merge in its hidden folder.

    Args:
        folder: the hidden folder.
        plan: everything that the result depends on; a journal of another plan is discarded by the caller.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.content: dict[str, Any] = {"plan": json.loads(json.dumps(plan, default=str)), "shards": {}, "survey": None}

    def resume(self) -> bool:
        """Reads an earlier journal; returns whether there is one of the same plan."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not isinstance(found, dict) or found.get("plan") != self.content["plan"]:
            return False
        self.content = found
        return True

    def save(self) -> None:
        """Writes the journal."""
        write_atomically(self.path, json.dumps(self.content))

    @property
    def shards(self) -> dict[str, dict[str, Any]]:
        """Digest of each finished file, and the inputs that it equals."""
        shards: dict[str, dict[str, Any]] = self.content["shards"]
        return shards


def write_shards(
    merge: Merge, shards: Sequence[Shard], folder: Path, journal: Journal, surveys: Surveys, say: Callable[[str], None]
) -> dict[str, str]:
    """Writes all files of weights that are not finished yet.

    Args:
        merge: the merge.
        shards: the files.
        folder: the hidden folder that they are written to.
        journal: notes finished files.
        surveys: statistics of the whole models.
        say: reports progress.

    Returns:
        The sha256 of each file.
    """
    for number, shard in enumerate(shards, start=1):
        done = journal.shards.get(shard.file)
        if done is not None and (folder / shard.file).is_file():
            merge.equal = [a and b for a, b in zip(merge.equal, done["equal"], strict=True)]
            continue
        before, merge.equal = merge.equal, [True] * len(merge.equal)
        digest = _write_shard(merge, shard, folder, surveys)
        journal.shards[shard.file] = {"sha256": digest, "equal": merge.equal}
        merge.equal = [a and b for a, b in zip(before, merge.equal, strict=True)]
        journal.save()
        say(f"{shard.file}: {len(shard.tensors)} tensors ({number} of {len(shards)})")
    return {name: entry["sha256"] for name, entry in journal.shards.items()}


def _write_shard(merge: Merge, shard: Shard, folder: Path, surveys: Surveys) -> str:
    """Writes one file under a hidden name, and renames it."""
    partial = hidden_sibling(folder / shard.file, PARTIAL)
    with partial.open("wb") as file:
        writer = HashingWriter(file)
        try:
            writer.write(shard.header())
            for name in shard.tensors:
                for block in merge.merged(name, surveys):
                    writer.write(raw_bytes(block))
        finally:
            digest = writer.finish()
    partial.replace(folder / shard.file)
    flush_to_disk(folder)
    return digest
