"""A run on the ranks that torchrun started, and the same one resumed from its middle."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import lightning
import torch

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.callbacks import TrainingCheckpoint
from rlhf_lightning.datamodules import SFTDataModule
from tests.helpers import leave_together
from tests.integration.test_resume import DEMONSTRATIONS, LORA, Noise, pairs


class OwnSeed(lightning.Callback):
    """Gives every rank random numbers of its own, after the strategy has given all of them the same."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.manual_seed(100 + trainer.global_rank)


def fit(model: str, folder: Path, strategy: str, name: str, resume: Path | None = None) -> None:
    """Four steps; every rank has random numbers of its own."""
    lightning.seed_everything(1 if resume is None else 2, verbose=False)
    saver = TrainingCheckpoint(str(folder), every_n_steps=1, keep=9)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=6,
        max_epochs=-1,
        logger=False,
        callbacks=[saver, OwnSeed(), Noise()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if name == "sft":
        module = SFTModule(model, lora=LORA)
        data = SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3)
    else:
        module, data = DPOModule(model), pairs()
    trainer.fit(module, datamodule=data, ckpt_path=resume)


def main(model: str, folder: str, strategy: str) -> None:
    """Runs both of both methods."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in ("sft", "dpo"):
        place = Path(folder) / name
        fit(model, place / "whole", strategy, name)
        fit(model, place / "resumed", strategy, name, place / "whole" / "step=2.ckpt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
