"""A run with an average of its weights, on one rank or, as torchrun's worker, on several."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport, WeightAverage
from rlhf_lightning.sequences import ExampleBatch
from tests.invariance.harness import Batches, trainer, whole
from tests.invariance.methods import demonstrations

ROOT = Path(__file__).resolve().parents[2]
Weights = dict[str, Tensor]


class Validated(lightning.Callback):
    """The weights that were validated last."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = {name: whole(p).clone() for name, p in pl_module.named_parameters()}


def averaged(model: str, folder: Path, strategy: str = "auto", rank: int = 0, world: int = 1) -> dict[str, Weights]:
    """Trains for an epoch, resumes for another, and exports; what was averaged, trained, validated and exported."""
    rows = demonstrations(6)
    batches = [ExampleBatch(part[rank::world]) for part in (rows[:3], rows[3:4], rows[4:])]
    val = ExampleBatch(rows[:2][rank::world])
    for epochs in (1, 2):
        torch.manual_seed(0)
        module = SFTModule(model, optimizer=partial(torch.optim.AdamW, lr=0.01), lora=None)
        average, validated = WeightAverage(0.8), Validated()
        export = ModelExport(str(folder / "model"))
        given: dict[str, Any] = {"devices": world, "strategy": strategy, "use_distributed_sampler": False}
        run = trainer(max_epochs=epochs, num_sanity_val_steps=0, callbacks=[export, average, validated], **given)
        resume = str(folder / "first.ckpt") if epochs == 2 else None
        run.fit(module, Batches(*batches), Batches(val), ckpt_path=resume, weights_only=False if resume else None)
        if epochs == 1:
            run.save_checkpoint(folder / "first.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    return {
        "average": {name: whole(weight).clone() for name, weight in average.average.items()},
        "own": {name: whole(p).clone() for name, p in module.named_parameters()},
        "validated": validated.weights,
        "exported": {name: p.detach() for name, p in exported.named_parameters()},
    }


def main(model: str, folder: str, strategy: str) -> None:
    """Runs on this rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results = averaged(model, Path(folder), strategy, rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
