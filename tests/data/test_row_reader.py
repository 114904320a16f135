"""Rows that are kept, cut, dropped and skipped are counted and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.row_reader import RowReader
from rlhf_lightning.datamodules import PreferenceDataModule, open_source

from ..datamodules.toys import chars, complaint

# With their end-of-sequence tokens: sequences of 4, 6, 9 and 7 tokens; the third has a prompt of 6.
PAIRS = [
    {"prompt": "12", "chosen": "a", "rejected": "b"},
    {"prompt": "12", "chosen": "abc", "rejected": "b"},
    {"prompt": "123456", "chosen": "a", "rejected": "bc"},
    {"prompt": "123456", "chosen": "a"},
    {"prompt": "123", "chosen": "a", "rejected": "bcd"},
]


def reader(rows: Any = PAIRS, **settings: Any) -> RowReader:
    contract = PreferenceDataModule(tokenizer=chars())
    return RowReader(open_source(rows), contract.make_examples, **settings)


@pytest.mark.parametrize(
    ("policy", "expected", "kept"),
    [
        ("drop", {"kept": 2, "dropped": 2, "truncated": 0, "tokens": 6 + 8, "longest": 6}, [1, 2]),
        (
            "truncate_start",
            {"kept": 4, "dropped": 0, "truncated": 2, "tokens": 6 + 8 + 8 + 8, "longest": 6},
            [1, 2, 3, 5],
        ),
        ("truncate_end", {"kept": 3, "dropped": 1, "truncated": 1, "tokens": 6 + 8 + 8, "longest": 6}, [1, 2, 5]),
    ],
)
def test_counts(policy: Any, expected: dict[str, int], kept: list[int]) -> None:
    reading = reader(max_length=6, on_too_long=policy, on_bad_row="skip")
    store = reading.read_all()
    assert reading.report == {"rows": 5, "examples": 4, "bad": 1, "filtered": 0, **expected}
    assert [example.row_id for example in store] == [f"memory:{number}" for number in kept]
    assert {tuple(sorted(example.fields)) for example in store} == {()}


def test_one_line_says_it_all() -> None:
    for policy, line in (
        ("drop", "2 of 4 examples kept, 2 dropped as longer than max_length=6, 1 bad rows skipped, 14 tokens"),
        (
            "truncate_start",
            "4 of 4 examples kept, 2 cut to max_length=6 (truncate_start), 1 bad rows skipped, 30 tokens",
        ),
    ):
        reading = reader(max_length=6, on_too_long=policy, on_bad_row="skip")
        reading.read_all()
        assert reading.describe() == f"memory: 5 rows, {line}, longest sequence 6"


def test_nothing_is_cut_without_a_length() -> None:
    reading = reader(PAIRS[:3])
    reading.read_all()
    assert reading.report == {
        "rows": 3,
        "examples": 3,
        "kept": 3,
        "dropped": 0,
        "truncated": 0,
        "bad": 0,
        "filtered": 0,
        "tokens": 6 + 8 + 11,
        "longest": 9,
    }


def test_the_first_bad_row_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "1", "chosen": "a", "rejected": "b"}\n\n{"prompt": "1", "chosen": "a", "rejected": "a"}\n'
    )
    assert complaint(reader(str(path)).read_all) == (
        f"{path}:3: chosen and rejected are equal ('a'): a pair needs two different completions"
    )
    path.write_text('{"prompt": "1", "chosen": "a", "rejected": "b"}\nnonsense\n')
    assert complaint(reader(str(path)).read_all).startswith(f"{path}:2: not JSON (Expecting value at character 1)")


def test_the_first_few_skipped_rows_are_shown() -> None:
    bad = [{"prompt": "1", "chosen": "a", "rejected": "a"}] * 5
    with pytest.warns(UserWarning, match="skipped memory:") as shown:
        store = reader([*bad, *PAIRS[:1]], on_bad_row="skip").read_all()
    assert len(store) == 1
    assert [str(warning.message).partition(": ")[0] for warning in shown] == [f"skipped memory:{i}" for i in (1, 2, 3)]


def test_too_long_is_an_error_if_asked_even_where_bad_rows_are_skipped() -> None:
    reading = reader(max_length=5, on_too_long="error", on_bad_row="skip")
    assert complaint(reading.read_all) == (
        "memory:2: 6 tokens, expected at most max_length=5: raise it, shorten the row or set on_too_long"
    )


def test_nothing_left_is_an_error() -> None:
    assert complaint(reader(PAIRS[:3], max_length=2).read_all) == (
        "no example is left: memory: 3 rows, 0 of 3 examples kept, 3 dropped as longer than max_length=2, "
        "0 tokens, longest sequence 0"
    )
