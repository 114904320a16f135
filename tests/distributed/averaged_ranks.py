"""Runs with an average of their weights, on one rank or, as torchrun's worker, on several."""

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
from transformers import AutoModelForCausalLM

from rlhf_lightning.callbacks import ModelExport, WeightAverage
from rlhf_lightning.sequences import ExampleBatch
from tests.helpers import leave_together
from tests.invariance.harness import Batches, trainer, whole
from tests.invariance.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
# Trained weights: everything, everything with a reference, an adapter with a reference, compiled layers.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "reference": ("dpo", {"reference": "frozen"}),
    "adapter": ("dpo", {"reference": "frozen", "lora": {"r": 2}}),
    "compiled": ("dpo", {"reference": "frozen", "compile": True}),
}
# Three batches; one leaves a second rank without rows.
BOUNDS = ((0, 3), (3, 4), (4, 6))
# Gradients of rounding noise stay noise, which Adam would divide by its own size.
OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Weights = dict[str, Tensor]


class Validated(lightning.Callback):
    """The weights that were validated last."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = of(pl_module)


def cases(strategy: str) -> list[str]:
    """Returns the cases that a strategy runs: sharded layers are not compiled."""
    return [case for case in CASES if (case, strategy) != ("compiled", "fsdp2")]


def of(module: Any) -> Weights:
    """A module's weights, whole; every rank calls it."""
    return {name: whole(p).clone() for name, p in module.named_parameters()}


def averaged(
    case: str,
    model: str,
    folder: Path,
    resume: str | None = None,
    strategy: str = "auto",
    rank: int = 0,
    world: int = 1,
) -> dict[str, Weights]:
    """Trains for an epoch unless there is a checkpoint, resumes for another, exports, and validates the last one.

    Returns:
        The averaged and trained weights, those validated in training and from a checkpoint, the exported ones, and
        the reference.
    """
    method, options = CASES[case]
    rows = METHODS[method].rows(6)
    batches = [ExampleBatch(rows[start:stop][rank::world]) for start, stop in BOUNDS]
    val = Batches(ExampleBatch(rows[:2][rank::world]))
    given: dict[str, Any] = {"devices": world, "strategy": strategy, "use_distributed_sampler": False}

    def run(epochs: int, resume: str | None) -> tuple[Any, WeightAverage, Validated]:
        torch.manual_seed(0)
        module = METHODS[method].module(model, optimizer=OPTIMIZER, micro_batch_tokens=40, **options)
        average, validated = WeightAverage(0.8), Validated()
        callbacks = [ModelExport(str(folder / case), merge_adapter=True), average, validated]
        fit = trainer(max_epochs=epochs, num_sanity_val_steps=0, callbacks=callbacks, **given)
        fit.fit(module, Batches(*batches), val, ckpt_path=resume, weights_only=True if resume else None)
        fit.save_checkpoint(folder / f"{case}-{epochs}.ckpt")
        return module, average, validated

    if resume is None:
        run(1, None)
        resume = str(folder / f"{case}-1.ckpt")
    module, average, validated = run(2, resume)
    exported = AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float64)
    again = Validated()
    fresh = METHODS[method].module(model, optimizer=OPTIMIZER, **options)
    evaluation = trainer(callbacks=[WeightAverage(0.8), again], **given)
    evaluation.validate(fresh, val, ckpt_path=folder / f"{case}-2.ckpt", verbose=False, weights_only=True)
    return {
        "average": {name: whole(weight).clone() for name, weight in average.average.items()},
        "own": of(module),
        "validated": validated.weights,
        "from a checkpoint": again.weights,
        "exported": {name: p.detach() for name, p in exported.named_parameters()},
        "reference": {
            name: whole(p) for r in getattr(module, "references", ()) for name, p in r.model.named_parameters()
        },
    }


def on_ranks(model: str, folder: Path, strategy: str) -> dict[str, dict[str, Weights]]:
    """Every case under torchrun on two ranks; what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.averaged_ranks", model, str(folder), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Weights]] = torch.load(folder / "results.pt", weights_only=True)
    return found


def main(model: str, folder: str, strategy: str) -> None:
    """Runs every case on this rank."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {case: averaged(case, model, Path(folder), None, strategy, rank, world) for case in cases(strategy)}
    if rank == 0:
        torch.save(found, Path(folder) / "results.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
