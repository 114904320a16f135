"""Stops training on reward over-optimization."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_info


class RewardGuard(lightning.Callback):
    r"""Ends training when the optimised reward keeps rising while an independent measure has fallen.

    Paper: Scaling Laws for Reward Model Overoptimization (Gao et al., 2022, arXiv:2210.10760): as a policy moves away
    from its start, the reward that it is trained on (the proxy) continues to rise, while the true one (gold) rises to
    a peak and falls. With :math:`c^*` the best check so far and :math:`p^*` the proxy at that check, check i counts as
    over-optimised where

    .. math:: c_i < c^* - \delta \quad\text{and}\quad p_i > p^*

    and training stops after ``patience`` of them in a row. Where both fall or stagnate, no reward is being hacked: use
    ``EarlyStopping`` for that. ``ModelExport`` with the check as its ``monitor`` keeps the model of the peak.

    Args:
        proxy: the optimised metric, as logged in training, higher being better; its mean over the batches since the
            previous check is compared. ``train/rewards/margins`` for methods that learn from pairs.
        check: a measure that training does not see, as logged at validation, such as that of ``GenerationAccuracy``.
        patience: consecutive checks that show over-optimisation, at least 1.
        min_delta: drop of the check that counts as a fall, at least 0; about the standard error of the measure.
        mode: whether more or less of the check is better.
        every_n_batches: check every so many batches instead of at each validation, with the mean of the check over
            them, at least 1: for a check that is logged in training, such as ``train/rewards/<name>/mean`` of a reward
            with weight 0.

    Raises:
        ValueError: a number out of range; in training, a metric that is not logged.

    Example::

        accuracy = GenerationAccuracy("sums:prompts?split=validation&rows=200")
        guard = RewardGuard(proxy="train/reward", check="val/accuracy", patience=3)
        lightning.Trainer(callbacks=[accuracy, guard], val_check_interval=8).fit(module, data)
    """

    def __init__(
        self,
        proxy: str = "train/reward",
        check: str = "val/accuracy",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["max", "min"] = "max",
        every_n_batches: int | None = None,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience is {patience!r}; it must be a whole number of at least 1 (3 checks in a row)")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta is {min_delta}; it must be a finite number of at least 0")
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; it must be max or min")
        if every_n_batches is not None and (
            isinstance(every_n_batches, bool) or not isinstance(every_n_batches, int) or every_n_batches < 1
        ):
            raise ValueError(f"every_n_batches is {every_n_batches!r}; it must be at least 1, or null: each validation")
        if proxy == check:
            raise ValueError(
                f"proxy and check are both {proxy!r}; the check must be a measure that training does not see"
            )
        self.proxy = proxy
        self.check = check
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.every_n_batches = every_n_batches
        self.best_check: float | None = None
        self.best_proxy = math.nan  # the proxy when the check was best
        self.num_hacked = 0  # consecutive checks
        self.stopped_at: int | None = None
        self._sums = [0.0, 0.0]  # proxy and check since the last check
        self._num_batches = 0

    @property
    def state_key(self) -> str:
        """Distinguishes the state of several of these callbacks."""
        return self._generate_state_key(proxy=self.proxy, check=self.check)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds up the proxy; values are the same on every rank."""
        self._sums[0] += self._value(trainer, self.proxy, "proxy")
        self._num_batches += 1
        if self.every_n_batches is None:
            return
        # The check is a training metric as well, averaged over the same batches.
        self._sums[1] += self._value(trainer, self.check, "check")
        if self._num_batches >= self.every_n_batches:
            self._compare(trainer, self._sums[1] / self._num_batches)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Makes a check if a batch has been trained since the last one."""
        if self.every_n_batches is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            value = self._value(trainer, self.check, "check")
            if self._num_batches:
                self._compare(trainer, value)

    def _value(self, trainer: lightning.Trainer, name: str, role: str) -> float:
        if name in trainer.callback_metrics:
            return float(trainer.callback_metrics[name])
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        instead = (
            "it must be logged in training: train/reward, or train/rewards/margins"
            if role == "proxy" or self.every_n_batches is not None
            else "add a GenerationAccuracy callback, or name what the module logs at validation"
        )
        raise ValueError(f"{role} is {name!r}, which is not logged (logged: {logged}): {instead}")

    def _compare(self, trainer: lightning.Trainer, check: float) -> None:
        # The mean of the proxy since the last check: single batches are noisy.
        proxy = self._sums[0] / self._num_batches
        self._sums, self._num_batches = [0.0, 0.0], 0
        sign = 1.0 if self.mode == "max" else -1.0
        if self.best_check is None or sign * (check - self.best_check) > 0:
            if not math.isnan(check):
                self.best_check, self.best_proxy, self.num_hacked = check, proxy, 0
            return
        # Negated so that a nan counts as fallen.
        fallen = not sign * (check - self.best_check) >= -self.min_delta
        self.num_hacked = self.num_hacked + 1 if fallen and proxy > self.best_proxy else 0
        if self.num_hacked >= self.patience:
            self.stopped_at = trainer.global_step
            trainer.should_stop = True
            rank_zero_info(
                f"{self.proxy} has risen from {self.best_proxy:.4g} to {proxy:.4g} since {self.check} was best, and "
                f"{self.check} has gone from {self.best_check:.4g} to {check:.4g}: training stops"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the peak, and the counts since."""
        return {
            "best_check": self.best_check,
            "best_proxy": self.best_proxy,
            "num_hacked": self.num_hacked,
            "stopped_at": self.stopped_at,
            "sums": list(self._sums),
            "num_batches": self._num_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of an earlier run."""
        self.best_check, self.best_proxy = state_dict["best_check"], state_dict["best_proxy"]
        self.num_hacked, self.stopped_at = state_dict["num_hacked"], state_dict["stopped_at"]
        self._sums, self._num_batches = list(state_dict["sums"]), state_dict["num_batches"]
