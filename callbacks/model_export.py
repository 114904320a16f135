"""Exports a trained model as a plain Hugging Face folder, during training or at its end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Literal, cast

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.loggers import WandbLogger

from ..core import PostTrainingModule
from ..core.checkpoint_io import check_place
from ..core.exports import check_merge
from ..core.position import has_validation
from ..metrics.direction import direction_of
from ..utils.files import PARTIAL, REPLACED, hold, is_record, on_first_rank, release, write_atomically
from ..utils.folders import recover

_RECORDED = {"step", "monitor", "value"}  # exactly the keys of an export's record


class ModelExport(lightning.Callback):
    """Writes the model and its tokenizer as a folder that ``from_pretrained`` loads.

    The folder appears whole or not at all, and an earlier one stays until then; remains of a killed run are removed
    when the next one starts. ``<folder>.json`` next to it records the step at which it was written and the value of
    the monitored metric. A trainer may have several of these callbacks, each with its own folder.

    Args:
        folder: destination; ``{step}`` in its name becomes the number of optimizer steps, so that every export stays.
        monitor: the logged metric by which the best model is chosen, after each validation; without one, the model is
            written when training ends.
        mode: whether more (``max``) or less (``min``) of the metric is better; if omitted, derived from its name,
            such as ``val/loss`` or ``val/accuracy``.
        merge_adapter: write a LoRA policy as a whole model instead of the adapter alone.
        critic_folder: also write the critic of PPO, whenever the model is written, as a value model that
            ``ValueScorer`` loads; ``{step}`` as in ``folder``.
        every_n_steps: also write it every so many optimizer steps, at least 1; not with ``monitor``.
        log_artifact: also log every written folder to W&B, as a version of an artifact of type ``model`` with the
            aliases ``latest`` and ``step-<number>``; offline it is copied and uploaded by ``wandb sync``.

    Raises:
        ValueError: options that contradict each other; in training, a metric that is not logged.

    Example::

        lightning.Trainer(callbacks=[ModelExport("runs/best", monitor="val/loss", mode="min")]).fit(module, data)
    """

    def __init__(
        self,
        folder: str,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        merge_adapter: bool = False,
        every_n_steps: int | None = None,
        log_artifact: bool = False,
        critic_folder: str | None = None,
    ) -> None:
        if mode not in ("max", "min", None):
            raise ValueError(
                f"mode is {mode!r}; it must be max or min, or null for the direction that monitor suggests"
            )
        if every_n_steps is not None and (
            isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1
        ):
            raise ValueError(f"every_n_steps is {every_n_steps!r}; it must be a whole number of at least 1, or null")
        if every_n_steps is not None and monitor is not None:
            raise ValueError(
                f"every_n_steps is {every_n_steps} and monitor is {monitor!r}: remove one of them, or use two "
                "ModelExport callbacks with a folder each"
            )
        self.folder = Path(folder).expanduser()
        self.critic_folder = None if critic_folder is None else Path(critic_folder).expanduser()
        if self.critic_folder == self.folder:
            raise ValueError(f"critic_folder is {critic_folder!r}, and so is folder: give the critic one of its own")
        self.monitor = monitor
        self.mode = direction_of(monitor) if mode is None and monitor is not None else mode
        self.merge_adapter = merge_adapter
        self.every_n_steps = every_n_steps
        self.log_artifact = log_artifact
        self.best_value: float | None = None
        self.step: int | None = None
        self._last_step = 0

    @property
    def state_key(self) -> str:
        """Distinguishes the state of several of these callbacks."""
        return self._generate_state_key(folder=str(self.folder), monitor=self.monitor, mode=self.mode)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks that the folder can be written, locks it, and removes remains of a killed run."""
        if stage == "fit" and not _is_trial(trainer):
            on_first_rank(self._prepare_place)

    def _prepare_place(self) -> None:
        check_place(self.folder.parent, "the model")
        # A second run that writes here fails at its start, not at its end.
        hold(self.folder)
        for place in self._places(rf"\.%s({re.escape(REPLACED)}|{re.escape(PARTIAL)})"):
            recover(place.expanduser().absolute())

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses, before training, an export over a foreign folder or one that cannot be merged."""
        if isinstance(pl_module, PostTrainingModule) and not _is_trial(trainer):
            if self.merge_adapter:
                check_merge(pl_module)
            self._check_critic(pl_module, trainer.global_step)
            on_first_rank(lambda: self._check_places(pl_module, trainer.global_step))

    def _check_critic(self, module: PostTrainingModule, step: int) -> None:
        if self.critic_folder is None:
            return
        check = getattr(module, "check_critic_export", None)
        if check is None:
            raise ValueError(
                f"critic_folder is {str(self.critic_folder)!r}, and {type(module).__name__} has no critic: remove it, "
                "or train with PPOModule"
            )
        module.configure_model()
        place = self._at(self.critic_folder, step)
        on_first_rank(lambda: check(str(place), merge_adapter=self.merge_adapter))

    def _places(self, form: str, after: int = -1) -> list[Path]:
        """Lists folders of this export: with ``{step}``, those of later steps that have a file named after them."""
        start, numbered, end = self.folder.name.partition("{step}")
        if not numbered:
            return [self.folder]
        # Digits alone: another run may export to folders whose names begin alike.
        pattern = re.compile(form % rf"{re.escape(start)}(\d+){re.escape(end)}")
        found = [pattern.fullmatch(path.name) for path in self.folder.expanduser().parent.glob("*")]
        numbers = sorted({int(match[1]) for match in found if match is not None})
        return [self.folder.with_name(f"{start}{n}{end}") for n in numbers if n > after]

    def _check_places(self, module: PostTrainingModule, step: int) -> None:
        # With {step} in the name, later steps of this run would replace these folders.
        for place in self._places(r"%s(\.json)?", after=step):
            module.check_export(str(place), merge_adapter=self.merge_adapter)
            record = place.with_name(f"{place.name}.json")
            if record.exists() and not is_record(record, _RECORDED):
                raise ValueError(
                    f"{str(record)!r} already exists and was not written by ModelExport, which would replace it: "
                    "move it away, or choose another folder"
                )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts counting at the first step of this run.

        Raises:
            ValueError: ``monitor`` is set without validation rows.
        """
        self._last_step = trainer.global_step
        if self.monitor is not None and not has_validation(trainer):
            raise ValueError(
                f"monitor is {self.monitor!r}, and there are no validation rows to measure it on: set the "
                "datamodule's val, or remove monitor to export the model of the last step"
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the model if the batch has passed a multiple of ``every_n_steps``."""
        every = self.every_n_steps
        if every is not None and trainer.global_step // every > self._last_step // every:
            self._write(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the model if it is the best so far; a tie keeps the earlier one."""
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
        """Writes the final model, unless a metric has chosen one."""
        # A metric that was never measured must not leave the user without a model.
        if self.monitor is not None and self.best_value is None:
            rank_zero_warn(
                f"{self.monitor!r} was never measured in {trainer.global_step} steps: the model is exported as it is "
                "now; validate more often (trainer.val_check_interval)"
            )
            self._write(trainer, pl_module)
        if self.monitor is None and self.step != trainer.global_step:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the model of a run that was killed after its last step and resumed with nothing left to train."""
        if self.monitor is None and not (self.step == trainer.global_step and self._place(trainer).is_dir()):
            self._write(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Lets other runs write to the folder."""
        release(self.folder)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Lets other runs write to the folder."""
        release(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """Returns best value and step, so that a resumed run does not replace a better model."""
        return {"best_value": self.best_value, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of an earlier run."""
        self.best_value, self.step = state_dict["best_value"], state_dict["step"]

    def _place(self, trainer: lightning.Trainer) -> Path:
        return self._at(self.folder, trainer.global_step)

    @staticmethod
    def _at(folder: Path, step: int) -> Path:
        return Path(str(folder).replace("{step}", str(step)))

    def _write(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"ModelExport needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        if _is_trial(trainer):
            return
        folder = self._place(trainer)
        folder.parent.mkdir(parents=True, exist_ok=True)
        pl_module.save_pretrained(str(folder), merge_adapter=self.merge_adapter)
        if self.critic_folder is not None:
            critic = self._at(self.critic_folder, trainer.global_step)
            cast(Any, pl_module).save_critic(str(critic), merge_adapter=self.merge_adapter)
        self.step = trainer.global_step
        on_first_rank(lambda: self._record(trainer, folder))

    def _record(self, trainer: lightning.Trainer, folder: Path) -> None:
        record = {"step": self.step, "monitor": self.monitor, "value": self.best_value}
        write_atomically(folder.with_name(f"{folder.name}.json"), json.dumps(record) + "\n")
        for logger in trainer.loggers if self.log_artifact else ():
            if isinstance(logger, WandbLogger):
                self._log_artifact(logger, folder, record)

    def _log_artifact(self, logger: WandbLogger, folder: Path, record: dict[str, Any]) -> None:
        import wandb  # installed if its logger is used

        run: Any = logger.experiment
        # W&B allows letters, digits and a few signs in names.
        name = re.sub(r"[^\w.-]+", "-", self.folder.name.replace("{step}", "")).strip("-_.") or "model"
        artifact = wandb.Artifact(f"{name}-{run.id}", type="model", metadata=record)
        artifact.add_dir(str(folder))
        run.log_artifact(artifact, aliases=["latest", f"step-{self.step}"])


def _is_trial(trainer: Any) -> bool:
    """Tells whether the trainer is in a trial run (``fast_dev_run``), which writes and deletes nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))
