"""Training runs that are compared over strategies and numbers of ranks; under torchrun this file is the worker.

A job trains a method of the invariance matrix for an epoch of three batches: an uneven one, one of a single row, which
leaves other ranks without any, and one that a later epoch repeats where a checkpoint is resumed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor

from rlhf_lightning import FSDP2Strategy, GRPOModule, PPOModule
from rlhf_lightning.sequences import ExampleBatch
from tests.helpers import leave_together
from tests.invariance.harness import Batches, trainer, whole
from tests.invariance.methods import METHODS, PACKED, Method, rollouts
from tests.rl.fixed_rollouts import prompts

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = (0, 5, 6, 8)
# Methods that sample their completions, where those of the invariance matrix are given them.
LIVE = {
    "grpo-live": Method(GRPOModule, prompts, rollouts(beta=0.1)),
    "ppo-live": Method(PPOModule, prompts, rollouts()),
}


def run_job(job: dict[str, Any], strategy: str = "auto", rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Trains, and returns whole weights and what was logged.

    Args:
        job: ``method``, ``model`` and, if wanted, ``options`` of the module, ``precision``, ``sgd`` in the place of
            AdamW, which makes differences of rounding noise as large as its steps, options of the strategy
            ``fsdp2``, and the paths ``resume``, ``save`` and ``export``.
        strategy: of the trainer.
        rank: this process.
        world: how many processes there are.
    """
    torch.manual_seed(0)
    method = (METHODS | PACKED | LIVE)[job["method"]]
    options: dict[str, Any] = {
        "max_grad_norm": 0.5,
        "micro_batch_tokens": 40,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    }
    if job.get("sgd"):
        options["optimizer"] = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    module = method.module(job["model"], **{**method.options, **options, **job.get("options", {})})
    rows = method.rows(BOUNDS[-1])
    batches = [rows[start:stop][rank::world] for start, stop in itertools.pairwise(BOUNDS)]
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if strategy == "fsdp2" and "fsdp2" in job:
        strategy = "fsdp2-of-a-job"  # by name, as Lightning refuses fp64 where it is given the object
        StrategyRegistry.register(strategy, FSDP2Strategy, override=True, **job["fsdp2"])
    settings: dict[str, Any] = {"devices": devices, "num_nodes": world // devices, "strategy": strategy}
    settings["use_distributed_sampler"] = False
    resume = job.get("resume")
    run = trainer(job.get("precision", "64-true"), max_epochs=2 if resume else 1, num_sanity_val_steps=0, **settings)
    # A validation set of one row, smaller than the world.
    few = [rows[:1][rank::world]]
    loaders = [Batches(*map(ExampleBatch, part)) for part in (batches, few)]
    run.fit(module, *loaders, ckpt_path=resume, weights_only=False if resume else None)
    if "save" in job:
        run.save_checkpoint(job["save"])
    if "export" in job:
        module.save_pretrained(job["export"])
    weights: dict[str, Tensor] = {name: whole(p).clone() for name, p in module.named_parameters()}
    return {"weights": weights, "metrics": {k: float(v) for k, v in run.callback_metrics.items()}}


def written(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Jobs that also leave a checkpoint and an export."""
    return {k: job | {"save": f"{folder}/{k}.ckpt", "export": f"{folder}/{k}"} for k, job in jobs.items()}


def on_ranks(jobs: dict[str, Any], folder: Path, strategy: str, world: int, timeout: float = 600) -> dict[str, Any]:
    """Runs jobs under torchrun; the results of rank 0."""
    target = folder / "results.pt"
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "tests.distributed.sharding_jobs", str(folder / "jobs.json"), str(target), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = torch.load(target)
    return results


def main(jobs: str, target: str, strategy: str) -> None:
    """Runs every job of a file on this rank."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for name, job in json.loads(Path(jobs).read_text(encoding="utf-8")).items():
        results[name] = run_job(job, strategy, rank, world)
    if rank == 0:
        torch.save(results, target)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
