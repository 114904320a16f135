"""The file of rows of a run and its summary: two outputs never share one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.generation.output import Output

KEYS = [(0, 0), (1, 0)]


def test_outputs_that_differ_in_their_suffix_share_no_summary(tmp_path: Path) -> None:
    first, second = (Output(tmp_path / f"out.{kind}", {"seed": kind}, KEYS) for kind in ("jsonl", "json"))
    assert first.open() == set()
    first.save({"status": "unfinished"})
    first.begin(0)
    first.append({"index": 0, "sample": 0})
    first.end()
    first.release()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"out.json' has the summary of '.*out.jsonl', 'out.summary.json': write to a"):
        second.open()
    second.release()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert first.open() == {(0, 0)}
    first.release()

    # A summary whose rows were moved away belongs to nobody.
    first.path.unlink()
    assert second.open() == set()
    second.save({"status": "unfinished"})
    second.release()
    assert json.loads((tmp_path / "out.summary.json").read_text())["output"] == "out.json"
