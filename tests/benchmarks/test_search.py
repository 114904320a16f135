"""What the benchmark of searches makes of samples and rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import search

    yield search
    sys.modules.pop("search")


def test_votes_among_subsets(bench):
    # 20 right answers of 32; with weights, the wrong ones win.
    keys, right = [["a"] * 20 + ["b"] * 12], [[1.0] * 20 + [0.0] * 12]
    even, skewed = [[1.0] * 32], [[0.1] * 20 + [1.0] * 12]
    rows = {row["n"]: row for row in bench.votes(keys, right, even, 10.0, None)}
    assert rows[32]["accuracy"] == 1.0
    assert rows[1]["accuracy"] == pytest.approx(20 / 32, abs=4 * (20 * 12 / 32**2 / bench.SUBSETS) ** 0.5)
    assert rows[1]["accuracy"] < rows[16]["accuracy"]
    assert (rows[4]["policy"], rows[4]["scorer"]) == (40.0, 0.0)
    rows = {row["n"]: row for row in bench.votes(keys, right, skewed, 10.0, [9.0] + [5.0] * 31)}
    assert rows[32]["accuracy"] == 0.0
    assert rows[4]["scorer"] == 9 + 3 * 5


def test_the_table_has_means_over_seeds(bench):
    setting = [*bench.SETTINGS][1]
    common = {"setting": setting, "method": "beam", "scorer_name": "PRM", "n": 8}
    rows = [
        {**common, "seed": 0, "accuracy": 0.5, "policy": 100.0, "scorer": 50.0},
        {**common, "seed": 1, "accuracy": 0.7, "policy": 300.0, "scorer": 50.0},
        {**common, "seed": 1, "accuracy": 0.8, "policy": 300.0, "scorer": 50.0},  # measured again: the last counts
        {
            **common,
            "method": "greedy",
            "scorer_name": "",
            "n": 0,
            "seed": 0,
            "accuracy": 0.25,
            "policy": 30.0,
            "scorer": 0,
        },
    ]
    found = bench.points(rows)
    point = found[setting, "beam", "PRM", 8]
    assert (point.accuracy, point.tokens) == pytest.approx((0.65, 250.0))
    lines = bench.table(found, [8]).splitlines()
    assert "| beam, 8 |  |  | 65 % at 250 |  |  |" in lines
    assert "| greedy | 25 % at 30 |  |  |  |  |" in lines


def test_labelled_solutions_include_guesses(bench):
    rows = bench.labelled(80, seed=1)
    guesses = [row for row in rows if len(row["completions"]) == 1]
    assert (len(rows), len(guesses)) == (80, 20)
    for row in rows:
        terms = [int(term) for term in row["prompt"].removesuffix("=?").split("+")]
        assert row["labels"][-1] == (row["completions"][-1] == f"#{sum(terms)}" and all(row["labels"]))
    assert 0 < sum(row["labels"][0] for row in guesses) < 20


def test_a_figure_is_drawn(bench, tmp_path):
    common = {"setting": "harder", "scorer_name": "PRM", "policy": 30.0, "scorer": 1.0, "seed": 0, "accuracy": 0.5}
    rows = [{**common, "method": "best-of-n", "n": n} for n in (1, 2)] + [{**common, "method": "beam", "n": 8}]
    bench.draw(bench.points(rows), tmp_path / "search.svg")
    assert (tmp_path / "search.svg").read_text().startswith("<?xml")
