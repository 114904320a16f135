"""The common parts of datamodules: settings, tokenizers, splits, loaders and their share of a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.trainer.states import TrainerFn

import rlhf_lightning.datamodules as package
from rlhf_lightning.datamodules import (
    ExampleDataModule,
    ExampleLoader,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    StreamLoader,
    UnpairedDataModule,
)
from rlhf_lightning.datamodules.replacing import replace_train, restore_train
from rlhf_lightning.utils.keywords import options_of

from .toys import UNMARKED, chars, complaint, ids

ALL = [SFTDataModule, PreferenceDataModule, UnpairedDataModule, StepwiseDataModule, PromptDataModule]
CONTRACTS = {
    SFTDataModule: "demonstrations",
    PreferenceDataModule: "preference",
    UnpairedDataModule: "unpaired",
    StepwiseDataModule: "stepwise",
    PromptDataModule: "prompts",
}
ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(7)]


def trainer(rank: int = 0, world_size: int = 1, fn: TrainerFn = TrainerFn.FITTING, **settings: Any) -> Any:
    """The part of a trainer that a datamodule reads."""

    class Part(SimpleNamespace):
        __hash__ = object.__hash__

    settings = {"limit_train_batches": 1.0, "overfit_batches": 0, "lightning_module": None} | settings
    return Part(global_rank=rank, world_size=world_size, state=SimpleNamespace(fn=fn), **settings)


def attached(data: ExampleDataModule, to: Any) -> ExampleDataModule:
    data.trainer = to
    return data


def row_ids(loader: Any) -> list[list[str]]:
    return [[example.row_id for example in batch] for batch in loader]


@pytest.mark.parametrize("cls", ALL)
def test_every_contract_has_its_task(cls: type[ExampleDataModule]) -> None:
    data = cls(train=f"sums:{CONTRACTS[cls]}?rows=5", val=f"sums:{CONTRACTS[cls]}?rows=3&seed=9", tokenizer=chars())
    data.setup("fit")
    assert data.report["train"]["rows"] == 5
    assert data.report["val"]["rows"] == 3
    assert [len(batch) for batch in data.train_dataloader()] == [data.report["train"]["kept"]]
    assert "answer" in next(iter(data.train_dataloader())).examples[0].fields


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0, expected a whole number of at least 1"),
        ({"global_batch_size": 2.5}, "global_batch_size=2.5, expected a whole number of at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1, expected a whole number of at least 1"),
        ({"max_length": 1}, "max_length=1, expected a whole number of at least 2"),
        ({"seed": -1}, "seed=-1, expected a whole number of at least 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0, expected a whole number of at least 1"),
        ({"group_by_prompt": True, "streaming": True}, "group_by_prompt=True needs all training rows at once, "),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore', expected one of error, skip"),
        ({"on_too_long": "cut"}, "on_too_long='cut', expected one of drop, "),
    ],
)
def test_settings_outside_their_range(cls: type[ExampleDataModule], settings: dict[str, Any], message: str) -> None:
    assert complaint(cls, train=ROWS, **settings).startswith(message)


def test_the_tokenizer_is_the_given_one_or_the_modules(tmp_path: Path) -> None:
    own, modules = chars(), chars()
    chars().save_pretrained(tmp_path)
    assert SFTDataModule(tokenizer=own).tokenizer is own
    loaded = SFTDataModule(tokenizer=str(tmp_path))
    assert loaded.tokenizer.get_vocab() == own.get_vocab()
    assert loaded.tokenizer is loaded.tokenizer, "loaded once"
    module = SimpleNamespace(tokenizer=modules)
    assert attached(SFTDataModule(), trainer(lightning_module=module)).tokenizer is modules


def test_no_tokenizer(tmp_path: Path) -> None:
    assert complaint(lambda: SFTDataModule().tokenizer) == (
        "tokenizer=None and the module has none: write SFTDataModule(tokenizer='folder or hub id')"
    )
    folder = tmp_path / "nothing"
    message = complaint(lambda: SFTDataModule(tokenizer=str(folder)).tokenizer)
    assert message.startswith(f"cannot load tokenizer={str(folder)!r} (")
    assert message.endswith("give a folder that has tokenizer.json, or a hub id")


def test_setup_reads_what_the_stage_needs_and_reads_it_once() -> None:
    read: list[str] = []

    class Counting(SFTDataModule):
        def make_examples(self, row_id: str, columns: dict[str, Any]) -> Any:
            read.append(row_id)
            return super().make_examples(row_id, columns)

    data = Counting(train=ROWS[:2], val=ROWS[:1], test=ROWS[:1], predict=ROWS[:1], tokenizer=chars())
    for stage, rows in (("fit", 3), ("fit", 3), ("validate", 3), ("test", 4), ("predict", 5), (None, 5)):
        data.setup(stage)
        assert len(read) == rows
    data.train_dataloader()
    data.val_dataloader()
    assert len(read) == 5


def test_evaluation_keeps_the_order_and_has_a_batch_size_of_its_own() -> None:
    data = SFTDataModule(train=ROWS, val=ROWS, test=ROWS[:3], tokenizer=chars(), global_batch_size=2, eval_batch_size=4)
    loader = data.val_dataloader()
    expected = [[f"memory:{i}" for i in (1, 2, 3, 4)], [f"memory:{i}" for i in (5, 6, 7)]]
    assert row_ids(loader) == row_ids(loader) == expected
    assert row_ids(data.test_dataloader()) == [[f"memory:{i}" for i in (1, 2, 3)]]
    next(iter(loader))
    assert row_ids(loader) == expected, "after one that was left in the middle, as the sanity check's"
    assert SFTDataModule(val=ROWS, tokenizer=chars(), global_batch_size=3).val_dataloader().batch_size == 3


def test_what_there_are_no_rows_for() -> None:
    data = attached(SFTDataModule(tokenizer=chars()), trainer())
    assert complaint(data.train_dataloader) == "there are no training rows: write SFTDataModule(train='rows.jsonl')"
    assert data.val_dataloader() == [], "fitting goes without validation"
    attached(data, trainer(fn=TrainerFn.VALIDATING))
    assert complaint(data.val_dataloader) == "there are no val rows: write SFTDataModule(val='rows.jsonl')"
    assert complaint(data.test_dataloader) == "there are no test rows: write SFTDataModule(test='rows.jsonl')"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_batch(streaming: bool, world_size: int) -> None:
    settings = {"train": ROWS, "global_batch_size": 3, "seed": 5, "streaming": streaming, "shuffle_buffer": 4}
    whole = row_ids(SFTDataModule(tokenizer=chars(), **settings).train_dataloader())
    assert [len(batch) for batch in whole] == [3, 3, 1]
    assert sorted(name for batch in whole for name in batch) == [f"memory:{i}" for i in range(1, 8)]
    for rank in range(world_size):
        data = attached(SFTDataModule(tokenizer=chars(), **settings), trainer(rank, world_size))
        assert row_ids(data.train_dataloader()) == [batch[rank::world_size] for batch in whole]


def test_a_batch_smaller_than_the_ranks_is_pointed_out() -> None:
    data = attached(SFTDataModule(train=ROWS, tokenizer=chars(), global_batch_size=1), trainer(0, 2))
    with pytest.warns(UserWarning, match="global_batch_size=1 over 2 ranks leaves some of them without an example"):
        data.train_dataloader()


@pytest.mark.parametrize("limit", [2, 0.67])
def test_the_trainers_limit_is_the_loaders(limit: float) -> None:
    data = attached(
        SFTDataModule(train=ROWS, tokenizer=chars(), global_batch_size=3), trainer(limit_train_batches=limit)
    )
    loader = data.train_dataloader()
    assert (loader.limit, len(loader)) == (2, 3)
    assert len(list(loader)) == 2


def test_the_same_few_batches_again_and_again() -> None:
    settings = {"limit_train_batches": 1, "overfit_batches": 1}
    for streaming in (False, True):
        data = SFTDataModule(train=ROWS, tokenizer=chars(), global_batch_size=2, streaming=streaming)
        loader = attached(data, trainer(**settings)).train_dataloader()
        assert row_ids(loader) == row_ids(loader) == [["memory:1", "memory:2"]]


def test_streaming_reads_no_rows_before_it_needs_them_and_all_tells_them_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "nonsense\n")
    data = SFTDataModule(train=str(path), tokenizer=chars(), global_batch_size=2, streaming=True, shuffle=False)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    assert len(loader) == 4
    batches = iter(loader)
    assert [example.row_id for example in next(batches)] == [f"{path}:1", f"{path}:2"]
    assert data.report["train"]["rows"] == 2
    next(batches), next(batches)
    assert complaint(next, batches).startswith(f"{path}:8: not JSON")
    assert complaint(lambda: list(data.all_examples())) == (
        "streaming=True never has all examples at once: set streaming=False"
    )


def test_streamed_examples_are_those_in_memory() -> None:
    one = SFTDataModule(train=ROWS, tokenizer=chars(), shuffle=False)
    other = SFTDataModule(train=ROWS, tokenizer=chars(), shuffle=False, streaming=True)
    hashes = [[e.content_hash() for batch in data.train_dataloader() for e in batch] for data in (one, other)]
    assert hashes[0] == hashes[1]
    assert isinstance(one.train_dataloader(), ExampleLoader)
    assert one.report == other.report


def test_all_examples() -> None:
    data = SFTDataModule(train=ROWS[:3], val=ROWS[:1], tokenizer=chars(), global_batch_size=2)
    assert [[example.row_id for example in batch] for batch in data.all_examples()] == [
        ["memory:1", "memory:2"],
        ["memory:3"],
        ["memory:1"],
    ]


def test_a_row_that_is_no_row_of_the_contract_is_named() -> None:
    data = PreferenceDataModule(train=ROWS, tokenizer=chars())
    assert complaint(data.setup, "fit").startswith("memory:1: no column 'chosen' (found: prompt, completion)")


def test_the_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="ExampleDataModule does not say what its rows become"):
        ExampleDataModule(train=ROWS, tokenizer=chars()).setup("fit")


@pytest.mark.parametrize("cls", ALL)
def test_a_command_line_can_set_all_that_there_is(cls: type[ExampleDataModule]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ExampleDataModule, "data")
    arguments = {
        "train": "sums:prompts?rows=3",
        "val": '["a.jsonl", "b.jsonl"]',
        "tokenizer": "folder",
        "global_batch_size": "4",
        "max_length": "64",
        "on_too_long": "truncate_start",
        "columns": '{"prompt": "question"}',
        "streaming": "true",
    }
    parsed = parser.parse_args(
        [f"--data={cls.__name__}", *(f"--data.{key}={value}" for key, value in arguments.items())]
    )
    data = parser.instantiate(parsed).data
    assert type(data) is cls
    assert data.sources == {
        "train": "sums:prompts?rows=3",
        "val": ["a.jsonl", "b.jsonl"],
        "test": None,
        "predict": None,
    }
    assert (data.global_batch_size, data.max_length, data.on_too_long) == (4, 64, "truncate_start")
    assert (data.columns, data.streaming) == ({"prompt": "question"}, True)
    assert parser.dump(parsed), "a config can be saved"


@pytest.mark.parametrize("cls", ALL)
def test_options_are_written_once(cls: type[ExampleDataModule]) -> None:
    import inspect

    shared = set(inspect.signature(ExampleDataModule).parameters) - {"unknown"}
    own = set(inspect.signature(cls).parameters) - {"train", "kwargs", "unknown"}
    assert options_of(cls) == shared | own
    assert cls.__init__ is ExampleDataModule.__init__ or not own & shared
    assert all(f"        {name}: " in (cls.__doc__ or "") for name in own - shared)


def test_the_package_offers_what_it_names() -> None:
    assert {cls.__name__ for cls in ALL} < set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    assert issubclass(ExampleDataModule, pl.LightningDataModule)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bos_of", ["tokenizer", "template"])
def test_cut_prompts_keep_what_the_tokenizer_opens_them_with(streaming: bool, bos_of: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "abcdefghij", "chosen": "1", "rejected": "2"}]
    tokenizer = chars(opening=True)
    if bos_of == "template":
        tokenizer = chars("{{ bos_token }}" + UNMARKED)
        rows = [{**rows[0], "prompt": [{"role": "user", "content": "abcdefghij"}]}]
    data = PreferenceDataModule(
        train=rows, tokenizer=tokenizer, max_length=8, on_too_long="truncate_start", streaming=streaming
    )
    [[example]] = data.train_dataloader()
    assert example.root.tokens.tolist() == ids("^fghij" if bos_of == "tokenizer" else "^j~\na:")


def test_a_packaged_tokenizer_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = SFTDataModule(train="sums:demonstrations?rows=2", tokenizer="configs/models/nano")
    data.setup("fit")
    assert data.report["train"]["kept"] == 2
    with pytest.raises(ValueError, match="cannot load tokenizer='configs/models/nono'"):
        SFTDataModule(train=ROWS, tokenizer="configs/models/nono").setup("fit")


def tokens(loader: Any) -> list[Any]:
    roots = [example.root for batch in loader for example in batch]
    return [[root.tokens.tolist(), *(child.tokens.tolist() for child in root.children)] for root in roots]


def test_rows_that_replace_those_of_a_source_are_taken_as_they_are() -> None:
    """``columns``, ``transform`` and ``pair_by`` are of the datamodule's own rows, which come back."""
    own = [{"question": f"{n}=", "completion": str(n), "right": float(n % 2)} for n in range(4)]
    drop = {"transform": lambda row: row if row["completion"] != "1" else None}
    cases: list[tuple[type[ExampleDataModule], dict[str, Any], dict[str, Any], int]] = [
        (SFTDataModule, drop, {"prompt": "5-4=", "completion": "1"}, 3),
        (PreferenceDataModule, {"pair_by": {"right": 1.0}}, {"prompt": "1=", "chosen": "1", "rejected": "2"}, 1),
    ]
    for cls, options, made, number in cases:
        rows = own if cls is SFTDataModule else [row | {"question": "odd?"} for row in own[:2]]
        data = cls(rows, tokenizer=chars(), global_batch_size=1, columns={"prompt": "question"}, **options)
        before = row_ids(attached(data, trainer()).train_dataloader())
        assert len(before) == number
        replace_train(data, [made, made])
        plain = attached(cls([made, made], tokenizer=chars(), global_batch_size=1), trainer())
        assert tokens(data.train_dataloader()) == tokens(plain.train_dataloader())

        # The loader of this trainer keeps its rows, so that its position can still be saved.
        loader = data.train_dataloader()
        restore_train(data)
        assert data.train_dataloader() is loader
        assert row_ids(attached(data, trainer()).train_dataloader()) == before
