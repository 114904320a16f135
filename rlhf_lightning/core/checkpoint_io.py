"""Atomic checkpoint files: complete or absent."""

from __future__ import annotations

import os
import time
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from ..utils.files import atomic_file, flush_to_disk


class UnwrittenCheckpointError(ValueError):
    """Raised when a checkpoint could not be written; existing checkpoints are untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in its folder, flushes it to disk and renames it.

    Lightning's default writes to the system's temporary folder and moves the result, which is a copy where that is
    another disk: a process that is killed then leaves half a checkpoint under the final name. Post-training modules
    replace Lightning's default with this class; a custom ``CheckpointIO`` is kept.

    Example::

        lightning.Trainer(plugins=[AtomicCheckpointIO()])  # fit does this by default
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; an existing one of that name is kept until the new one is complete.

        Raises:
            UnwrittenCheckpointError: the file cannot be written, for example on a full disk.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            with atomic_file(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UnwrittenCheckpointError(
                f"cannot write the checkpoint {str(target)!r} ({reason}): free disk space or choose another folder; "
                "checkpoints that were there are untouched"
            ) from error
        flush_to_disk(target.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            ValueError: the file is damaged.
        """
        if "://" not in str(path) and Path(path).is_file() and (reason := damage(path)):
            raise ValueError(
                f"the checkpoint {str(path)!r} is damaged ({reason}): resume from another one; TrainingCheckpoint with "
                "ckpt_path='last' takes the newest complete one"
            )
        place = (lambda storage, _: storage) if map_location is None else map_location
        # By default Lightning unpickles arbitrary objects, code included, from a URL.
        return super().load_checkpoint(path, place, True if weights_only is None else weights_only)


def damage(path: str | Path) -> str | None:
    """Returns the damage that a checkpoint file's checksums show, or ``None`` where it is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if bad is None else f"{bad} does not have its checksum"


def check_place(folder: Path, what: str) -> None:
    """Refuses a folder that cannot be written, before a long run computes its contents.

    Raises:
        ValueError: a file is in its way, or it is read-only.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(
            f"{what} cannot be written to {str(folder)!r}: {str(place)!r} is a file; choose another folder"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{what} cannot be written to {str(folder)!r}: {str(place)!r} is read-only for this user; choose another "
            "folder, or change its permissions"
        )


def prepare_checkpoints(trainer: lightning.Trainer) -> None:
    """Replaces Lightning's default ``CheckpointIO`` with ``AtomicCheckpointIO`` and adapts ``ModelCheckpoint``.

    Hides the warning of ``ModelCheckpoint`` that advises saving the weights from before a manual optimizer step: a
    resumed run needs those after it.
    """
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    for callback in trainer.checkpoint_callbacks:
        # A subclass that overrides the hook keeps its own.
        if isinstance(callback, ModelCheckpoint) and _has_lightnings_trigger(callback):
            vars(callback)["on_train_batch_end"] = partial(_save_when_due, callback)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    vars(trainer)["save_checkpoint"] = partial(_save_heard_by_all, trainer)


def _save_heard_by_all(trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
    """Runs ``Trainer.save_checkpoint`` and raises a write error of one rank on all ranks."""
    cause: UnwrittenCheckpointError | None = None
    try:
        type(trainer).save_checkpoint(trainer, *args, **kwargs)
    except UnwrittenCheckpointError as error:  # on the rank that writes: the others wait at the barrier that follows
        cause = error
        trainer.strategy.barrier("Trainer.save_checkpoint")
    said = trainer.strategy.broadcast(None if cause is None else str(cause))
    if said is not None:
        raise UnwrittenCheckpointError(said) from cause


def _has_lightnings_trigger(callback: ModelCheckpoint) -> bool:
    return type(callback).on_train_batch_end is ModelCheckpoint.on_train_batch_end


def _save_when_due(
    callback: Any, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
) -> None:
    """``ModelCheckpoint.on_train_batch_end`` for batches that make any number of steps.

    Lightning tests whether the number of steps is a multiple of ``every_n_train_steps``, which a batch of several steps
    may skip, and ignores ``train_time_interval`` in manual optimization.
    """
    every, interval = callback._every_n_train_steps, callback._train_time_interval
    due = every >= 1 and trainer.global_step // every > pl_module.resume.step_before_batch // every
    if interval is not None and callback._last_time_checked is not None:
        late = time.monotonic() - callback._last_time_checked >= interval.total_seconds()
        due = trainer.strategy.broadcast(late)  # clocks differ between ranks
    callback._every_n_train_steps = int(due)  # 1: every step is a multiple; 0: off
    try:
        ModelCheckpoint.on_train_batch_end(callback, trainer, pl_module, outputs, batch, batch_idx)
    finally:
        callback._every_n_train_steps = every
