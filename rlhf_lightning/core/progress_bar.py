"""What a run shows on the screen: no advice that is none here, and a progress bar of one line."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar

from ..utils.quiet import ignore_warnings

_NARROW = 120  # columns below which the bar gives up its speed and most of its length
_WITHOUT_METRICS = 56  # columns that the rest of a narrow bar takes


class OneLineProgressBar(RichProgressBar):
    """Lightning's bar in one line, also of 80 columns: metrics by their last names, three digits, as many as fit."""

    @property
    def _width(self) -> int:
        return int(getattr(getattr(self, "_console", None), "width", 80))

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Any:
        """The metrics to show: ``loss: 0.693`` for ``train/loss``."""
        narrow = self._width < _NARROW
        room = self._width - _WITHOUT_METRICS if narrow else self._width - _NARROW + 24
        kept: dict[str, Any] = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            if name == "v_num":
                continue
            short = name.rpartition("/")[2] if name.startswith("train/") else name
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            room -= len(f"{short}: {shown} ")
            if room < 0:
                break
            kept[short] = shown
        return kept

    def configure_columns(self, trainer: lightning.Trainer) -> list[Any]:
        """The columns beside the metrics."""
        columns = super().configure_columns(trainer)
        if self._width >= _NARROW:
            return columns
        for column in columns:
            if hasattr(column, "bar_width"):
                column.bar_width = 10
        return [column for column in columns if type(column).__name__ != "ProcessingSpeedColumn"]

    def _get_train_description(self, current_epoch: int) -> str:
        most = self.trainer.max_epochs
        return f"Epoch {current_epoch}" + (f"/{most - 1}" if most is not None and most > 0 else "")


def prepare_screen(trainer: Any) -> None:
    """Hides advice that is none for these modules, and makes Lightning's own bar fit into a line.

    A bar of another class, which somebody has chosen, stays as it is.
    """
    ignore_warnings()
    for callback in trainer.callbacks:
        if type(callback) is RichProgressBar:
            callback.__class__ = OneLineProgressBar
