"""The position of a run in its data, and restoring Lightning's loops to it.

A position is an epoch, the number of its finished batches, and whether the validation after the last batch and the end
of the epoch are still to come. Lightning's counters hold all of that except the validation, in a form that depends on
the hook that saved the checkpoint; several of these forms make a resumed run skip a validation, end an epoch twice, or
treat an epoch that ``max_steps`` cut short as complete. So saved counters are normalised to one form.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.pytorch.loops.evaluation_loop import RestartStage

from .resume import random_state

_EPOCHS = "epoch_progress"
_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_PENDING = "validation_pending"


@dataclass(frozen=True)
class Position:
    """Position of a run.

    Args:
        epoch: epoch of the last finished batch, from 0.
        batches: number of its finished batches.
        all_done: whether these are all batches of the epoch.
        ended: whether the epoch has ended, including its hooks.
        validation_pending: whether the validation after the last batch is still to be run or finished.
    """

    epoch: int
    batches: int
    all_done: bool
    ended: bool
    validation_pending: bool


def settle_loops(state: dict[str, Any], *, validation_pending: bool) -> Position:
    """Normalises the saved state of Lightning's fit loop in place, and returns its position.

    Args:
        state: ``checkpoint["loops"]["fit_loop"]``, saved in any hook.
        validation_pending: whether a validation was due after the last batch and had not ended.
    """
    epochs, batches = state[_EPOCHS], state[_BATCHES]
    current, count, all_done = epochs["current"], batches["current"]["processed"], batches["is_last_batch"]
    ended = current["started"] == current["processed"] and (all_done or not count)
    # Lightning counts an epoch as processed when its batches stop, even if `max_steps` stops them.
    cut_short = current["started"] == current["processed"] and not ended
    epoch = current["processed"] - (1 if cut_short or ended else 0)

    # The same counters for the running epoch and for the whole run.
    for progress in (epochs["current"], epochs["total"]):
        progress["ready"] = progress["started"] = epoch + 1
        progress["processed"] = progress["completed"] = epoch + ended
    for progress in (batches["current"], batches["total"]):
        progress["ready"] = progress["started"] = progress["completed"] = progress["processed"]

    # A validation that was interrupted begins again.
    if validation_pending:
        validation = state[_VALIDATION]
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["is_last_batch"] = False
    # The step of loggers: a batch counts once its validation is over.
    counted = batches["total"]["processed"] - (0 if all_done and not validation_pending else 1)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = counted
    return Position(epoch, count, all_done, ended, validation_pending)


def validation_is_due(trainer: lightning.Trainer) -> bool:
    """Returns whether validation is due after the batch that is ending, ignoring ``trainer.should_stop``."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not sum(loop.val_loop._max_batches or ()):
        return False
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = should_stop


def set_up_validation(trainer: lightning.Trainer) -> None:
    """Sets up the validation data loaders, as Lightning does where the first epoch is validated."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation and loop._combined_loader is None:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True


def has_validation(trainer: lightning.Trainer) -> bool:
    """Returns whether a run has validation rows; every rank calls it when training starts."""
    set_up_validation(trainer)
    return trainer.enable_validation and sum(trainer.fit_loop.epoch_loop.val_loop._max_batches or ()) > 0


class ResumePosition(lightning.Callback):
    """Saves the part of a run's position that Lightning's counters lack, and restores its loops to it.

    Added automatically by every post-training module; works for all callbacks that save checkpoints.
    """

    def __init__(self) -> None:
        self._before_validation: dict[str, Any] | None = None  # its progress before, while a validation is due or runs
        self._resumed: Position | None = None
        self._fetcher: Any = None  # that of the epoch in which a run is resumed

    # Saving.

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the state that a run stopped during the following validation returns to."""
        resume: Any = pl_module.resume
        self._before_validation = resume.random_before_validation = None
        if validation_is_due(trainer):
            self._before_validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
            resume.random_before_validation = random_state(pl_module.device)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Records that the validation has finished."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            resume: Any = pl_module.resume
            self._before_validation = resume.random_before_validation = None

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the validation after the last batch is still to come."""
        return {_PENDING: self._before_validation is not None}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Removes the progress of a validation that will be run again from the saved counters."""
        if self._before_validation is not None:
            checkpoint["loops"]["fit_loop"][_VALIDATION] = deepcopy(self._before_validation)

    # Resuming.

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Normalises the loops' state before they load it."""
        self._resumed = None
        # Of a validation that a rewound run has left.
        resume: Any = pl_module.resume
        self._before_validation = resume.random_before_validation = None
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            pending = checkpoint["callbacks"].get(self.state_key, {}).get(_PENDING, False)
            self._resumed = settle_loops(checkpoint["loops"]["fit_loop"], validation_pending=pending)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Sets where the loops continue, which Lightning would guess from the counters."""
        loop = trainer.fit_loop.epoch_loop
        set_up_validation(trainer)
        position, self._fetcher = self._resumed, trainer.fit_loop._data_fetcher
        if position is None:
            return
        # Due when saved and no longer due, since this run validates at other intervals.
        if position.validation_pending and not validation_is_due(trainer):
            position = self._resumed = Position(position.epoch, position.batches, position.all_done, False, False)
        if position.validation_pending:
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        elif position.ended:
            self._begin_epoch(trainer)
        elif position.all_done:
            loop.val_loop._has_run = True  # the epoch's batches are done: continue with its end

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins the next epoch after a resumed run has only ended the previous one."""
        position, self._resumed = self._resumed, None
        if position is not None and position.all_done and not position.ended:
            # It has counted the last epoch's batches, unless this epoch has other rows and a fetcher of its own.
            fetcher: Any = trainer.fit_loop._data_fetcher
            if fetcher is self._fetcher:
                fetcher.fetched -= position.batches
            self._begin_epoch(trainer)
        self._fetcher = None

    def _begin_epoch(self, trainer: lightning.Trainer) -> None:
        """Makes the next epoch a regular one that keeps the existing iterator, as a stream has already begun."""
        loop = trainer.fit_loop
        loop._restarting = loop.epoch_loop.restarting = False
        loop._resuming_from_checkpoint = True
