"""No precision rounds the rotary frequencies of a model that a module holds, whatever hooks a user overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import DPOModule
from rlhf_lightning.sequences import ExampleBatch

from ..invariance.harness import Batches
from ..invariance.methods import pairs, prompts, rollouts
from ..rl.fixed_rollouts import FixedPPO


class Kept(lightning.Callback):
    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        models = [pl_module, *(r.model for r in getattr(pl_module, "references", ()))]
        self.buffers = [b.clone() for m in models for name, b in m.named_buffers() if name.split(".")[-1] == "inv_freq"]


class Forgetful(DPOModule):
    def on_fit_start(self) -> None:
        """A user's own, without super()."""


class ForgetfulPPO(FixedPPO):
    def on_fit_start(self) -> None:
        """A user's own, without super()."""


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("kind", [Forgetful, ForgetfulPPO])
def test_every_model_keeps_its_frequencies(kind: Any, precision: Any, tiny_model_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_model_folder("llama"))
    options: dict[str, Any] = {} if kind is Forgetful else rollouts(value={"model": folder}, kl_coef=0.2)
    module, kept = kind(folder, **options), Kept()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=1,
        callbacks=[kept],
        **quiet,  # type: ignore[arg-type]
    )
    rows = pairs(2) if kind is Forgetful else prompts(2)
    trainer.fit(module, Batches(ExampleBatch(rows)))
    # By hand: 1 / theta ^ (2 i / d) of heads of 8 numbers.
    exact = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    assert len(kept.buffers) == (2 if kind is Forgetful else 3)
    for found in kept.buffers:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
