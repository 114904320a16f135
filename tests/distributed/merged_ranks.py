"""Runs that merge their snapshots, on one rank or, as torchrun's worker, on several."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.callbacks import ModelMerging
from rlhf_lightning.sequences import ExampleBatch
from tests.helpers import leave_together
from tests.invariance.harness import Batches, trainer
from tests.invariance.methods import METHODS

from .averaged_ranks import BOUNDS, of

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, Tensor]
# A method with options, and the options of the callback.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mean": ("sft", {}, {"num_models": 2, "snapshot_every_n_steps": 1, "merge_every_n_epochs": 1}),
    "end": (
        "dpo",
        {"reference": "frozen", "lora": {"r": 2}},
        {"num_models": 3, "snapshot_every_n_steps": 2, "eta": 0.5},
    ),
    "warp": ("sft", {}, {"method": "warp", "num_models": 2, "eta": 0.5}),
    "rejected": ("sft", {}, {"eta": 0.01, "num_models": 2, "snapshot_every_n_steps": 1, "merge_every_n_epochs": 1}),
}
# Gradients of rounding noise stay noise, which Adam would divide by its own size.
OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def merged(
    case: str, model: str, folder: Path, resume: str | None, strategy: str = "auto", rank: int = 0, world: int = 1
) -> Found:
    """Trains for three epochs, or resumes for the rest of them; returns weights and metrics."""
    method, options, given = CASES[case]
    rows = METHODS[method].rows(6)
    batches = [ExampleBatch(rows[start:stop][rank::world]) for start, stop in BOUNDS]
    val = Batches(ExampleBatch(rows[:2][rank::world]))
    ranks: dict[str, Any] = {"devices": world, "strategy": strategy, "use_distributed_sampler": False}

    def run(epochs: int, resume: str | None) -> tuple[Any, ModelMerging]:
        torch.manual_seed(0)
        module = METHODS[method].module(model, optimizer=OPTIMIZER, micro_batch_tokens=40, **options)
        merging = ModelMerging("val/loss", **{"max_drop": 0.0 if case == "rejected" else 10.0, **given})
        fit = trainer(max_epochs=epochs, num_sanity_val_steps=0, callbacks=[merging], **ranks)
        fit.fit(module, Batches(*batches), val, ckpt_path=resume, weights_only=True if resume else None)
        fit.save_checkpoint(folder / f"{case}-{epochs}.ckpt")
        return module, merging

    if resume is None:
        run(1, None)
        resume = str(folder / f"{case}-1.ckpt")
    module, merging = run(3, resume)
    metrics = [[entry["step"], entry["policy"], entry["merged"], entry["kept"]] for entry in merging.history]
    return of(module) | {"history": torch.tensor(metrics, dtype=torch.float64)}


def on_ranks(model: str, folder: Path, strategy: str) -> dict[str, Found]:
    """Every case under torchrun on two ranks; what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.merged_ranks", model, str(folder), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Found] = torch.load(folder / "results.pt", weights_only=True)
    return found


def main(model: str, folder: str, strategy: str) -> None:
    """Runs every case on this rank."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {case: merged(case, model, Path(folder), None, strategy, rank, world) for case in CASES}
    if rank == 0:
        torch.save(found, Path(folder) / "results.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
