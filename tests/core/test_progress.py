"""The progress bar of each method: two or three numbers that are there in every run."""

from __future__ import annotations

import re
from functools import partial

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
def test_the_bar(name: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a terminal with room for all of them
    method = METHODS[name]
    bar = RichProgressBar(refresh_rate=1, leave=True)
    run = trainer("32-true", max_epochs=1, enable_progress_bar=True, callbacks=[bar], num_sanity_val_steps=0)
    module = method.module(folder, **{"optimizer": partial(torch.optim.SGD, lr=1e-3), **method.options})
    run.fit(module, Batches(ExampleBatch(method.rows(6))))
    shown = bar.get_metrics(run, module)
    most = {metric.rpartition("/")[2]: f"train/{metric}" for metric in SHOWN[name]}
    assert most.keys() - {"first_error_f1"} <= shown.keys() <= most.keys()  # which needs solutions of both kinds
    for short, value in shown.items():
        assert float(value) == pytest.approx(float(run.callback_metrics[most[short]]), rel=5e-3, abs=1e-9)
    # Rich breaks the line wherever the terminal ends.
    text = re.sub(r"\s", "", capsys.readouterr().out)
    assert all(f"{short}:" in text for short in shown)
    assert "1/1" in text
