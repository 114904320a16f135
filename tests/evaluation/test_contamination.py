"""Shared n-grams of rows against a search in every text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import cli
from rlhf_lightning.evaluation import contamination


def naive_share(words: list[str], others: list[list[str]], n: int) -> float:
    """The share of words within a window of n words that is found in another text."""
    size = min(n, len(words))
    covered = set()
    for start in range(len(words) - size + 1):
        window = words[start : start + size]
        for other in others:
            if any(other[at : at + size] == window for at in range(len(other))):
                covered |= set(range(start, start + size))
    return len(covered) / len(words)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shares_are_those_of_a_search(n: int) -> None:
    draw = random.Random(n)
    texts = [[draw.choice("abc") for _ in range(draw.randint(1, 9))] for _ in range(25)]
    others = [[draw.choice("abcd") for _ in range(draw.randint(1, 9))] for _ in range(6)]
    rows, against = ([{"text": " ".join(words)} for words in given] for given in (texts, others))
    found = contamination(rows, against, n=n)
    expected = [naive_share(words, others, n) for words in texts]
    assert [row.share for row in found.rows] == expected
    assert found.share == sum(share > 0 for share in expected) / 25
    above = contamination(rows, against, n=n, threshold=0.5).contaminated
    assert above == [f"memory:{i + 1}" for i in range(25) if expected[i] > 0.5]
    for row in found.rows:
        assert bool(row.ngram) == bool(row.found_in) == (row.share > 0)
        if row.share:
            assert row.ngram in " ".join(others[int(row.found_in.removeprefix("memory:")) - 1])


def test_columns_messages_and_case() -> None:
    rows = [{"messages": [{"role": "user", "content": "One TWO"}, {"role": "assistant", "content": "three."}], "id": 7}]
    against = [{"prompt": "zero one", "completion": "two three"}, {"steps": ["one two", "Three!"]}]
    assert contamination(rows, against[:1], n=3).share == 0  # no n-gram reaches from one column into another
    found = contamination(rows, against, n=3).rows[0]
    assert (found.share, found.ngram, found.found_in, found.words) == (1.0, "one two three", "memory:2", 3)
    two = [{"prompt": "one two", "answer": "five six"}]
    assert contamination(two, against, n=2).rows[0].share == 0.5
    assert contamination(two, against, n=2, columns=["answer"]).share == 0


def test_embedded_splits_share_no_problem() -> None:
    found = contamination("sums:prompts?split=test&rows=50", "sums:prompts?split=train&rows=200", columns=["prompt"])
    assert found.share == 0
    assert contamination("sums:prompts?rows=20", "sums:prompts?rows=20", columns=["prompt"]).share == 1


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "test.jsonl", [{"text": "a b c"}, {"text": "x y z"}])
    against = write(tmp_path / "train.jsonl", [{"text": "say a b c d"}])
    args = ["contamination", "--rows", rows, "--against", against, "--n", "2"]
    cli.main([*args, "--output", str(tmp_path / "out" / "overlaps.jsonl")])
    out = capsys.readouterr().out
    assert "1 of 2 rows share 2-grams (50.0%)" in out
    assert f"{rows}:1: 100% of 3 words, as in {against}:1: a b" in out
    written = [json.loads(line) for line in (tmp_path / "out" / "overlaps.jsonl").read_text().splitlines()]
    assert [row["share"] for row in written] == [1.0, 0.0]
    with pytest.raises(SystemExit):
        cli.main([*args, "--output", against])
    assert "already exists" in capsys.readouterr().err
    assert "say a b" in Path(against).read_text()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n": 0}, "n is 0"),
        ({"threshold": 1.0}, r"threshold is 1\.0"),
        ({"columns": ["txt"]}, "memory:1 has no column 'txt': it has text, id"),
        ({"columns": ["id"]}, r"no row of the rows has text in \['id'\]"),
    ],
)
def test_bad_input(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        contamination([{"text": "a", "id": 3}], [{"text": "a"}], **options)
