"""The best model is the best, what cannot choose is refused before the first step, and no export is lost."""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning
import pytest
import torch
import transformers
import yaml

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.callbacks.model_export import direction_of
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.pipeline.config import load_pipeline

ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(6)]


class Logs(lightning.Callback):
    """Logs given values at validations, and counts the steps that are made."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values, self.steps = name, iter(values), 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log(self.name, next(self.values))


def fit(model: Any, export: ModelExport, logs: Logs, *, val: bool = True, **options: Any) -> None:
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        | {"callbacks": [logs, export], "max_steps": 3, "val_check_interval": 1, "num_sanity_val_steps": 0}
        | {"enable_progress_bar": False, "enable_model_summary": False}
        | options
    )
    trainer.fit(SFTModule(str(model)), SFTDataModule(train=ROWS, val=ROWS[:2] if val else None, global_batch_size=2))


@pytest.mark.parametrize(
    ("monitor", "best"),
    [("val/quality_loss", 1), ("val/kl", 1), ("val/accuracy", 0), ("val/rewards/margins", 0), ("val/my_reward", 0)],
)
def test_the_direction_is_that_of_the_metrics_name(monitor, best, tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "model"), monitor=monitor)
    fit(tiny_model_folder(), export, Logs(monitor, [0.9, 0.1, 0.5]))
    record = json.loads((tmp_path / "model.json").read_text())
    assert (record["step"], record["value"]) == (best + 1, pytest.approx([0.9, 0.1][best]))


@pytest.mark.parametrize("monitor", ["val/entropy", "val/quality", "val/rewards/rejected", "val/reward_std"])
def test_a_name_that_does_not_say_needs_a_direction(monitor):
    with pytest.raises(ValueError, match=f"monitor is '{monitor}', whose name does not say .*: set mode to max or min"):
        ModelExport("x", monitor=monitor)
    assert ModelExport("x", monitor=monitor, mode="min").mode == "min"
    assert ModelExport("x", monitor="val/loss", mode="max").mode == "max", "what is written counts"


def test_pipelines_and_configs_leave_the_direction_to_the_name(tmp_path):
    stage = {"kind": "fit", "config": ["configs/sft/tiny.yaml"], "export": {"monitor": "val/loss"}}
    config = {"title": "x", "run_dir": str(tmp_path), "stages": {"sft": stage}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config))
    stage = load_pipeline(str(tmp_path / "pipeline.yaml")).stages["sft"]
    assert ModelExport("x", **vars(stage.export)).mode == "min"
    assert direction_of("val/loss") == "min"


@pytest.mark.parametrize("options", [{"val": False}, {"limit_val_batches": 0}])
def test_a_metric_of_validation_without_validation_rows_is_refused_before_the_first_step(
    options, tiny_model_folder, tmp_path
):
    logs = Logs("val/accuracy", [1.0])
    with pytest.raises(ValueError, match=r"monitor is 'val/accuracy', and there are no validation rows .*: set the"):
        fit(tiny_model_folder(), ModelExport(str(tmp_path / "model"), monitor="val/accuracy"), logs, **options)
    assert not logs.steps


def test_validation_of_later_epochs_counts_as_validation(tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "model"), monitor="val/loss")
    logs = Logs("val/x", [0.0] * 9)
    fit(
        *(tiny_model_folder(), export, logs),
        **{"max_steps": -1, "max_epochs": 2, "check_val_every_n_epoch": 2, "val_check_interval": 1.0},
    )
    assert export.step == 6


def test_a_run_that_ends_before_its_first_validation_is_exported(tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "model"), monitor="val/loss")
    with pytest.warns(UserWarning, match="'val/loss' was never measured in 2 steps: the model is exported as it is"):
        fit(tiny_model_folder(), export, Logs("val/x", []), max_steps=2, val_check_interval=3)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


class Recursive:
    """A terminal within another: whoever writes to it comes back to it."""

    def write(self, text: str) -> int:
        raise RecursionError(text)

    def flush(self) -> None:
        raise RecursionError

    def isatty(self) -> bool:
        return True


def test_an_export_writes_nothing_to_a_terminal_that_belongs_to_the_trainers_bar(
    tiny_model_folder, tmp_path, monkeypatch
):
    module = SFTModule(str(tiny_model_folder()))
    module.configure_model()
    transformers.utils.logging.enable_progress_bar()
    monkeypatch.setattr(sys, "stderr", Recursive())
    module.save_pretrained(str(tmp_path / "model"))
    monkeypatch.undo()
    assert transformers.utils.logging.is_progress_bar_enabled()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(exported.lm_head.weight, module.model.lm_head.weight)
