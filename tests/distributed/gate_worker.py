"""Gated runs on the ranks that torchrun started, and the same ones each of whose candidates is rejected once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import (
    CapabilityGate,
    ElasticWeightConsolidation,
    SelfImprovement,
    TrainingCheckpoint,
    capability_gate,
)
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.self_improvement.gate import Decision
from tests.callbacks.test_capability_gate import says_no_z, suite
from tests.helpers import leave_together
from tests.integration.test_resume import DEMONSTRATIONS, LORA, Noise


def fit(model: str, folder: Path, strategy: str, *callbacks: lightning.Callback, **options: Any) -> None:
    """Nine steps, with dropout of each rank's own."""
    lightning.seed_everything(1, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=9,
        max_epochs=-1,
        logger=False,
        callbacks=[TrainingCheckpoint(str(folder / "checkpoints"), every_n_steps=1, keep=9), Noise(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3)
    trainer.fit(SFTModule(model, lora=LORA), datamodule=data, **options)


class SameSeeds(SelfImprovement):
    """Rounds that are made again with the seeds that they had."""

    attempt = property(lambda self: 0, lambda self, value: None)  # type: ignore[assignment]


def rounds(place: Path) -> SelfImprovement:
    """Rounds of all samples that have ended."""
    return SameSeeds(
        str(place.parent / "prompts.jsonl"),
        str(place / "own"),
        f"{says_no_z.__module__}.says_no_z",
        threshold=None,
        num_samples=6,
        sampling={"max_new_tokens": 16},
    )


def main(model: str, folder: str, strategy: str) -> None:
    """Runs all accepted, and then each rejected once, without and with rounds; under ddp, one that consolidates."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    script: list[Any] = []

    def decide(accepted: Any, candidate: Any, *args: Any, **given: Any) -> Decision:
        assert [len(result.prompts) for result in candidate] == [3]
        rows = [prompt.row_id for result in (*accepted, *candidate) for prompt in result.prompts]
        assert rows[:3] == rows[3:] == sorted(rows[:3])
        return Decision(script.pop(0) if script else "accept", "as told", 0.0, 0.0, 0.0, 1.0, given["kl"])

    capability_gate.decide = decide  # type: ignore[assignment]
    capability_gate.scale_learning_rates = lambda trainer, factor: None
    place = Path(folder)
    for name, verdicts in (("plain", []), ("again", ["reject", "accept"] * 3)):
        script[:] = verdicts
        gate = CapabilityGate(suite(place), str(place / name / "accepted"), every_n_steps=4, criteria={"max_kl": 100.0})
        fit(model, place / name, strategy, gate)
        assert len(gate.history) == 3 + sum(verdict == "reject" for verdict in verdicts)
    for name, again in (("rounds", False), ("rounds again", True)):
        script[:] = ["reject", "accept"] * 9 if again else []
        gate = CapabilityGate(suite(place), str(place / name / "accepted"))
        fit(model, place / name, strategy, gate, rounds(place / name))
        assert [entry["verdict"] for entry in gate.history].count("reject") == (len(gate.history) // 2 if again else 0)
    if strategy == "ddp":
        fit(model, place / "ewc", strategy, ElasticWeightConsolidation(str(place / "rows.jsonl")))
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
