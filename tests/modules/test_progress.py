"""What the progress bar shows of each method: two or three numbers that are there in every run."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import METHODS

SHOWN = {
    "sft": {"loss", "mean_token_accuracy"},
    "reward": {"loss", "rewards/accuracies", "rewards/margins"},
    "process": {"loss", "step_accuracy", "first_error_f1"},
    "dpo": {"loss", "rewards/accuracies", "rewards/margins"},
    "simpo": {"loss", "rewards/accuracies", "rewards/margins"},
    "kto": {"loss", "kl", "rewards/margins"},
    "grpo": {"reward", "completions/mean_length", "kl"},
    "ppo": {"reward", "objective/kl", "explained_variance"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.mark.parametrize("name", SHOWN)
def test_the_bar(name: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = METHODS[name]
    bar = RichProgressBar(refresh_rate=1, leave=True)
    run = trainer("32-true", max_epochs=1, enable_progress_bar=True, callbacks=[bar], num_sanity_val_steps=0)
    module = method.module(folder, **{"optimizer": partial(torch.optim.SGD, lr=1e-3), **method.options})
    run.fit(module, Batches(ExampleBatch(method.rows(6))))
    shown = {key: value for key, value in bar.get_metrics(run, module).items() if key != "v_num"}
    most = {f"train/{metric}" for metric in SHOWN[name]}
    assert most - {"train/first_error_f1"} <= shown.keys() <= most  # which needs solutions with and without an error
    for key, value in shown.items():
        assert float(value) == pytest.approx(float(run.callback_metrics[key]))
    # Rich breaks the line wherever the terminal ends.
    text = re.sub(r"\s", "", capsys.readouterr().out)
    assert "train/" in text
    assert "1/1" in text
