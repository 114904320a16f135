"""Rows that a function rewrites, and pairs made of rated rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.files import FilteredRowError
from rlhf_lightning.data.transformed_rows import PairedRows, TransformedRows
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule, open_source

from ..datamodules.toys import chars, complaint, ids

ROWS = [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": None}, {"q": "3+3=", "a": "6"}]


def solved(columns: dict[str, Any]) -> dict[str, Any] | None:
    return None if columns["a"] is None else {"prompt": columns["q"], "completion": columns["a"]}


def test_a_function_rewrites_rows_or_drops_them() -> None:
    source = TransformedRows(open_source(ROWS), solved)
    assert list(source) == [
        ("memory:1", {"prompt": "1+1=", "completion": "2"}),
        ("memory:3", {"prompt": "3+3=", "completion": "6"}),
    ]
    assert (source.name, source.num_rows) == ("memory", 3)
    (_, stored) = list(source.raw())[1]
    with pytest.raises(FilteredRowError):
        source.parse(stored)


def test_it_sees_columns_by_their_new_names() -> None:
    source = TransformedRows(open_source(ROWS[:1], columns={"prompt": "q"}), lambda row: {"seen": sorted(row)})
    assert list(source) == [("memory:1", {"seen": ["a", "prompt"]})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "2"}], "memory:1: transform tests.data.test_transformed_rows.solved failed with KeyError: 'q'"),
        ([["q", "a"]], "cannot read rows from a list of list"),
    ],
)
def test_what_a_function_cannot_read_is_a_bad_row(rows: list[Any], message: str) -> None:
    assert complaint(lambda: list(TransformedRows(open_source(rows), solved))).startswith(message)


def test_what_is_no_row_is_refused() -> None:
    source = TransformedRows(open_source(ROWS), str)  # type: ignore[arg-type]
    assert complaint(lambda: list(source)) == (
        "memory:1: transform builtins.str returned str (\"{'q': '1+1=', 'a': '2'}\"), expected columns with their "
        "values, or None to drop the row"
    )


def test_the_fingerprint_changes_with_the_function() -> None:
    class Other:
        def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
            return columns

    inner = open_source(ROWS)
    prints = {TransformedRows(inner, function).fingerprint for function in (solved, dict, Other())}
    assert len(prints | {inner.fingerprint}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_datamodule_counts_what_was_dropped(streaming: bool) -> None:
    data = SFTDataModule(
        train=ROWS, tokenizer=chars(), transform=solved, global_batch_size=2, shuffle=False, streaming=streaming
    )
    batches = [[example.root.children[0].tokens.tolist() for example in batch] for batch in data.train_dataloader()]
    # A stream's batch is two rows, whatever becomes of them.
    assert batches == ([[ids("2~")], [ids("6~")]] if streaming else [[ids("2~"), ids("6~")]])
    report = data.report["train"]
    assert (report["rows"], report["kept"], report["filtered"], report["bad"]) == (3, 2, 1, 0)


# Pairs.


def rated(prompt: Any, completion: str, good: Any, **other: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "good": good, **other}


def pair(prompt: Any, chosen: str, rejected: str, scores: tuple[float, float], **other: Any) -> dict[str, Any]:
    scored = {"chosen_score": scores[0], "rejected_score": scores[1]}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scored, **other}


def paired(rows: list[dict[str, Any]], **weights: float) -> PairedRows:
    return PairedRows(open_source(rows), weights or {"good": 1.0})


def test_consecutive_rows_of_one_prompt_are_paired() -> None:
    rows = [
        rated("p", "bad", 1),
        rated("p", "good", 3),
        rated("q", "alone", 2),
        rated("p", "again", 5),
        rated("p", "equal", 5),
    ]
    assert list(paired(rows)) == [("memory:1+2", pair("p", "good", "bad", (3.0, 1.0)))]


def test_three_rows_make_three_pairs_but_for_equal_ones() -> None:
    rows = [rated("p", "a", 2), rated("p", "b", 1), rated("p", "c", 2.0), rated("q", "d", 1), rated("q", "e", "2")]
    assert list(paired(rows)) == [
        ("memory:1+2", pair("p", "a", "b", (2.0, 1.0))),
        ("memory:2+3", pair("p", "c", "b", (2.0, 1.0))),
        ("memory:4+5", pair("q", "e", "d", (2.0, 1.0))),
    ]


def test_ratings_are_weighed_and_agreed_columns_stay() -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": chat, "response": "x", "ratings": {"good": 4, "long": 4}, "lang": "en", "id": 1},
        {"prompt": chat, "response": "y", "ratings": {"good": 3, "long": 0}, "lang": "en", "id": 2},
    ]
    assert list(paired(rows, good=1.0, long=-0.5)) == [("memory:1+2", pair(chat, "y", "x", (3.0, 2.0), lang="en"))]


def test_a_bad_row_is_passed_on_and_parts_nothing() -> None:
    rows = [rated("p", "a", 1), rated("p", "b", None), rated("p", "c", 2), {"prompt": "p", "good": 1}]
    source = paired(rows)
    stored = dict(source.raw())
    assert list(stored) == ["memory:2", "memory:4", "memory:1+3"]
    assert source.parse(stored["memory:1+3"]) == pair("p", "c", "a", (2.0, 1.0))
    assert complaint(source.parse, stored["memory:2"]) == (
        "no column 'good' (found: prompt, completion), expected prompt, completion and the ratings to pair by: good"
    )
    assert complaint(source.parse, stored["memory:4"]).startswith("no column 'completion' (found: prompt, good)")
    data = PreferenceDataModule(train=rows, tokenizer=chars(), pair_by={"good": 1.0}, on_bad_row="skip")
    with pytest.warns(UserWarning, match="skipped memory:2: no column 'good'"):
        data.setup("fit")
    assert (data.report["train"]["kept"], data.report["train"]["bad"]) == (1, 2)


def test_no_pair_at_all_is_an_error() -> None:
    assert complaint(lambda: list(paired([rated("p", "a", 1), rated("p", "b", 1)], good=1.0, long=0.5))).startswith(
        "memory:1: no column 'long'"
    )
    assert complaint(lambda: list(paired([rated("p", "a", 1), rated("p", "b", 1)]))) == (
        "'memory' has no pairs by 1 good: expected rows that follow one another with the same prompt and different "
        "ratings"
    )


def test_rows_skipped_have_no_partner() -> None:
    rows = [rated("p", "a", 1), rated("p", "", 9), rated("p", "b", 2)]
    source = TransformedRows(open_source(rows), lambda row: row if row["completion"] else None)
    assert [row_id for row_id, _ in PairedRows(source, {"good": 1.0})] == ["memory:1+3"]


def test_what_pairs_are_known_by() -> None:
    rows = [rated("p", "a", 1), rated("p", "b", 2)]
    assert paired(rows).num_rows is None
    prints = {paired(rows).fingerprint, paired(rows, good=2.0).fingerprint, paired(rows[::-1]).fingerprint}
    assert len(prints) == 3
    assert paired(rows).fingerprint in prints


def test_pairs_of_a_stream(tmp_path: Path) -> None:
    rows = [rated(f"{number}=", answer, good) for number in range(5) for answer, good in (("1", number), ("22", 2))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "train": str(path),
        "tokenizer": chars(),
        "pair_by": {"good": 1.0},
        "global_batch_size": 3,
    }
    streamed = PreferenceDataModule(**settings, streaming=True, shuffle_buffer=2, seed=1)
    whole = PreferenceDataModule(**settings, shuffle=False)
    found = sorted(contents(streamed))
    assert found == sorted(contents(whole))
    assert [row_id.rpartition("jsonl:")[2] for row_id, _ in found] == ["1+2", "3+4", "7+8", "9+10"]


def contents(data: PreferenceDataModule) -> Iterator[tuple[str, str]]:
    return ((example.row_id, example.content_hash()) for batch in data.train_dataloader() for example in batch)
