"""Rows from everything that can hold some, with ids that say where they stand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_lightning.data import files
from rlhf_lightning.data.joined_rows import distinct
from rlhf_lightning.datamodules import open_source

from ..datamodules.toys import complaint

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prompts(rows: list[dict[str, Any]]) -> str:
    return "".join(row["prompt"] + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Writes rows in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".gz"):
        with gzip.open(path, "wt") as file:
            file.write(prompts(rows) if ".txt" in name else lines(rows))
    elif name.endswith(".txt"):
        path.write_text(prompts(rows))
    elif name.endswith(".jsonl"):
        path.write_text(lines(rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith(".csv"):
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".stream.arrow"):
        with pa.ipc.new_stream(path, pa.Table.from_pylist(rows).schema) as file:
            file.write_table(pa.Table.from_pylist(rows))
    else:
        with pa.ipc.new_file(path, pa.Table.from_pylist(rows).schema) as file:
            file.write_table(pa.Table.from_pylist(rows), max_chunksize=1)
    return path


FILES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.stream.arrow", "a.arrow", "a.txt", "a.txt.gz"]


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    source = open_source(str(path))
    # The numbers are those of an editor: the rows of a CSV file begin on its second line.
    first = 2 if name.endswith(".csv") else 1
    rows = [{"prompt": row["prompt"]} for row in ROWS] if ".txt" in name else ROWS  # all that a text holds
    expected = [(f"{path}:{first}", rows[0]), (f"{path}:{first + 1}", rows[1])]
    assert list(source) == expected
    assert list(source) == expected, "again"
    assert source.num_rows == 2


@pytest.mark.parametrize("name", FILES)
def test_a_fingerprint_changes_with_the_rows_and_not_with_the_name(tmp_path: Path, name: str) -> None:
    prints = [
        open_source(str(write(tmp_path / folder / name, rows))).fingerprint
        for folder, rows in (("x", ROWS), ("y", ROWS), ("z", [ROWS[0], {"prompt": "2+3=", "completion": "5"}]))
    ]
    if not name.endswith(".gz"):  # gzip writes the time into the file
        assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(lines(ROWS))
    assert [row for _, row in open_source(str(path))] == ROWS


def test_empty_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1]))
    assert list(open_source(str(path))) == [(f"{path}:2", ROWS[0]), (f"{path}:5", ROWS[1])]
    assert open_source(str(path)).num_rows == 2


def test_a_text_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b'\xef\xbb\xbf 1+1= \r\n\n  \n{"a": "\xc3\xa9"}\x0b\xe2\x80\xa8b\nlast')
    # Only a line feed ends a line, and nothing else of it is changed.
    expected = [(1, " 1+1= "), (4, '{"a": "\u00e9"}\x0b\u2028b'), (5, "last")]
    assert list(open_source(str(path))) == [(f"{path}:{number}", {"prompt": text}) for number, text in expected]
    assert open_source(str(path)).num_rows == 3
    assert list(open_source(str(path), columns={"question": "prompt"}))[2][1] == {"question": "last"}


def test_cells_of_several_lines_are_named_after_their_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"1\n+1","2"\n\n3,4\n')
    assert list(open_source(str(path))) == [
        (f"{path}:2", {"prompt": "1\n+1", "completion": "2"}),
        (f"{path}:5", {"prompt": "3", "completion": "4"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 1',
            "a.jsonl:2: not JSON (Expecting ',' delimiter at character 8): '{\"a\": 1', expected one",
        ),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', "a.jsonl:2: a JSON list ([1, 2]), expected one JSON object per line"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"\xff": 2}\n',
            "a.jsonl:2: not UTF-8 (byte 2 of the line), expected one JSON object per line",
        ),
        ("a.json", '[{"a": 1}, 2]', "a.json:2: a row is int (2), expected columns with their values"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: 1 cells, expected 2 as in the header (a, b)"),
        ("a.csv", 'a,b\n1,2\n"3\n', "a.csv:3: not comma-separated values: unexpected end of data"),
        ("a.json", "[1, 2", "a.json' is not a JSON list of objects: Expecting ',' delimiter: line 1 column 6 (char 5)"),
        ("a.parquet", "not parquet", "a.parquet' is not a Parquet file: Parquet magic bytes not found"),
        ("a.arrow", "not arrow at all", "a.arrow' is not an Arrow file: "),
        ("a.jsonl", "\n\n", "a.jsonl' has no rows: write at least one"),
        ("a.jsonl", "", "a.jsonl' is empty: write at least one row"),
        ("a.csv", "a,b\n", "a.csv' has no rows: write at least one"),
        ("a.md", "text", "cannot tell how to read '"),
        ("a.txt", b"1+1=\n2\xff\n", "a.txt:2: not UTF-8 (byte 1 of the line), expected one prompt per line"),
        ("a.txt", " \n\n", "a.txt' has no rows: write at least one"),
        ("a.txt.gz", "text", "a.txt.gz' is not a complete gzip file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in complaint(lambda: list(open_source(str(path))))


def test_a_row_that_is_not_json_does_not_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    source, read = open_source(str(path)), []
    for row_id, stored in source.raw():
        try:
            read.append((row_id, source.parse(stored)))
        except ValueError:
            read.append((row_id, None))
    assert read == [(f"{path}:1", {"a": 1}), (f"{path}:2", None), (f"{path}:3", {"a": 3})]


def test_a_large_file_is_fingerprinted_by_its_size_and_parts_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK", 16)
    monkeypatch.setattr(files, "_SAMPLED_BLOCKS", 4)
    lines_of = [f'{{"a": {number:03}}}\n' for number in range(100, 200)]
    texts = {"same": lines_of, "again": lines_of, "shorter": lines_of[:-1], "start": ['{"a": 999}\n', *lines_of[1:]]}
    prints = {}
    for name, text in texts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(text))
        assert path.stat().st_size > 4 * 4 * 16
        prints[name] = open_source(str(path)).fingerprint
    assert prints["same"] == prints["again"]
    assert len(set(prints.values())) == 3


# Folders.


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", ROWS[1:])
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("about")
    source = open_source(str(tmp_path))
    assert list(source) == [(f"{tmp_path}/a.jsonl:1", ROWS[0]), (f"{tmp_path}/b.parquet:1", ROWS[1])]
    assert source.num_rows == 2


def test_texts_of_a_folder_are_read_where_nothing_else_is(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", ROWS[1:])
    write(tmp_path / "a.txt.gz", ROWS[:1])
    assert [row["prompt"] for _, row in open_source(str(tmp_path))] == ["1+1=", "2+2="]
    write(tmp_path / "c.jsonl", ROWS)
    assert [row for _, row in open_source(str(tmp_path))] == ROWS


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", ROWS[:1])
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", ROWS[1:])
    folder = str(tmp_path)
    assert [row for _, row in open_source(folder, split="train")] == ROWS[:1]
    assert [row for _, row in open_source(f"{folder}?split=test", split="train")] == ROWS[1:]
    assert [row for _, row in open_source(folder)] == ROWS[:1]
    message = f"'{folder}' has no split 'validation' (found: test, train): write '{folder}?split=test'"
    assert complaint(open_source, folder, split="validation") == message


def test_validation_goes_by_several_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "dev.jsonl", ROWS[1:])
    assert [row for _, row in open_source(str(tmp_path), split="validation")] == ROWS[1:]


def test_what_datasets_saved(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(open_source(str(tmp_path / "one"))) == [(f"{tmp_path}/one:{i + 1}", row) for i, row in enumerate(ROWS)]
    both = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert [row for _, row in open_source(str(tmp_path / "two"), split="test")] == ROWS[1:]
    assert "has no split 'validation' (found: train, test)" in complaint(
        open_source, str(tmp_path / "two"), split="validation"
    )


def test_a_folder_without_rows(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    assert "has no file to read: put files of .jsonl, .json, .csv, .txt, .parquet, .arrow" in complaint(
        open_source, str(tmp_path)
    )


# Memory, tasks, lists, the hub.


def test_memory() -> None:
    expected = [("memory:1", ROWS[0]), ("memory:2", ROWS[1])]
    assert list(open_source(ROWS)) == expected
    dataset = datasets.Dataset.from_list(ROWS)
    assert [row for _, row in open_source(dataset)] == ROWS
    assert open_source(dataset).num_rows == 2
    stream = open_source(dataset.to_iterable_dataset())
    assert [row for _, row in stream] == [row for _, row in stream] == ROWS
    assert open_source(ROWS).fingerprint != open_source(ROWS[:1]).fingerprint


def test_tasks() -> None:
    source = open_source("sums:prompts?rows=3&seed=3")
    assert [row_id for row_id, _ in source] == [f"sums:prompts?rows=3&seed=3:{i}" for i in (1, 2, 3)]
    assert source.num_rows == 3


def test_lists_of_sources(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.csv", ROWS[1:])
    source = open_source([str(one), str(two), str(one)])
    expected = [(f"{one}:1", ROWS[0]), (f"{two}:2", ROWS[1]), (f"{one}:1#2", ROWS[0])]
    assert list(source) == expected, "a source that is listed twice counts twice, under names of its own"
    assert source.num_rows == 3


def test_sources_that_share_a_name_have_rows_of_their_own(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(both).save_to_disk(name := f"{tmp_path}/two")
    found = list(open_source([f"{name}?split=test", f"{name}?split=train"]))
    assert found == [(f"{name}:1", ROWS[1]), (f"{name}:1#2", ROWS[0])], "ids of the first source are those it has alone"

    # A folder and a file of it; lists that are read together.
    (tmp_path / "many").mkdir()
    one, two = (str(write(tmp_path / f"many/{part}.jsonl", ROWS[:1])) for part in "ab")
    folder = [row_id for row_id, _ in open_source([str(tmp_path / "many"), one])]
    assert folder == [f"{one}:1", f"{two}:1", f"{one}:1#2"]
    lists = [[one, one], [one], [one, two, one], [two]]
    ids = [row_id for source in distinct(map(open_source, lists)) for row_id, _ in source]
    assert len(set(ids)) == len(ids) == 7


def test_columns_are_renamed() -> None:
    rows = [{"question": "q", "prompt": "old", "answer": "a", "id": 1}]
    source = open_source(rows, columns={"prompt": "question", "completion": "answer", "old_prompt": "prompt"})
    assert list(source) == [("memory:1", {"prompt": "q", "completion": "a", "id": 1, "old_prompt": "old"})]
    colliding = open_source(rows, columns={"prompt": "question", "completion": "answer"})
    assert complaint(lambda: list(colliding)) == (
        "memory:1: columns={'prompt': 'question'} would overwrite the row's own column 'prompt': rename that one, too, "
        "as in columns={'prompt': 'question', 'old_prompt': 'prompt'}"
    )
    empty = open_source([{**rows[0], "prompt": None}], columns={"prompt": "question"})
    assert list(empty) == [("memory:1", {"prompt": "q", "answer": "a", "id": 1})]
    swapped = open_source(rows, columns={"prompt": "answer", "answer": "prompt"})
    assert list(swapped) == [("memory:1", {"question": "q", "prompt": "a", "answer": "old", "id": 1})]
    missing = open_source(rows, columns={"prompt": "qestion"})
    assert complaint(lambda: list(missing)) == (
        "memory:1: no column 'qestion' for columns={'prompt': 'qestion'} "
        "(found: question, prompt, answer, id; did you mean 'question'?)"
    )
    assert source.fingerprint != swapped.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.jsonl", "no file, folder or dataset 'rows.jsonl': give a file (.jsonl, .json, .csv, .txt, "),
        ("./rows", "no file, folder or dataset './rows'"),
        ("a/b/c", "no file, folder or dataset 'a/b/c'"),
        ("nobody/nothing", "'nobody/nothing' is not a file or folder here, and the hub has no such dataset ("),
        ("nobody/nothing?split=test", "'nobody/nothing' is not a file or folder here"),
        (
            "nobody/nothing?splt=x",
            "cannot read 'splt=x' in 'nobody/nothing?splt=x': allowed are split=, config= and revision=",
        ),
        ("summs:prompts", "unknown task 'summs' in 'summs:prompts'"),
        ([], "an empty list has no rows: give at least one row or source"),
        ([1], "cannot read rows from a list of int: give a list of dictionaries or a list of paths"),
        ([{}, "a"], "cannot read rows from a list of dict, str"),
        (3, "cannot read rows from int: give a path, a hub id, a task, a list of these"),
    ],
)
def test_sources_that_are_not_there(source: Any, message: str) -> None:
    assert complaint(open_source, source).startswith(message)


def test_the_hub_is_asked_for_the_split_configuration_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **settings: Any) -> datasets.DatasetDict:
        asked.append((arguments, settings))
        both = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
        return datasets.DatasetDict(both)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_source("org/name?config=main&split=test&revision=v2")) == [("org/name:1", ROWS[1])]
    assert asked == [(("org/name", "main"), {"revision": "v2", "streaming": False})]
    assert [row for _, row in open_source("org/name", split="train")] == ROWS[:1]
    assert complaint(open_source, "org/name", split="validation") == (
        "'org/name' has no split 'validation' (found: train, test): write 'org/name?split=train'"
    )


def test_a_folder_of_splits_and_of_files_that_name_none_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "extra.jsonl", "more.csv"):
        write(tmp_path / name, ROWS[:1])
    folder = str(tmp_path)
    assert complaint(open_source, folder, split="train") == (
        f"the folder {folder!r} has files of splits (train.jsonl) and files of none (extra.jsonl, more.csv): give one "
        f"file, such as '{folder}/train.jsonl', or move or rename the others"
    )
    assert [row for _, row in open_source(f"{folder}/train.jsonl", split="train")] == ROWS[:1]
    # Metadata next to the rows of datasets and hub folders are not files of rows.
    for name in ("extra.jsonl", "more.csv"):
        (tmp_path / name).rename(tmp_path / f"{name}.old")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert [row for _, row in open_source(folder, split="train")] == ROWS[:1]
