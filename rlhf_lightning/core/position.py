"""Where a run is in its data, and how Lightning's loops are put back there.

A position is an epoch, the batches of it that are done, and what of their end is still to come: the validation after
the last one, the end of the epoch. Lightning's counters say all of that but the validation, in a form of its own for
every hook that can save a checkpoint; several of these forms make a resumed run leave out a validation, end an epoch
twice, or take an epoch that ``max_steps`` cut short for a whole one. So whatever was saved is brought into one form.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.pytorch.loops.evaluation_loop import RestartStage

from .resume import ResumableModule, random_state

_EPOCHS = "epoch_progress"
_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_PENDING = "validation_pending"


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Args:
        epoch: the epoch of the last batch that is done, from 0.
        batches: how many of its batches are done.
        all_done: they are all that it has.
        ended: the epoch has ended, its hooks included.
        validation_pending: the validation after the last batch has not been run to its end.
    """

    epoch: int
    batches: int
    all_done: bool
    ended: bool
    validation_pending: bool


def settle_loops(state: dict[str, Any], *, validation_pending: bool) -> Position:
    """Brings the saved state of Lightning's fit loop into one form, in place, and returns its position.

    Args:
        state: ``checkpoint["loops"]["fit_loop"]``, saved by whatever hook.
        validation_pending: whether a validation was due after the last batch that had not ended.
    """
    epochs, batches = state[_EPOCHS], state[_BATCHES]
    current, count, all_done = epochs["current"], batches["current"]["processed"], batches["is_last_batch"]
    ended = current["started"] == current["processed"] and (all_done or not count)
    # An epoch is counted where the batches stop, also if it is `max_steps` that stops them.
    cut_short = current["started"] == current["processed"] and not ended
    epoch = current["processed"] - (1 if cut_short or ended else 0)

    for progress in (epochs["current"], epochs["total"]):
        progress["ready"] = progress["started"] = epoch + 1
        progress["processed"] = progress["completed"] = epoch + ended
    for progress in (batches["current"], batches["total"]):
        progress["ready"] = progress["started"] = progress["completed"] = progress["processed"]
    if validation_pending:
        validation = state[_VALIDATION]
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["is_last_batch"] = False
    # By which loggers count: a batch counts once its validation is over.
    counted = batches["total"]["processed"] - (0 if all_done and not validation_pending else 1)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = counted
    return Position(epoch, count, all_done, ended, validation_pending)


def validation_is_due(trainer: lightning.Trainer) -> bool:
    """Whether validation rows are scored after the batch that is ending, were it not the last one of the run."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not sum(loop.val_loop._max_batches or ()):
        return False
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = should_stop


def set_up_validation(trainer: lightning.Trainer) -> None:
    """Makes the validation batches known, as Lightning does where the first epoch is one that is validated."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation and loop._combined_loader is None:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True


def has_validation(trainer: lightning.Trainer) -> bool:
    """Whether a run has validation rows; every rank calls it, when training starts."""
    set_up_validation(trainer)
    return trainer.enable_validation and sum(trainer.fit_loop.epoch_loop.val_loop._max_batches or ()) > 0


class ResumePosition(lightning.Callback):
    """Saves what Lightning's counters do not say of a run's position, and puts its loops back there.

    Every post-training module brings it along; it works for all callbacks that make checkpoints.
    """

    def __init__(self) -> None:
        self._before_validation: dict[str, Any] | None = None  # while one is due or runs: how it was counted before
        self._resumed: Position | None = None

    # Saving.

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes note of the state to which a run returns that is stopped in the validation that follows."""
        assert isinstance(pl_module, ResumableModule)
        self._before_validation = pl_module.random_before_validation = None
        if validation_is_due(trainer):
            self._before_validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
            pl_module.random_before_validation = random_state(pl_module.device)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes note that the validation has been run."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            assert isinstance(pl_module, ResumableModule)
            self._before_validation = pl_module.random_before_validation = None

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation after the last batch is still to come."""
        return {_PENDING: self._before_validation is not None}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts no batches of a validation that will be run again."""
        if self._before_validation is not None:
            checkpoint["loops"]["fit_loop"][_VALIDATION] = deepcopy(self._before_validation)

    # Resuming.

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Settles the loops' state before they load it."""
        self._resumed = None
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            pending = checkpoint["callbacks"].get(self.state_key, {}).get(_PENDING, False)
            self._resumed = settle_loops(checkpoint["loops"]["fit_loop"], validation_pending=pending)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tells the loops what comes next, which Lightning would guess from the counters."""
        loop = trainer.fit_loop.epoch_loop
        set_up_validation(trainer)
        position = self._resumed
        if position is None:
            return
        if position.validation_pending and not validation_is_due(trainer):
            position = self._resumed = Position(position.epoch, position.batches, position.all_done, False, False)
        if position.validation_pending:
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        elif position.ended:
            self._begin_epoch(trainer)
        elif position.all_done:
            loop.val_loop._has_run = True  # the epoch's batches are done: straight to its end

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins an epoch after the end of another that a resumed run had only to end."""
        position, self._resumed = self._resumed, None
        if position is not None and position.all_done and not position.ended:
            assert trainer.fit_loop._data_fetcher is not None
            trainer.fit_loop._data_fetcher.fetched -= position.batches  # they were the last epoch's
            self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: lightning.Trainer) -> None:
        """Makes the next epoch one like any other, with the iterator that setting up has made: a stream has begun."""
        loop = trainer.fit_loop
        loop._restarting = loop.epoch_loop.restarting = False
        loop._resuming_from_checkpoint = True
