"""Rows of a validation or test set, collected batch by batch and evaluated as a whole."""

from __future__ import annotations

import warnings
from typing import Any

from ..distributed.collectives import Metrics, Rows, concatenate
from .logging import log_values

_STEPS = {"val": "validation_step", "test": "test_step"}


class ValidationRows:
    """Keeps the rows of each data loader until the epoch ends, so that no metric depends on how a set is batched.

    Args:
        module: a ``PostTrainingModule``, whose ``summarize`` computes loss and metrics.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.clear()

    def clear(self) -> None:
        """Discards the rows of an interrupted run."""
        self._rows: dict[int, list[Rows]] = {}
        self._normalizers: dict[int, dict[str, float]] = {}

    def add(self, loader: int, rows: Rows, normalizers: dict[str, float] | None = None) -> None:
        """Adds the rows of a batch of a data loader, and its normalizers."""
        self._rows.setdefault(loader, []).append(rows)
        counts = self._normalizers.setdefault(loader, {})
        for name, count in (normalizers or {}).items():
            counts[name] = counts.get(name, 0.0) + count

    def log(self, stage: str, num_loaders: int) -> None:
        """Logs the loss and metrics of each data loader, and warns about one without rows."""
        for suffix, values in self.summaries(num_loaders).items():
            if values:
                log_values(self.module, stage, values, suffix=suffix)
            elif _STEPS[stage] in self.module.hooks_reached:  # otherwise a subclass has overridden the step
                warnings.warn(f"the {stage} set has no rows: nothing is logged for it", stacklevel=2)

    def summaries(self, num_loaders: int) -> dict[str, Metrics]:
        """Computes loss and metrics of each data loader, by the end of their logged names, and discards the rows."""
        rows, normalizers = self._rows, self._normalizers
        self.clear()
        return {
            f"/dataloader_idx_{loader}" if num_loaders > 1 else "": self.module.summarize(
                concatenate(rows.get(loader, [])), normalizers.get(loader, {})
            )
            for loader in range(num_loaders)
        }
