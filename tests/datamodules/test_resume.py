"""Interrupted and resumed under Lightning's Trainer, training sees the rows that it would have seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from rlhf_lightning.datamodules import SFTDataModule

from ..helpers import char_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(11)]
EVERY_STEP = {"every_n_train_steps": 1}


def unsized() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: iter(ROWS))


@dataclass
class Recorder:
    """Records of the module: the rows of each training step with its epoch, and those of each validation batch."""

    steps: list[tuple[int, list[str]]] = field(default_factory=list)
    validated: list[list[str]] = field(default_factory=list)

    @property
    def rows(self) -> list[list[str]]:
        return [rows for _, rows in self.steps]


class Late(SingleDeviceStrategy):
    """Restores checkpoints after the module and its optimizers are set up."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


class Module(pl.LightningModule):
    """Takes a step a batch, by hand, and writes down what it saw."""

    def __init__(self, marks: bool = True, asks: bool = False, fails_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.marks, self.asks, self.fails_at = marks, asks, fails_at
        self.seen = Recorder()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Schedules ask for the number of steps, for which Lightning asks for the loader before it restores the loops.
        assert not self.asks or self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.fails_at:
            raise RuntimeError("the machine is gone")
        self.seen.steps.append((self.current_epoch, [example.row_id for example in batch]))
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum() * len(batch))
        optimizer.step()
        optimizer.zero_grad()
        if self.marks:
            batch.mark_consumed()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.validated.append([example.row_id for example in batch])


def fit(
    folder: Path,
    *,
    resume: Path | None = None,
    marks: bool = True,
    asks: bool = False,
    fails_at: int | None = None,
    late: bool = False,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    saver: dict[str, Any] | None = None,
) -> Recorder:
    module = Module(marks, asks, fails_at)
    callbacks = [
        ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **(EVERY_STEP if saver is None else saver)),
        OnExceptionCheckpoint(folder, filename="failed"),
    ]
    strategy = Late(torch.device("cpu")) if late else "auto"
    options = {
        "strategy": strategy,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"train": ROWS, "global_batch_size": 2, "tokenizer": char_tokenizer(), "seed": 3}
    run = pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **(options | (trainer or {})))
    try:
        run.fit(module, datamodule=SFTDataModule(**(settings | (data or {}))), ckpt_path=resume)
    except RuntimeError as error:
        if str(error) != "the machine is gone":
            raise
    return module.seen


# Eleven rows in batches of two are six batches: steps 5, 6 and 7 are before, at and after the end of an epoch.
SETTINGS: dict[str, dict[str, Any]] = {
    "in memory": {},
    "asked for the number of steps": {"asks": True},
    "with validation": {"data": {"val": ROWS[:3]}},
    "streamed": {"data": {"streaming": True, "shuffle_buffer": 4}},
    "streamed, nobody knows how many": {"data": {"train": unsized(), "streaming": True, "shuffle_buffer": 4}},
    "epochs cut short by a number": {"trainer": {"limit_train_batches": 4}},
    "epochs cut short by a fraction": {"trainer": {"limit_train_batches": 0.5}},
    "a number of steps": {"trainer": {"max_epochs": -1, "max_steps": 15}},
    "in double precision": {"trainer": {"precision": "64-true"}},
    "loader asked for every epoch": {"trainer": {"reload_dataloaders_every_n_epochs": 1}},
    "restored late, as by sharded strategies": {"late": True, "asks": True},
    "all at once": {
        "late": True,
        "asks": True,
        "trainer": {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 4},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_run_sees_the_rows_that_come_next(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = fit(tmp_path, **settings)
    epochs = [[rows for epoch, rows in whole.steps if epoch == at] for at in (0, 1)]
    assert epochs[0] != epochs[1], "every epoch has an order of its own"
    for step in (1, 3, 4, 5, 6, 7):
        resumed = fit(tmp_path / "resumed", resume=tmp_path / f"step={step}.ckpt", **settings)
        assert resumed.steps == whole.steps[step:], f"resumed after step {step}"


def test_epochs_hold_every_row_once_before_and_after_a_resume(tmp_path: Path) -> None:
    fit(tmp_path, trainer={"max_epochs": 2})
    resumed = fit(tmp_path, resume=tmp_path / "step=4.ckpt", trainer={"max_epochs": 4})
    whole = fit(tmp_path / "whole", trainer={"max_epochs": 4})
    assert resumed.steps == whole.steps[4:]
    for epoch in range(4):
        rows = [row for at, rows in whole.steps for row in rows if at == epoch]
        assert sorted(rows) == sorted(f"memory:{i}" for i in range(1, 12))


def test_a_batch_whose_step_failed_is_seen_again(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    failed = fit(tmp_path, fails_at=8)
    assert failed.steps == whole.steps[:8]
    assert fit(tmp_path, resume=tmp_path / "failed.ckpt").steps == whole.steps[8:]


def test_a_run_saved_at_the_ends_of_epochs_continues_with_the_next_epoch(tmp_path: Path) -> None:
    whole = fit(tmp_path, saver={"save_on_train_epoch_end": True})
    for step in (6, 12):
        resumed = fit(tmp_path / "resumed", resume=tmp_path / f"step={step}.ckpt")
        assert resumed.steps == whole.steps[step:]


def test_a_run_that_stopped_at_its_last_step_continues_when_it_is_given_more(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", trainer={"max_epochs": -1, "max_steps": 16})
    fit(tmp_path, trainer={"max_epochs": -1, "max_steps": 8})
    resumed = fit(tmp_path, resume=tmp_path / "step=8.ckpt", trainer={"max_epochs": -1, "max_steps": 16})
    assert resumed.rows == whole.rows[8:]


def test_a_module_that_marks_nothing_repeats_at_most_one_batch_and_loses_none(tmp_path: Path) -> None:
    whole = fit(tmp_path, marks=False)
    for step in (1, 4, 7):
        resumed = fit(tmp_path / "resumed", marks=False, resume=tmp_path / f"step={step}.ckpt")
        assert resumed.rows[0] == whole.rows[step - 1]
        first_epoch_after = [rows for epoch, rows in resumed.steps if epoch == resumed.steps[0][0]]
        assert first_epoch_after == whole.rows[step - 1 : step - 1 + len(first_epoch_after)]
    resumed = fit(tmp_path / "resumed", marks=False, resume=tmp_path / "step=6.ckpt")
    assert resumed.steps == whole.steps[6:], "nothing is repeated at the end of an epoch"


def test_changed_rows_are_an_error_on_resume(tmp_path: Path) -> None:
    fit(tmp_path)
    changed = [*ROWS[:-1], {"prompt": "10+1=", "completion": "12"}]
    with pytest.raises(
        ValueError, match=r"^cannot resume on other data: the rows' fingerprint was '\w+' in the checkpoint"
    ):
        fit(tmp_path, resume=tmp_path / "step=3.ckpt", data={"train": changed})
    with pytest.raises(
        ValueError, match="global_batch_size was 2 in the checkpoint and is 3 now; restore the old value"
    ):
        fit(tmp_path, resume=tmp_path / "step=3.ckpt", data={"global_batch_size": 3})


def test_validating_with_a_checkpoint_does_not_move_the_training_rows(tmp_path: Path) -> None:
    whole = fit(tmp_path, data={"val": ROWS[:3]})
    module = Module()
    data = SFTDataModule(train=ROWS, val=ROWS[:3], global_batch_size=2, tokenizer=char_tokenizer(), seed=3)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, enable_checkpointing=False, **options)
    trainer.validate(module, datamodule=data, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    trainer.fit(module, datamodule=data)
    assert module.seen.steps == whole.steps[:6]
    assert module.seen.validated[:2] == [["memory:1", "memory:2"], ["memory:3"]]


def test_a_new_trainer_starts_from_the_beginning_and_the_same_one_continues(tmp_path: Path) -> None:
    data = SFTDataModule(train=ROWS, global_batch_size=2, tokenizer=char_tokenizer(), seed=3)
    whole = fit(tmp_path)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    for _ in range(2):
        module = Module()
        trainer = pl.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **options)
        trainer.fit(module, datamodule=data)
        assert module.seen.steps == whole.steps[:6]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)
    assert module.seen.steps == whole.steps[:12]
