"""``bf16-mixed`` on two ranks: the steps of one rank, up to what bf16 rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..helpers import save_tiny_model
from .sharding_jobs import on_ranks, run_job

JOBS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "dpo": {"method": "dpo", "options": {"lora": {"r": 4}, "reference": "frozen"}},
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_steps_of_two_ranks_are_those_of_one(strategy: str, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model", "qwen3"))
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    jobs = {name: {**job, "model": model, "precision": "bf16-mixed", "sgd": True} for name, job in JOBS.items()}
    two = on_ranks(jobs, tmp_path, strategy, 2)
    for name, job in jobs.items():
        one = run_job(job)
        moves = []
        for weights in (one["weights"], two[name]["weights"]):
            moved: list[Tensor] = []
            for key, weight in weights.items():
                if name == "sft":
                    moved.append((weight - start[key.removeprefix("model.")]).flatten())
                elif "lora_B" in key:  # begins at 0
                    moved.append(weight.flatten())
            moves.append(torch.cat(moved).double())
        assert float(moves[0].norm()) > 1e-3
        assert float((moves[1] - moves[0]).norm() / moves[0].norm()) < 0.05, name
        assert two[name]["metrics"] == pytest.approx(one["metrics"], rel=0.05, abs=0.02)
