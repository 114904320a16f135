"""Checkpoints from which a killed run resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..core.checkpoint_io import check_place, damage
from ..core.position import validation_is_due
from ..core.rewind import is_rewound
from ..utils.files import PARTIAL, hold, on_first_rank, release

_PREFIX = "step="


class TrainingCheckpoint(ModelCheckpoint):
    """Saves the whole state of training every so many optimizer steps, and finds the newest complete checkpoint.

    ``fit --ckpt_path last`` (``Trainer.fit(..., ckpt_path="last")``) continues from the complete checkpoint of the
    latest step in the folder, and starts from the beginning without one: the same command starts a run and
    continues it.

    Lightning's ``ModelCheckpoint(monitor="val/loss", save_top_k=3)`` keeps the best models as well. With
    ``every_n_train_steps`` it has gaps that this one closes. A batch that makes several optimizer steps can skip every
    multiple. It saves before the validation of the same step, so that a monitored metric is that of the previous
    validation. And ``ckpt_path="last"`` loads the file with the newest date, damaged or not.

    A checkpoint is also made when training ends, and at the end of the batch (of training or validation) in which
    SIGTERM, Ctrl-C or SIGUSR1 arrives.

    Args:
        folder: destination of the checkpoints, ``step=<number>.ckpt``; one folder for each run.
        every_n_steps: optimizer steps between two checkpoints, at least 1; made at the end of a batch.
        every_minutes: also save when so many minutes have passed, above 0.
        keep: number of newest checkpoints to keep, at least 1; older ones serve if the newest is damaged.

    Raises:
        ValueError: a number out of range; when resuming, a folder in which every checkpoint is damaged; when
            validating, testing or predicting with ``ckpt_path="last"``, one without checkpoints.

    Example::

        checkpoint = TrainingCheckpoint("runs/dpo/checkpoints", every_n_steps=100)
        lightning.Trainer(callbacks=[checkpoint], max_steps=1000).fit(module, data, ckpt_path="last")
    """

    def __init__(
        self, folder: str, every_n_steps: int = 100, every_minutes: float | None = None, keep: int = 2
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes is {every_minutes!r}; it must be above 0 (null goes by steps alone)")
        # save_top_k=-1 keeps Lightning from deleting: this class deletes, and only what the run has made.
        super().__init__(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=every_n_steps)
        self.folder = Path(self.dirpath or folder)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self._last_step = 0
        self._last_time = 0.0
        self._made: set[str] = set()

    @property
    def state_key(self) -> str:
        """Distinguishes this callback's state from that of another folder."""
        return self._generate_state_key(folder=self.folder.name)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks that the folder can be written, locks it, and removes unfinished files of a killed run."""
        if stage == "fit" and not getattr(trainer, "fast_dev_run", False):
            on_first_rank(self._prepare_folder)

    def _prepare_folder(self) -> None:
        check_place(self.folder, "checkpoints")
        hold(self.folder)
        for leftover in self.folder.glob(f".{_PREFIX}*{PARTIAL}"):
            leftover.unlink(missing_ok=True)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses a folder with checkpoints of another run, which this one would replace.

        Raises:
            ValueError: there are such checkpoints.
        """
        if not trainer.strategy.restore_checkpoint_after_setup:  # otherwise the resumed step is not known yet
            self._refuse_others(trainer)

    def _refuse_others(self, trainer: lightning.Trainer) -> None:
        resumed, step = trainer.ckpt_path, trainer.global_step
        if not getattr(trainer, "fast_dev_run", False):
            on_first_rank(lambda: self._check_others(None if resumed is None else Path(resumed), step))

    def _check_others(self, resumed: Path | None, step: int) -> None:
        found = self._by_step()
        goes_on = resumed is not None and resumed.expanduser().resolve().parent == self.folder.resolve()
        if found and not goes_on:
            raise ValueError(
                f"{str(self.folder)!r} holds checkpoints of another run (the newest: {found[-1].name}), which this one "
                "would replace: resume it with ckpt_path='last' (--ckpt_path=last), or choose another folder"
            )
        for path in found:
            later = _step(path) > max(step, _step(Path(resumed or "")))
            if later and path.name not in self._made and not (path.is_file() and damage(path)):
                raise ValueError(
                    f"{str(path)!r} was not made by this run, which would replace it at that step: move it away"
                )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Lets other runs write to the folder."""
        release(self.folder)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts counting at the first step of this run."""
        self._last_step, self._last_time = trainer.global_step, time.monotonic()
        if not is_rewound(trainer):  # then the checkpoints that are there are its own
            self._refuse_others(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if a checkpoint is due, unless validation comes before the next batch."""
        if trainer.received_sigterm or not validation_is_due(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Saves if a checkpoint is due, with the state of the other callbacks after the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Saves the final state, so that a run with more steps can continue."""
        if trainer.global_step > self._last_step:
            self._save(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Saves after a signal, which takes effect between batches; other errors may occur in the middle of one."""
        if isinstance(exception, SIGTERMException) and trainer.global_step > self._last_step:
            self._save(trainer)
        if isinstance(exception, SIGTERMException | KeyboardInterrupt) and self.last_model_path:
            rank_zero_info(
                f"{self.last_model_path!r} holds the whole run up to step {self._last_step}: the same command with "
                "--ckpt_path=last (in Python, fit(..., ckpt_path='last')) continues from there"
            )
        release(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """Returns the checkpoints that the run has made: it deletes no others."""
        return {"made": sorted(self._made)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopts the checkpoints of the resumed run."""
        self._made |= set(state_dict.get("made", ()))

    def newest(self) -> Path | None:
        """Finds the newest complete checkpoint; ``None`` without a checkpoint.

        Raises:
            ValueError: all checkpoints are damaged.
        """
        found = self._by_step()
        for path in reversed(found):
            # Checksums find a file that a killed machine has not written completely.
            reason = damage(path) if path.is_file() else None
            if reason is None:
                return path
            rank_zero_warn(f"the checkpoint {str(path)!r} is damaged ({reason}): the one before it is taken")
        if found:
            raise ValueError(
                f"all {len(found)} checkpoints in {str(self.folder)!r} are damaged: delete them to start from the "
                "beginning"
            )
        return None

    def steps(self) -> list[int]:
        """Lists the steps of the finished checkpoints in the folder, in order."""
        return [_step(path) for path in self._by_step()]

    def _find_last_checkpoints(self, trainer: lightning.Trainer) -> set[str]:
        """Returns Lightning's candidates for ``ckpt_path="last"``, which it ignores if the list is empty."""
        newest = self.newest()
        if newest is None and trainer.state.fn != "fit" and len(trainer.checkpoint_callbacks) == 1:
            raise ValueError(
                f"ckpt_path is 'last', and there is no checkpoint in {str(self.folder)!r}: name one, or remove it "
                "to measure the model that the configuration names"
            )
        return set() if newest is None else {str(newest)}

    def _by_step(self) -> list[Path]:
        """Lists finished checkpoints by step; the last written file of a sharded one is ``meta.pt``."""
        found = [p for p in self.folder.glob(f"{_PREFIX}*.ckpt") if p.is_file() or (p / "meta.pt").is_file()]
        return sorted((path for path in found if _step(path) >= 0), key=_step)

    def _save_if_due(self, trainer: lightning.Trainer) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if step == self._last_step:
            return
        # The last step is saved here, before Lightning counts an epoch that it cuts short as complete.
        due = step // every > self._last_step // every or trainer.received_sigterm or self._is_last(trainer)
        if self.every_minutes is not None:
            late = (time.monotonic() - self._last_time) / 60 >= self.every_minutes
            due |= trainer.strategy.broadcast(late)  # clocks differ between ranks
        if due:
            self._save(trainer)

    def _is_last(self, trainer: lightning.Trainer) -> bool:
        return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step

    def _save(self, trainer: lightning.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):  # a trial run writes and deletes nothing
            return
        self._last_step, self._last_time = trainer.global_step, time.monotonic()
        path = self.folder / f"{_PREFIX}{trainer.global_step}.ckpt"
        self.last_model_path = self.best_model_path = str(path)
        if trainer.is_global_zero and path.is_file() and path.name not in self._made:
            path.rename(path.with_name(f"{path.name}.damaged"))  # of another run, which cannot be resumed from it
        self._made.add(path.name)
        self._save_checkpoint(trainer, str(path))
        # After the new one is complete, so that there is always one.
        if trainer.is_global_zero:
            others = [other for other in self._by_step() if other != path and other.name in self._made]
            for old in others[: -self.keep + 1 or None]:
                trainer.strategy.remove_checkpoint(old)
                self._made.discard(old.name)


def _step(path: Path) -> int:
    """Reads the step from a checkpoint's name; -1 without one."""
    number = path.name.removeprefix(_PREFIX).removesuffix(".ckpt")
    return int(number) if number.isdecimal() else -1


def check_last(trainer: lightning.Trainer, subcommand: str) -> None:
    """Refuses ``ckpt_path="last"`` without a checkpoint, for commands that do not train.

    Raises:
        ValueError: no callback of the trainer finds a checkpoint.
    """
    makers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not any(maker._find_last_checkpoints(trainer) for maker in makers):
        raise ValueError(
            f"ckpt_path is 'last', and {subcommand} finds no checkpoint of the callbacks that are configured: name a "
            "file, or remove it to measure the model that the configuration names"
        )


def check_enabled(enabled: bool | None, callbacks: Iterable[Any]) -> None:
    """Refuses callbacks that make checkpoints if checkpointing is disabled in the trainer.

    Args:
        enabled: the trainer's ``enable_checkpointing``; ``None`` is Lightning's default, which is true.
        callbacks: the trainer's.

    Raises:
        ValueError: it is false, and one of the callbacks makes checkpoints.

    Example:
        >>> check_enabled(False, [TrainingCheckpoint("runs/dpo/checkpoints")])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: trainer.enable_checkpointing is false, and TrainingCheckpoint makes checkpoints: write ...
    """
    makers = sorted({type(callback).__name__ for callback in callbacks if isinstance(callback, Checkpoint)})
    if makers and enabled is not None and not enabled:
        what = f"{makers[0]} makes" if len(makers) == 1 else f"{' and '.join(makers)} make"
        raise ValueError(
            f"trainer.enable_checkpointing is false, and {what} checkpoints: write --trainer.enable_checkpointing=true "
            "(in YAML, enable_checkpointing: true under trainer), or remove the callback"
        )
