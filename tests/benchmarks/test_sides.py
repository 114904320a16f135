"""How a comparison chooses the peer's settings, and what it makes of the runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sides

    yield sides
    sys.modules.pop("sides")


def test_the_peer_is_compared_as_it_comes_and_at_its_best(sides, capsys):
    asked = []
    speeds = {"ours": [100.0, 120.0, 90.0], "trl": [10.0, 30.0, 10.0], "trl-2": [50.0, 40.0, 60.0], "trl-1": [45.0]}
    memory = {"ours": 20.0, "trl": 80.0, "trl-2": 40.0, "trl-1": 10.0}

    def measure(side, number):
        asked.append((side, number))
        if side == "trl-4":
            raise RuntimeError("trl-4 failed:\nValueError: four are too many")
        speed = speeds[side][number]
        return {"seconds": 1000 / speed, "tokens_per_s": speed, "peak_mib": memory[side]}

    sides.compare(measure, ["trl", "trl-4", "trl-2", "trl-1"], 3, "dpo")
    said = capsys.readouterr().out
    # Each setting once; then the first and the fastest in turn with ours.
    assert asked[:4] == [("trl", 0), ("trl-4", 0), ("trl-2", 0), ("trl-1", 0)]
    assert asked[4:] == [(side, n) for n in range(3) for side in ("ours", "trl", "trl-2")]
    assert "trl-4        refused: ValueError: four are too many" in said
    # Medians of pairwise ratios: 10, 4, 9 and 2, 3, 1.5.
    assert "as it comes: ours 9.00x as fast, 0.25x the memory" in said
    assert "at its best: ours 2.00x as fast, 0.50x the memory" in said
    assert "the peer's smallest setting, trl-1, one run" in said


def test_one_setting_can_be_both(sides, capsys):
    def measure(side, number):
        return {"seconds": 1.0, "tokens_per_s": 6.0 if side == "ours" else 2.0, "peak_mib": 1.0}

    sides.compare(measure, ["trl"], 1, "sft")
    assert "as it comes and at its best: ours 3.00x as fast" in capsys.readouterr().out
    sides.compare(measure, [], 1, "ppo")
    assert "x as fast" not in capsys.readouterr().out
