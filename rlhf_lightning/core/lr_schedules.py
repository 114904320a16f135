"""Learning-rate schedules that a YAML can name; transformers' own are functions that need the number of steps."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..utils.validation import check_choice


class WarmupSchedule(LRScheduler):
    r"""Linear warm-up, then a decay to a fraction of the peak.

    .. math:: \eta_t = \eta \cdot \min(1, (t+1)/w) \cdot d\big((t - w) / (T - w)\big)

    Args:
        optimizer: whose learning rates are the peak.
        warmup_steps: w, at least 0; below 1 a fraction of ``total_steps``.
        total_steps: T; ``None`` is filled in by the module with the number of optimizer steps of the run.
        decay: shape of d from 1 to ``min_ratio``: ``cosine``, ``linear`` or ``constant``.
        min_ratio: where the decay ends, in [0, 1].

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = WarmupSchedule(optimizer, warmup_steps=2, total_steps=4, decay="linear")
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step(); schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: float = 0,
        total_steps: int | None = None,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        min_ratio: float = 0.0,
    ) -> None:
        check_choice("decay", decay, ("cosine", "linear", "constant"))
        if warmup_steps < 0:
            raise ValueError(
                f"warmup_steps is {warmup_steps}; it must be at least 0 (below 1: a fraction of all steps)"
            )
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio is {min_ratio}; it must lie in [0, 1]")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay
        self.min_ratio = min_ratio
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position without the length, which a resumed run may change."""
        return {name: value for name, value in super().state_dict().items() if name != "total_steps"}

    def set_total_steps(self, total_steps: int) -> None:
        """Sets the length of the run, and recomputes the first step's rate, which was set before it was known."""
        self.total_steps = total_steps
        if self.last_epoch == 0:
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = self.get_lr()

    def _factor(self, step: int) -> float:
        total = self.total_steps
        warmup = self.warmup_steps
        if 0 < warmup < 1:
            warmup = warmup * (total or 0)
        # The first step has a rate above 0.
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        if total is None or self.decay == "constant":
            return 1.0

        # From 1 at the end of the warm-up to 0 at the last step.
        progress = min(1.0, max(0.0, (step - warmup) / max(1.0, total - warmup)))
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * fall

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rates of the current step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]
