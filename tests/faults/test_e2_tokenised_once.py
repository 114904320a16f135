"""Rows are tokenised once, again when anything changes that they depend on, and how far it is can be seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import datamodules
from rlhf_lightning.data import example_cache
from rlhf_lightning.data.row_reader import RowReader
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule, base
from rlhf_lightning.utils import progress

from ..helpers import char_tokenizer

ROWS = [
    {"prompt": f"{n}+1=", "completion": str(n + 1), "q": "x", "c": 0.1, "n": None, "t": [1, {"a": True}]}
    for n in range(9)
]


def demote(row: dict[str, Any]) -> dict[str, Any]:
    """A transform of one's own."""
    return row


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were tokenised, whenever any were."""
    counts: list[int] = []
    real = RowReader.read_all

    def read_all(self: RowReader) -> Any:
        store = real(self)
        counts.append(self.report["rows"])
        return store

    monkeypatch.setattr(RowReader, "read_all", read_all)
    return counts


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for entries, used for few rows, too."""
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "LEAST_ROWS", 2)
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def sft(rows: Any, tokenizer: Any = None, **options: Any) -> SFTDataModule:
    data = SFTDataModule(train=str(rows), tokenizer=tokenizer or char_tokenizer(), **options)
    data.setup("fit")
    return data


def content(data: Any) -> list[Any]:
    return [(e.row_id, e.content_hash(), repr(e.fields)) for batch in data.all_examples() for e in batch]


@pytest.mark.parametrize("contract", ["SFT", "Preference", "Unpaired", "Stepwise", "Prompt"])
def test_what_is_kept_is_what_was_made(contract: str, read: list[int]) -> None:
    names = {"SFT": "demonstrations", "Prompt": "prompts"}
    source = f"sums:{names.get(contract, contract.lower())}?rows=20"
    made = []
    for _ in range(2):
        data = getattr(datamodules, f"{contract}DataModule")(train=source, tokenizer=char_tokenizer())
        data.setup("fit")
        made.append((content(data), data.report, data._store("train").fingerprint()))
    assert made[0] == made[1]
    assert read == [20]


def test_all_that_does_not_matter_finds_what_is_kept(rows: Path, read: list[int]) -> None:
    first = content(sft(rows))
    others: list[dict[str, Any]] = [{}, {"seed": 3}, {"global_batch_size": 2}, {"shuffle": False}, {"drop_last": True}]
    for options in others:
        assert sorted(content(sft(rows, **options))) == sorted(first)
    assert read == [9]


def other_rows(rows: Path) -> dict[str, Any]:
    """Other rows, in a file of the same size and time."""
    import os

    before, text = rows.stat(), rows.read_text()
    rows.write_text(text.replace("8+1=", "7+2="))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (rows.stat().st_size, rows.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return {}


def another_tokenizer(change: Callable[[Any], Any]) -> Callable[[Path], dict[str, Any]]:
    def options(rows: Path) -> dict[str, Any]:
        tokenizer = char_tokenizer()
        change(tokenizer)
        return {"tokenizer": tokenizer}

    return options


def with_template(text: str) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + text)


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "rows": other_rows,
    "name": lambda rows: {"rows": rows.rename(rows.with_name("others.jsonl"))},
    "max_length": lambda rows: {"max_length": 50},
    "on_too_long": lambda rows: {"on_too_long": "error"},
    "on_bad_row": lambda rows: {"on_bad_row": "skip"},
    "columns": lambda rows: {"columns": {"extra": "q"}},
    "completion_only_loss": lambda rows: {"completion_only_loss": False},
    "transform": lambda rows: {"transform": demote},
    "token": another_tokenizer(lambda tokenizer: tokenizer.add_tokens(["1+"])),
    "eos": another_tokenizer(lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>")),
    "template": another_tokenizer(with_template(" ")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_matters_tokenises_again(change: str, rows: Path, read: list[int]) -> None:
    sft(rows)
    options = {"rows": rows} | CHANGES[change](rows)
    content(sft(**options))
    assert read == [9, 9]
    fresh = sft(**options)
    assert read == ([9, 9, 9] if change == "transform" else [9, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_LIGHTNING_CACHE", "0")
        assert content(fresh) == content(sft(**options))


def test_other_code_tokenises_again(rows: Path, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sft(rows)
    monkeypatch.setattr(example_cache, "_code", lambda: ["another"])
    sft(rows)
    assert read == [9, 9]


def test_pairs_by_other_weights_are_tokenised_again(tmp_path: Path, read: list[int]) -> None:
    rows = [{"prompt": f"{n // 2}", "completion": f"{n}", "a": n % 2, "b": -(n % 2)} for n in range(8)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # How many pairs there will be nobody knows, so they are not looked up.
    for weights in ({"a": 1.0}, {"b": 1.0}):
        data = PreferenceDataModule(train=str(tmp_path / "rated.jsonl"), tokenizer=char_tokenizer(), pair_by=weights)
        data.setup("fit")
    assert read == [4, 4]


class Own(SFTDataModule):
    """A datamodule of one's own, whose code nobody reads."""


def test_what_cannot_be_told_exactly_is_not_kept(rows: Path, folder: Path) -> None:
    dated = char_tokenizer()
    dated.chat_template = "{{ strftime_now('%d') }}" + str(dated.chat_template)
    sft(rows, dated)
    sft(rows, transform=demote)
    Own(train=str(rows), tokenizer=char_tokenizer()).setup("fit")
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-700] + bytes(600) + b[-100:], lambda b: b""]
)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[bytes], bytes], rows: Path, folder: Path, read: list[int]
) -> None:
    whole = content(sft(rows))
    (entry,) = folder.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert content(sft(rows)) == whole == content(sft(rows))
    assert read == [9, 9]


def test_entries_do_not_pile_up_and_nothing_else_is_removed(rows: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.npz").write_text("mine")
    for length in range(40, 60):
        sft(rows, max_length=length)
    assert len(list(folder.iterdir())) == 16 + 1
    assert (folder / "mine.npz").read_text() == "mine"


def test_a_place_where_nothing_can_be_written_is_no_error(rows: Path, folder: Path) -> None:
    folder.write_text("a file")
    assert len(content(sft(rows))) == 9


def test_few_rows_are_not_looked_up(rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LEAST_ROWS", 10)
    sft(rows)
    assert not folder.exists()


def test_it_is_shown_how_far_tokenizing_is(rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        sft(rows).train_dataloader()
    said = [record.message for record in caplog.records if "tokenizing " in record.message]
    assert said
    assert "rows.jsonl: 2 of 9 (22%)" in said[0]
