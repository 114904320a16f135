"""Work of the ranks that torchrun starts for test_f6_ranks.py; every rank writes a file of its own."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.distributed.collectives import Rows
from rlhf_lightning.sequences import ExampleBatch, SequenceBatch
from tests.helpers import leave_together
from tests.invariance.harness import Batches, trainer
from tests.invariance.methods import demonstrations, pairs

STILL = partial(torch.optim.SGD, lr=0.0)


class Losses(SFTModule):
    """Keeps the losses of its own rows."""

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """See SFTModule."""
        rows = super().grad_rows(batch)
        self.__dict__.setdefault("seen", []).append(rows["loss"].detach().tolist())
        return rows


def main(folder: str, target: str) -> None:
    """Runs what the two tests compare, under both strategies."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        options = {"strategy": strategy, "devices": world, "max_epochs": 1, "num_sanity_val_steps": 0}
        torch.manual_seed(100 + rank)  # as in a script without a seed
        module = DPOModule(folder, init="random", optimizer=STILL)
        run = trainer("32-true", **options)
        run.fit(module, Batches(ExampleBatch(pairs(4)[rank::world])))
        found[f"{strategy}-loss"] = float(run.callback_metrics["train/loss"])

        torch.manual_seed(0)  # as with seed_everything
        drops = Losses(folder, dropout=0.5, optimizer=STILL)
        trainer("32-true", **options).fit(drops, Batches(ExampleBatch(demonstrations(2))))  # the same on every rank
        found[f"{strategy}-dropped"] = drops.seen[0]
    Path(f"{target}.{rank}").write_text(json.dumps(found))
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
