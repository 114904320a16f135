"""Rows of earlier rounds: what comes back, against a recomputation from all rows that were ever made."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.self_improvement import Sample, ScoredPrompt
from rlhf_lightning.self_improvement.replay import (
    KeptRow,
    RowReplay,
    exchange,
    kept_lines,
    priority_of,
    read_kept,
    read_replay,
)

from .naive_replay import Made, naive_replay, texts


@pytest.mark.parametrize("capacity", [1, 7, 1000])
@pytest.mark.parametrize(("share", "max_age"), [(0.5, None), (2.0, 2), (9.0, 1)])
def test_what_comes_back_is_what_a_naive_computation_draws(tmp_path, capacity, share, max_age):
    chance = random.Random(f"{capacity}{share}")
    options: dict[str, Any] = {"capacity": capacity, "share": share, "max_age": max_age}
    rounds: dict[int, Made] = {}
    kept: list[KeptRow] = []
    came_back = 0
    for number in range(1, 9):
        made = []
        for n in range(chance.randrange(1, 12)):
            # Few texts: some are made again, in this round or in a later one.
            row = {"prompt": f"p{chance.randrange(4)}\u2028", "completion": f"c{chance.randrange(5)}"}
            made.append((row | {"provenance": {"seed": 100 * number + n}}, chance.choice([0.0, 0.5, 1.0, 2.0])))
        now = [row for row, _ in made]
        drawn, kept = exchange(made, kept, RowReplay(**options, round=number), seed=5)
        assert drawn == naive_replay(rounds, now, number=number, seed=5, **options)
        assert len({texts(row) for row in drawn} - {texts(row) for row in now}) == len(drawn)
        rounds[number] = made
        came_back += len(drawn)
        # Through the file, as rounds do.
        (tmp_path / "replay.jsonl").write_text(kept_lines(kept), encoding="utf-8")
        assert read_kept(tmp_path / "replay.jsonl") == kept
        kept = read_kept(tmp_path / "replay.jsonl")
    assert came_back > 0


def test_the_first_round_has_nothing_that_comes_back():
    row = {"prompt": "a", "completion": "b", "provenance": {}}
    assert exchange([(row, 1.0)], [], RowReplay(capacity=5, share=3.0), seed=0) == ([], [KeptRow(1, 1.0, row)])


def test_a_replayed_row_stays_what_it_was():
    row = {"prompt": "a", "completion": "b", "provenance": {"model": "x"}}
    kept = [KeptRow(1, 1.0, row)]
    (drawn,), after = exchange([(row | {"prompt": "c"}, 0.0)], kept, RowReplay(capacity=5, share=1.0, round=3), seed=0)
    assert drawn["provenance"] == {"model": "x", "round": 1}
    assert after == kept
    assert row["provenance"] == {"model": "x"}


def test_the_frontier_is_the_deviation_of_the_judged_samples():
    scores = [1.0, None, 0.0, 1.0, math.nan, 0.0]
    scored = ScoredPrompt("2+2=?", tuple(Sample("#4", score, ended=False) for score in scores))
    assert priority_of(scored, "frontier") == pytest.approx(math.sqrt(4 * 0.25 / 3))
    assert priority_of(scored, "uniform") == 1
    assert priority_of(ScoredPrompt("2+2=?", (Sample("#4", 1.0),)), "frontier") == 0


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"capacity": 0}, "replay.capacity is 0; it must be a whole number of at least 1 (1000 is usual)"),
        ({"capacity": 1.5}, "replay.capacity is 1.5"),
        ({"capacity": 5, "share": 0.0}, "replay.share is 0.0; it must be above 0"),
        ({"capacity": 5, "share": -1}, "replay.share is -1"),
        ({"max_age": 0}, "replay.max_age is 0; it must be a whole number of at least 1 (null is no limit)"),
        ({"priority": "frontiers"}, "replay.priority is 'frontiers'; it must be one of uniform, frontier"),
        ({"capacity": 5, "ratio": 0.2}, "replay has no option 'ratio'"),
        ({"capacty": 5}, "replay has no option 'capacty'; did you mean 'capacity'?"),
        (5, "replay is 5; it must be a RowReplay or a mapping of its options, such as replay={'capacity': ...}"),
    ],
)
def test_wrong_options(written, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        read_replay(written)
    assert "\n" not in str(error.value)


def test_another_file_is_no_buffer(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(kept_lines([KeptRow(1, 1.0, {})]) + '{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"line 2 of '.*pairs.jsonl' is no row with its round and priority: give the"):
        read_kept(file)
