"""Checks and decisions that all ranks of a run must share before its first batch."""

from __future__ import annotations

import socket

import lightning

from ..distributed.collectives import gather_objects, world_size
from ..utils.files import on_first_rank


class RankAgreement(lightning.Callback):
    """Makes decisions on all ranks together that a single rank would otherwise make alone, and compares their state.

    - The layout of batches (``layout: auto``): probing a model is a collective where its weights are sharded, so a
      rank without rows would leave the others waiting.
    - The checkpoint to resume from: machines with local disks may not all have it.
    - Whether loggers may write to their files: rank 0 checks, and its result is raised on all ranks.

    Added automatically by every post-training module.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks that loggers with files of their own, such as ``JSONLLogger``, may write to them."""
        for logger in trainer.loggers:
            if hasattr(logger, "claim"):
                on_first_rank(logger.claim)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Decides the layout of batches."""
        self._decide(pl_module)

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares the resumed checkpoint between ranks."""
        self._compare(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares the resumed checkpoint between ranks."""
        self._compare(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares the checkpoint and decides the layout, unless validation is part of ``fit``."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares the checkpoint and decides the layout."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares the checkpoint and decides the layout."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._compare(trainer)
        self._decide(module)

    def _decide(self, module: lightning.LightningModule) -> None:
        decide = getattr(module, "decide_layout", None)
        if world_size() > 1 and decide is not None:
            decide()

    def _compare(self, trainer: lightning.Trainer) -> None:
        # Host names are in the message, because a checkpoint that only one machine has is the usual cause.
        path = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        found = gather_objects((path, trainer.global_step, socket.gethostname()))
        for rank, (other, step, host) in enumerate(found):
            if (other, step) != found[0][:2]:
                raise ValueError(
                    f"rank 0 (on {found[0][2]}) {_starts(*found[0][:2])}, and rank {rank} (on {host}) "
                    f"{_starts(other, step)}: keep checkpoints where all machines can read them, or copy them there"
                )


def _starts(path: str | None, step: int) -> str:
    return "resumes nothing" if path is None else f"resumes {path!r} of step {step}"
