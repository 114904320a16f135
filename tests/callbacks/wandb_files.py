"""Reads what W&B writes offline, from the bytes of the run file alone.

The file is a log of protocol buffers: a header of seven bytes, then blocks of 32 KiB, in which a record is one fragment
or several, each with a checksum of four bytes, its length in two and its kind in one: whole, first, middle, last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4


def records(folder: Path) -> Iterator[Record]:
    """The records of the only run below a folder."""
    [file] = folder.rglob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place < len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # padding at the end of a block
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged records, in their order."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append(items)
    return rows


def axes(folder: Path) -> dict[str, str]:
    """Metric patterns and the metric that is their axis."""
    found = (record.metric for record in records(folder) if record.WhichOneof("record_type") == "metric")
    return {metric.name or metric.glob_name: metric.step_metric for metric in found}


def artifacts(folder: Path) -> list[Any]:
    """Artifacts that a `wandb sync` would upload."""
    return [
        record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
        for record in records(folder)
        if record.WhichOneof("record_type") == "artifact"
        or (
            record.WhichOneof("record_type") == "request"
            and record.request.WhichOneof("request_type") == "log_artifact"
        )
    ]
