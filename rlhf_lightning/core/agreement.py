"""What all ranks of a run have to have in common before its first batch."""

from __future__ import annotations

import socket

import lightning

from ..distributed.collectives import gather_objects, world_size
from ..utils.files import check_on_all_ranks
from .micro_batching import MicroBatchedModule


class RankAgreement(lightning.Callback):
    """Decides on all ranks at once what would otherwise be decided by the first that needs it, and compares the rest.

    - How batches run (``layout: auto``): a model is tried out, which is a collective where its weights are sharded; a
      rank that never has a row would leave the others waiting.
    - Which checkpoint is resumed: where machines have disks of their own, one may have a checkpoint that another lacks.
    - Whether loggers may write to their files: the first rank looks, and all of them hear what it found.

    Every post-training module brings it along.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Asks the loggers that write to files of their own, such as ``JSONLLogger``."""
        for logger in trainer.loggers:
            if hasattr(logger, "claim"):
                check_on_all_ranks(trainer, logger.claim)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Decides how batches run."""
        self._decide(pl_module)

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares what is resumed."""
        self._compare(trainer)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares what is resumed."""
        self._compare(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Does both, where nothing is trained."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Does both."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Does both."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._compare(trainer)
        self._decide(module)

    def _decide(self, module: lightning.LightningModule) -> None:
        if world_size() > 1 and isinstance(module, MicroBatchedModule):
            module.settle_layout()

    def _compare(self, trainer: lightning.Trainer) -> None:
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
