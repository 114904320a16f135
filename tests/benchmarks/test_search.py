"""The benchmark of searches: curves from samples, and tables from rows."""

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
    sys.modules.pop("search_models")


@pytest.fixture
def models(bench):
    return sys.modules["search_models"]


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


def test_each_step_slips_with_a_probability_of_its_own(models):
    rows = list(models.slipping(models.sources("prompts", 400, 1, "&high=12", [5]), 0.25))
    slips = 0
    for row in rows:
        total, *terms = [int(term) for term in row["prompt"].removesuffix("=?").split("+")]
        for term, step, label in zip(terms, row["completions"], row["labels"], strict=False):
            left, shown = step.split("=")
            assert left == f"{total}+{term}"
            assert label == (int(shown) == total + term)
            slips += not label
            total = int(shown)
        assert (row["completions"][-1], row["labels"][-1]) == (f"#{total}", True)
        assert row["completion"].split("\n") == row["completions"]
    # Within four standard deviations of a quarter of the 1,600 steps.
    assert abs(slips - 400) < 4 * (1600 * 0.25 * 0.75) ** 0.5
    assert all(all(row["labels"]) for row in models.slipping(models.sources("prompts", 40, 1, "&high=12", [3]), 0.0))


def test_a_number_that_is_skipped_makes_its_step_wrong(models):
    rows = list(models.slipping(models.sources("prompts", 200, 2, "&high=12", [4]), 0.0, skips=0.5))
    for row in rows:
        numbers = [int(number) for number in row["prompt"].removesuffix("=?").split("+")]
        # Without skips, there is a step for each addition and one for the answer.
        assert all(row["labels"]) == (len(row["completions"]) == 4) == (row["completion"].endswith(f"#{sum(numbers)}"))
    assert 0 < sum(all(row["labels"]) for row in rows) < 200


@pytest.mark.parametrize(
    ("completion", "labels"),
    [
        ("3+14=17\n17+9=26\n#26", [True, True, True]),
        ("3+14=16\n16+9=25\n#25", [False, True, True]),
        ("3+14=17\n17+9=26\n#27", [True, True, False]),
        ("3+9=12\n12+9=21\n#21", [False, True, True]),  # another number
        ("3+14=17\n#17", [True, False]),  # ends too early
        ("3+14=17\n#12", [True, False]),  # nor is it the sum of the others
        ("3+14=17\n17+9=26\n26+9=35\n#35", [True, True, False, False]),  # too late
        ("#26", [True]),
        ("#25", [False]),
        ("3+14=x\nx+9=26\n#26", [False, False, True]),
        ("", [False]),
    ],
)
def test_steps_are_labelled(models, completion, labels):
    assert models.step_labels("3+14+9=?", completion) == labels


def test_pairs_are_a_right_and_a_wrong_solution_of_one_problem(models):
    drawn = [("3+4=?", ["3+4=7\n#7", "#8", "3+4=6\n#6", "3+4=6\n#7"]), ("1+1=?", ["#3"])]
    assert models.pairs(drawn) == [
        {"prompt": "3+4=?", "chosen": "3+4=7\n#7", "rejected": "#8"},
        {"prompt": "3+4=?", "chosen": "3+4=7\n#7", "rejected": "3+4=6\n#6"},
    ]
    rows = models.labelled(drawn)
    assert [row["labels"] for row in rows] == [[True, True], [False], [False, True], [False, False], [False]]


def test_a_figure_is_drawn(bench, tmp_path):
    common = {"setting": "harder", "scorer_name": "PRM", "policy": 30.0, "scorer": 1.0, "seed": 0, "accuracy": 0.5}
    rows = [{**common, "method": "best-of-n", "n": n} for n in (1, 2)] + [{**common, "method": "beam", "n": 8}]
    bench.draw(bench.points(rows), tmp_path / "search.svg")
    assert (tmp_path / "search.svg").read_text().startswith("<?xml")
