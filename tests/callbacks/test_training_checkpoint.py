"""When checkpoints are made, which stay, and which one a run resumes from."""

from __future__ import annotations

import os
import time

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport, TrainingCheckpoint
from rlhf_lightning.callbacks.training_checkpoint import check_enabled
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.utils.files import PARTIAL, hidden_sibling

ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(10)]


class SeveralSteps(SFTModule):
    """Makes several optimizer steps with every batch, as on-policy methods do."""

    steps_per_batch = 1

    def training_step(self, batch, batch_idx):
        for _ in range(self.steps_per_batch - 1):
            self.optimize(self.validate_batch(batch))
        super().training_step(batch, batch_idx)


def fit(folder, callbacks, *, ckpt_path=None, steps_per_batch=1, val=True, max_steps=10, **options):
    lightning.seed_everything(0, verbose=False)
    module = SeveralSteps(str(folder), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.steps_per_batch = steps_per_batch
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        max_steps=max_steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = SFTDataModule(train=ROWS, val=ROWS[:2] if val else None, global_batch_size=2)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def names(folder):
    return sorted((path.name for path in folder.iterdir()), key=lambda name: int("".join(filter(str.isdigit, name))))


def test_every_so_many_steps_and_at_the_end(tiny_model_folder, tmp_path):
    fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path), every_n_steps=3, keep=9)], max_steps=10)
    assert names(tmp_path) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt", "step=10.ckpt"]
    assert torch.load(tmp_path / "step=6.ckpt", weights_only=True)["global_step"] == 6


def test_a_batch_of_several_steps_does_not_step_over_its_turn(tiny_model_folder, tmp_path):
    """Multiples of 3, looked at after 4, 8 and 12 steps; ``ModelCheckpoint`` waits for 12, which divides both."""
    fit(
        tiny_model_folder(),
        [TrainingCheckpoint(str(tmp_path), every_n_steps=3, keep=9)],
        steps_per_batch=4,
        max_steps=12,
    )
    assert names(tmp_path) == ["step=4.ckpt", "step=8.ckpt", "step=12.ckpt"]


def test_the_newest_stay(tiny_model_folder, tmp_path):
    hidden_sibling(tmp_path / "step=4.ckpt", PARTIAL).write_bytes(b"half")
    fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path), every_n_steps=1, keep=2)], max_steps=7)
    assert names(tmp_path) == ["step=6.ckpt", "step=7.ckpt"]
    fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path / "one"), every_n_steps=2, keep=1)], max_steps=7)
    assert names(tmp_path / "one") == ["step=7.ckpt"]


def test_the_last_batch_of_an_epoch_without_validation_is_one_like_any_other(tiny_model_folder, tmp_path):
    """An epoch is five batches."""
    fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path), every_n_steps=5, keep=9)], val=False, max_steps=12)
    assert names(tmp_path) == ["step=5.ckpt", "step=10.ckpt", "step=12.ckpt"]


def test_by_the_clock(tiny_model_folder, tmp_path):
    class Slow(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(0.2 if trainer.global_step == 3 else 0)

    saver = TrainingCheckpoint(str(tmp_path), every_n_steps=100, every_minutes=0.15 / 60, keep=9)
    fit(tiny_model_folder(), [Slow(), saver], max_steps=6)
    assert "step=4.ckpt" in names(tmp_path)
    assert names(tmp_path)[-1] == "step=6.ckpt"


def test_the_newest_whole_one_is_taken(tiny_model_folder, tmp_path):
    saver = TrainingCheckpoint(str(tmp_path), every_n_steps=2, keep=3)
    assert saver.newest() is None
    fit(tiny_model_folder(), [saver], max_steps=6)
    assert saver.newest() == tmp_path / "step=6.ckpt"
    os.truncate(tmp_path / "step=6.ckpt", 3000)
    with pytest.warns(UserWarning, match=r"step=6.ckpt' is damaged \(.*\): the one before it is taken"):
        assert saver.newest() == tmp_path / "step=4.ckpt"
    with pytest.warns(UserWarning, match="is damaged"):
        trainer = fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path))], ckpt_path="last", max_steps=4)
    assert trainer.ckpt_path == str(tmp_path / "step=4.ckpt")
    for path in tmp_path.iterdir():
        os.truncate(path, 3000)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"all 3 checkpoints in '.*' are damaged: delete them to start from"),
    ):
        saver.newest()


def test_the_same_call_starts_and_continues(tiny_model_folder, tmp_path):
    with pytest.warns(UserWarning, match="there is no last checkpoint"):
        fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path))], ckpt_path="last", max_steps=3)
    trainer = fit(tiny_model_folder(), [TrainingCheckpoint(str(tmp_path))], ckpt_path="last", max_steps=5)
    assert trainer.ckpt_path == str(tmp_path / "step=3.ckpt")
    assert names(tmp_path) == ["step=3.ckpt", "step=5.ckpt"]


def test_together_with_lightnings_checkpoints_of_the_best_models(tiny_model_folder, tmp_path, recwarn):
    losses: dict[str, float] = {}

    class Losses(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                losses[f"step={trainer.global_step}.ckpt"] = float(trainer.callback_metrics["val/loss"])

    best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=2, mode="max")
    every = ModelCheckpoint(tmp_path / "every", "{step}", save_top_k=-1, every_n_train_steps=2)
    saver = TrainingCheckpoint(str(tmp_path / "last"), every_n_steps=1)
    callbacks = [Losses(), best, every, saver]
    fit(tiny_model_folder(), callbacks, max_steps=8, val_check_interval=2, check_val_every_n_epoch=None)
    assert names(tmp_path / "last") == ["step=7.ckpt", "step=8.ckpt"]
    assert names(tmp_path / "every") == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]
    assert len(set(losses.values())) == 4
    assert set(names(tmp_path / "best")) == set(sorted(losses, key=losses.__getitem__)[-2:])
    assert not [w for w in recwarn if "manual optimization" in str(w.message)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0; it must be a whole number of at least 1"),
        ({"keep": 0}, "keep is 0; it must be a whole number of at least 1"),
        ({"every_minutes": 0.0}, "every_minutes is 0.0; it must be above 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingCheckpoint("x", **options)


def test_checkpoints_where_there_should_be_none(tmp_path):
    saver, best = TrainingCheckpoint(str(tmp_path)), ModelCheckpoint(tmp_path / "best")
    for enabled, callbacks in ((True, [saver]), (None, [saver, best]), (False, []), (False, [ModelExport("x")])):
        check_enabled(enabled, callbacks)
    with pytest.raises(
        ValueError, match=r"is false, and TrainingCheckpoint makes checkpoints: write --trainer.enable_"
    ):
        check_enabled(False, [ModelExport("x"), saver])
    with pytest.raises(
        ValueError, match=r"ModelCheckpoint and TrainingCheckpoint make checkpoints: .*true under train"
    ):
        check_enabled(False, [saver, best])
