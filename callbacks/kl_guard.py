"""Stopping where a policy has moved too far from its reference."""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_info


class KLGuard(lightning.Callback):
    """Ends training when a logged divergence stays above a limit.

    Reward models and verifiers can be hacked: past some divergence, what a policy gains is no longer what its reward
    was meant to measure (Gao et al., 2023, arXiv:2210.10760, section 3). What is measured is the iteration's own
    logged value, before the steps that it led to; with ``ModelExport`` and no ``monitor`` the exported model is the one
    at which training stopped.

    Args:
        max_kl: the limit, above 0.
        monitor: what is compared with it, as logged in training: ``train/kl`` is per token; PPO logs the divergence per
            completion, too, as ``train/objective/kl``. GRPO with ``beta=0`` has one with ``reference="frozen"``.
        patience: iterations in a row above the limit that are still tolerated, at least 0.

    Raises:
        ValueError: a number out of range; in training, a metric that is not logged.

    Example::

        lightning.Trainer(callbacks=[KLGuard(max_kl=0.2)]).fit(module, data)
    """

    def __init__(self, max_kl: float, monitor: str = "train/kl", patience: int = 0) -> None:
        if not 0 < max_kl < math.inf:
            raise ValueError(f"max_kl is {max_kl}; it must be a finite number above 0 (0.1 per token is a lot)")
        if patience < 0:
            raise ValueError(f"patience is {patience}; it must be at least 0 (0 stops at once)")
        self.max_kl = max_kl
        self.monitor = monitor
        self.patience = patience
        self.above = 0  # iterations in a row above the limit
        self.stopped_at: int | None = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Looks at the iteration that has just ended; the value is the same on every rank."""
        if self.monitor not in trainer.callback_metrics:
            divergences = ", ".join(name for name in sorted(trainer.callback_metrics) if "kl" in name) or "none"
            raise ValueError(
                f"monitor is {self.monitor!r}, which is not logged in training (divergences that are: {divergences}): "
                "give the module a reference policy, with beta or kl_coef above 0 or reference='frozen'"
            )
        value = float(trainer.callback_metrics[self.monitor])
        self.above = self.above + 1 if not value <= self.max_kl else 0
        if self.above > self.patience:
            self.stopped_at = trainer.global_step
            trainer.should_stop = True
            rank_zero_info(f"{self.monitor} is {value:.4g}, above max_kl={self.max_kl:g}: training stops")

    def state_dict(self) -> dict[str, Any]:
        """How long the limit has been exceeded."""
        return {"above": self.above, "stopped_at": self.stopped_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where an earlier run was."""
        self.above, self.stopped_at = state_dict["above"], state_dict["stopped_at"]
