"""Stops training when a policy has moved too far from its reference."""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_info


class KLGuard(lightning.Callback):
    """Ends training when a logged divergence stays above a limit.

    Reward models and verifiers can be hacked: past some divergence, a policy's gains no longer reflect the quality
    that its reward should measure (Gao et al., 2023, arXiv:2210.10760, section 3). The compared value is the one
    logged for an iteration, before its optimizer steps; with ``ModelExport`` and no ``monitor`` the exported model is
    the one at which training stopped.

    Args:
        max_kl: the limit, above 0.
        monitor: name of the divergence, as logged in training: ``train/kl`` is per token; PPO also logs the divergence
            per completion, as ``train/objective/kl``. GRPO with ``beta=0`` logs one with ``reference="frozen"``.
        patience: consecutive iterations above the limit that are tolerated, at least 0.

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
        self.above = 0  # consecutive iterations above the limit
        self.stopped_at: int | None = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Checks the iteration that has just ended; the value is the same on every rank."""
        if self.monitor not in trainer.callback_metrics:
            divergences = ", ".join(name for name in sorted(trainer.callback_metrics) if "kl" in name) or "none"
            raise ValueError(
                f"monitor is {self.monitor!r}, which is not logged in training (divergences that are: {divergences}): "
                "give the module a reference policy, with beta or kl_coef above 0 or reference='frozen'"
            )
        value = float(trainer.callback_metrics[self.monitor])
        # Negated, so that a nan counts as above.
        self.above = self.above + 1 if not value <= self.max_kl else 0
        if self.above > self.patience:
            self.stopped_at = trainer.global_step
            trainer.should_stop = True
            rank_zero_info(f"{self.monitor} is {value:.4g}, above max_kl={self.max_kl:g}: training stops")

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of iterations above the limit, and the step of the stop."""
        return {"above": self.above, "stopped_at": self.stopped_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of an earlier run."""
        self.above, self.stopped_at = state_dict["above"], state_dict["stopped_at"]
