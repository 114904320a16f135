"""The benchmark of compressors: figures from traces, and tables from figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compression

    yield compression
    sys.modules.pop("compression")


def test_the_most_bytes_at_once(bench):
    def memory(ts, number):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": number}}

    # Out of order; what was allocated before counts nothing.
    events = [memory(3, -100), memory(1, 100), memory(2, 50), {"name": "aten::mm", "ts": 0}, memory(4, 30)]
    assert bench.most_allocated(events) == 150
    assert bench.most_allocated([memory(1, -80), memory(2, 60)]) == 60


def test_a_small_context(bench, capsys, monkeypatch):
    """Bytes of a cache by hand, and memory that grows with the context where it is computed whole."""
    monkeypatch.setattr(bench, "NEW_TOKENS", 2)
    model = bench.make_model(1024)
    spent = {}
    for size in (256, 512):
        context = torch.randint(3, 100, (size,)).tolist()
        makers = bench.compressors(model)
        spent[size] = {name: bench.costs(makers[name], model, context) for name in (bench.FULL, "learned, 8x")}
        layers, heads, width = 4, 2, 32
        entry = layers * heads * width * 2 * 4 / 1e6  # keys and values in fp32
        assert spent[size][bench.FULL]["cache"] == pytest.approx(size * entry)
        assert spent[size]["learned, 8x"]["cache"] == pytest.approx(size / 8 * entry)
        assert spent[size][bench.FULL]["prefill"] > spent[size][bench.FULL]["cache"]
    assert spent[512][bench.FULL]["prefill"] > 1.8 * spent[256][bench.FULL]["prefill"]
    assert spent[512]["learned, 8x"]["prefill"] < 1.3 * spent[256]["learned, 8x"]["prefill"]
    lines = bench.table(spent[512]).splitlines()
    assert lines[2].startswith(f"| whole context | {512 * entry:.2f} | ")
    assert next(iter(bench.requirements(spent[512]).values()))
