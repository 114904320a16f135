"""Console output of a run: hidden warnings that do not apply, and a progress bar of one line."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar

from ..utils.quiet import ignore_warnings

_NARROW = 120  # columns below which the bar drops its speed and most of its length
_WITHOUT_METRICS = 56  # columns of a narrow bar without metrics


class OneLineProgressBar(RichProgressBar):
    """Lightning's progress bar in one line of 80 columns or more: short names, three digits, as many as fit."""

    @property
    def _width(self) -> int:
        return int(getattr(getattr(self, "_console", None), "width", 80))

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Any:
        """Returns the metrics to show: ``loss: 0.693`` for ``train/loss``."""
        narrow = self._width < _NARROW
        # The width that the other columns leave; metrics are added as long as they fit.
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
        """Returns the bar's columns; a narrow bar is shorter and shows no speed."""
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
    """Hides warnings that do not apply to these modules, and makes Lightning's default bar fit into one line.

    A progress bar of another class is left unchanged.
    """
    ignore_warnings()
    for callback in trainer.callbacks:
        if type(callback) is RichProgressBar:
            callback.__class__ = OneLineProgressBar
