"""Runs that keep weights near those of earlier tasks, on one rank or, as torchrun's worker, on several."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ElasticWeightConsolidation
from rlhf_lightning.sequences import ExampleBatch
from tests.helpers import leave_together
from tests.invariance.harness import Batches, trainer, whole
from tests.invariance.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, dict[str, Any]] = {"all weights": {}, "adapter": {"lora": {"r": 2}}}
Weights = dict[str, Tensor]


class Drawn(lightning.Callback):
    """Moves the adapters from where they begin, at which half of their gradients are 0, before anything is measured."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for name, weight in pl_module.named_parameters():
                if "lora_B" in name:
                    shape = tuple(weight.shape)
                    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
                    state = {name: 0.3 * drawn}
                    pl_module.load_state_dict(state, strict=False)


def consolidated(
    case: str, model: str, folder: Path, strategy: str = "auto", rank: int = 0, world: int = 1
) -> dict[str, Weights]:
    """Measures two tasks and trains for two steps; returns information, center and the weights at the end."""
    rows = METHODS["sft"].rows(6)
    batches = Batches(*[ExampleBatch(rows[start:stop][rank::world]) for start, stop in ((0, 3), (3, 6))])
    keep = ElasticWeightConsolidation([str(folder / f"{name}.jsonl") for name in ("first", "second")], strength=30.0)
    torch.manual_seed(0)
    module = SFTModule(model, optimizer=partial(torch.optim.SGD, lr=0.1), max_grad_norm=None, **CASES[case])
    given: dict[str, Any] = {"devices": world, "strategy": strategy, "use_distributed_sampler": False}
    fit = trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[Drawn(), keep], **given)
    fit.fit(module, batches)
    trained = {name: whole(p).clone() for name, p in module.named_parameters() if p.requires_grad}
    information = {name: whole(value) for name, value in keep.information.items()}
    center = {name: whole(value) for name, value in keep.center.items()}
    penalty = torch.as_tensor(fit.callback_metrics["train/ewc_penalty"])
    return {"information": information, "center": center, "trained": trained, "penalty": {"penalty": penalty}}


def on_ranks(model: str, folder: Path, strategy: str) -> dict[str, dict[str, Weights]]:
    """Every case under torchrun on two ranks; what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.consolidated_ranks", model, str(folder), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Weights]] = torch.load(folder / f"{strategy}.pt", weights_only=True)
    return found


def main(model: str, folder: str, strategy: str) -> None:
    """Runs every case on this rank."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {case: consolidated(case, model, Path(folder), strategy, rank, world) for case in CASES}
    if rank == 0:
        torch.save(found, Path(folder) / f"{strategy}.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
