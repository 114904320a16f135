"""Rows, tables and requirements of the benchmark of what compressors keep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compression_quality

    yield compression_quality
    sys.modules.pop("compression_quality")


def result(bench: Any, seed: int, **right: list[int]) -> dict[str, Any]:
    """Two contexts of four questions, answered alike; a fact of the first is cut by the end of a segment."""
    labels = {bench.FULL: [1, 1, 1, 1]}
    for ratio in bench.RATIOS:
        labels |= {bench.named(name, ratio): [0, 0, 0, 1] for name in bench.OTHERS}
        labels[bench.named(bench.LEARNED, ratio)] = [1, 0, 1, 1]
    labels |= {label.replace("_", " ").replace(" at ", ", "): values for label, values in right.items()}
    return {
        "seed": seed,
        "seconds": 1.0,
        "offsets": [0, 31, 32, 62, 8, 10, 40, 50],
        "cut": [False, True] + 6 * [False],
        "right": {label: 2 * values for label, values in labels.items()},
    }


def test_a_row_asks_for_every_fact_in_turn(bench):
    for row in bench.demonstrations(20, 3, length=24, facts=4):
        asked = (row["prompt"] + row["completion"]).split("?")[1:]
        assert len(asked) == len({question[0] for question in asked}) == 4
        assert all(question[1] == "#" and question[0] + question[2] in row["context"] for question in asked)


def test_the_stages_are_of_different_contexts(bench):
    stages = bench.curriculum(((24, 8, 0.25), (24, 8, 0.25), (32, 2, 0.5)), steps=40, batch=2, seed=1)
    assert [len(rows) for rows in stages] == [20, 20, 40]
    assert [len(rows[0]["context"]) for rows in stages] == [24, 24, 32]
    contexts = [row["context"] for rows in stages for row in rows]
    other = [row["context"] for rows in bench.curriculum(((24, 8, 1.0),), 40, 2, seed=2) for row in rows]
    assert len({*contexts, *other}) == len(contexts) + len(other)


def test_accuracy_by_the_place_of_the_fact(bench):
    results = [result(bench, 0), result(bench, 1, learned_at_4x=[1, 1, 0, 1])]
    assert bench.by_quarter(results[0], "learned, 4x") == [pytest.approx(2 / 3), 0, 1, 1]
    lines = bench.positions(results).splitlines()
    # Two facts of the second context are among the tokens of one slot.
    assert "| learned, 4x | 17% | 50% | 50% | 0% | 25% | 50% |" in lines
    assert "| truncation, 8x | 100% | 100% | 100% | 0% | 100% | 100% |" in lines
    assert sum(line.startswith("| whole context |") for line in lines) == 1


def test_a_place_without_facts_stays_empty(bench):
    alone = result(bench, 0)
    alone["offsets"] = [0, 31, 32, 62, 8, 20, 40, 50]
    alone["cut"] = 8 * [False]
    assert "| learned, 8x | 0% | 100% | 0% | 0% |  |  |" in bench.positions([alone]).splitlines()


def test_two_facts_in_the_tokens_of_one_slot(bench):
    assert bench.FACTS == 4
    offsets = [0, 3, 4, 20, 5, 7, 6, 21]  # of two contexts
    found = bench.crowded({"offsets": offsets}, 4)
    assert found == [True, True, False, False, True, True, True, False]
    assert bench.crowded({"offsets": offsets}, 8) == [True, True, True, False, True, True, True, False]


def test_the_table_has_means_and_worst_seeds(bench):
    results = [result(bench, 0), result(bench, 1, learned_at_4x=[1, 0, 0, 1])]
    lines = bench.table(results).splitlines()
    assert lines[0] == "| | 4x | 8x |"
    assert lines[2] == "| whole context | 100.0% (100.0%) | 100.0% (100.0%) |"
    assert lines[3] == "| learned | 62.5% (50.0%) | 75.0% (75.0%) |"
    assert lines[4] == "| truncation | 25.0% (25.0%) | 25.0% (25.0%) |"


def test_one_seed_that_keeps_less_fails(bench):
    all_right, good = [1, 1, 1, 1], result(bench, 0, learned_at_4x=[1, 1, 1, 1])
    assert list(bench.requirements([good]).values()) == [True, True]
    assert list(bench.requirements([good, result(bench, 1)]).values()) == [False, True]

    # As good as a baseline is not better; one that reads the question may be.
    same = result(bench, 1, learned_at_4x=all_right, truncation_at_8x=[1, 0, 1, 1])
    assert list(bench.requirements([good, same]).values()) == [True, False]
    reads = result(bench, 1, learned_at_4x=all_right)
    reads["right"][bench.named(bench.ASKED, 4)] = 2 * all_right
    assert list(bench.requirements([good, reads]).values()) == [True, True]


def test_the_figure_is_drawn(bench, tmp_path):
    bench.draw([result(bench, 0), result(bench, 1)], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<path") > 50
