"""What of a training step is logged: its own values, and none of an earlier step."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import lightning

_STEP = "training_step"


def forget_others(trainer: lightning.Trainer, names: Container[str]) -> None:
    """Takes values of earlier training steps out of what Lightning is about to log as this one's.

    Lightning keeps everything that was logged within an epoch, and hands it to the loggers with every step until it is
    logged anew. A metric that a batch cannot say anything about (rewards of rejected completions, where there are none)
    would so repeat its last value; and a resumed run, which has none to repeat, would log something else than the run
    that was not interrupted. What callbacks monitor (``trainer.callback_metrics``) keeps the last value.

    Args:
        trainer: in the middle of a training step.
        names: what the step logs itself.
    """
    results: Any = trainer._results
    for result in (results or {}).values():
        if result.meta.fx == _STEP and result.meta.name.startswith("train/") and result.meta.name not in names:
            result.reset()
