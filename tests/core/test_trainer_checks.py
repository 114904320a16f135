"""Lightning's tuners, refused in a line that says what to do instead; the other refusals are in test_refusals.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import METHODS, pairs

RATE = (
    r"^LearningRateFinder needs Lightning's automatic optimisation, and this module steps manually .*"
    r"optimizer\.init_args\.lr[^\n]*$"
)
SIZE = r"^BatchSizeFinder enlarges batches until memory runs out, .*global_batch_size .*micro_batch_tokens[^\n]*$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.mark.parametrize(("finder", "message"), [(LearningRateFinder, RATE), (BatchSizeFinder, SIZE)])
@pytest.mark.parametrize("name", ["sft", "dpo", "simpo", "kto", "reward", "process", "grpo", "ppo"])
def test_callbacks(name: str, finder: Any, message: str, folder: str) -> None:
    method = METHODS[name]
    module = method.module(folder, **method.options)
    run = trainer("32-true", max_steps=1, callbacks=[finder()])
    with pytest.raises(ValueError, match=message):
        run.fit(module, Batches(ExampleBatch(method.rows(2))))


@pytest.mark.parametrize(("search", "message"), [("lr_find", RATE), ("scale_batch_size", SIZE)])
def test_the_tuner(search: str, message: str, folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(4)]
    run = trainer("32-true", max_steps=1)
    with pytest.raises(ValueError, match=message):
        getattr(Tuner(run), search)(SFTModule(folder), datamodule=SFTDataModule(train=rows, global_batch_size=2))


def test_nothing_was_built(folder: str) -> None:
    module = DPOModule(folder)
    with pytest.raises(ValueError, match=RATE):
        trainer("32-true", max_steps=1, callbacks=[LearningRateFinder()]).fit(module, Batches(ExampleBatch(pairs(2))))
    assert module.model is None
