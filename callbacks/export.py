"""Export of a trained model as a plain Hugging Face folder, while training goes on or when it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only

from ..modules import PostTrainingModule


class ModelExport(lightning.Callback):
    """Writes the model and its tokenizer as a folder that ``from_pretrained`` loads.

    The folder appears whole or not at all, and an earlier one stays until then. ``<folder>.json`` beside it says at
    which step it was written, and with which value of the monitored metric.

    Args:
        folder: where to.
        monitor: the logged metric by which the best model is chosen, after each validation; without one, the model is
            written once, when training ends.
        mode: whether more or less of the metric is better.
        merge_adapter: write a LoRA policy as a whole model instead of the adapter alone.

    Example::

        lightning.Trainer(callbacks=[ModelExport("runs/best", monitor="val/loss", mode="min")]).fit(module, data)
    """

    def __init__(
        self,
        folder: str,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        merge_adapter: bool = False,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; it must be max or min")
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.merge_adapter = merge_adapter
        self.best_value: float | None = None
        self.step: int | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the model if it is the best so far; of equals the first is kept."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"monitor is {self.monitor!r}, which is not logged at validation (logged: {logged})")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            return
        if self.best_value is None or (value > self.best_value if self.mode == "max" else value < self.best_value):
            self.best_value = value
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the model as it is at the end, unless a metric has chosen one."""
        if self.monitor is not None and self.best_value is None:
            raise ValueError(
                f"{self.monitor!r} was never measured, so no model was exported: give the datamodule val rows"
            )
        if self.monitor is None:
            self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know so as not to replace a better model."""
        return {"best_value": self.best_value, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where an earlier run was."""
        self.best_value, self.step = state_dict["best_value"], state_dict["step"]

    def _write(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"ModelExport needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        pl_module.save_pretrained(str(self.folder), merge_adapter=self.merge_adapter)
        self.step = trainer.global_step
        self._record()

    @rank_zero_only
    def _record(self) -> None:
        record = {"step": self.step, "monitor": self.monitor, "value": self.best_value}
        partial = self.folder.with_name(f"{self.folder.name}.json.partial")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(self.folder.with_name(f"{self.folder.name}.json"))
