"""Tables and requirements that the benchmark of merges makes of its accuracies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merging

    yield merging
    for name in ("merging", "merging_speed"):
        sys.modules.pop(name)


def result(bench, seed: int, linear: tuple[float, float], soup: float):
    accuracies = {"start": (0.2, 0.1), "specialist, small": (0.8, 0.0), "specialist, large": (0.1, 0.5)}
    accuracies |= {label: (0.4, 0.4) for label, _, _ in bench.MERGES} | {"linear": linear}
    means = {skill: {"last": 0.8, "mean": 0.9} for skill in bench.SKILLS}
    return {
        "seed": seed,
        "accuracies": accuracies,
        "soup": {"value": soup, "best": 0.5, "ingredients": 2},
        "means": means,
    }


def test_shares_are_of_the_specialists(bench):
    results = [result(bench, 0, (0.8, 0.46), 0.5), result(bench, 1, (0.73, 0.6), 0.6)]
    assert bench.kept(results[0]["accuracies"], "linear") == pytest.approx((1.0, 0.92))
    lines = bench.markdown(results).splitlines()
    assert lines[0] == "| | seed 0: small / large | seed 1: small / large | least kept |"
    # The start and the specialists first, then the methods by the least share of any skill and seed.
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "start",
        "specialist, small",
        "specialist, large",
        "linear",
    ]
    assert "| linear | 80.0% / 46.0% | 73.0% / 60.0% | 91% |" in lines
    assert "| small: last checkpoint -> mean of the last | 80.0% -> 90.0% | 80.0% -> 90.0% | |" in lines


def test_one_seed_that_keeps_less_fails(bench):
    good = [result(bench, 0, (0.8, 0.46), 0.5), result(bench, 1, (0.73, 0.6), 0.6)]
    assert all(bench.requirements(good).values())
    assert list(bench.requirements([*good, result(bench, 2, (0.71, 0.6), 0.5)]).values()) == [False, True]
    assert list(bench.requirements([*good, result(bench, 2, (0.8, 0.6), 0.49)]).values()) == [True, False]


def test_the_figure_is_drawn(bench, tmp_path):
    bench.draw([result(bench, 0, (0.8, 0.46), 0.5)], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
