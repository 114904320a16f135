"""Takes a run back to one of its own checkpoints without leaving ``fit``, as exactly as a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.trainer.states import RunningStage


class Rewind(Exception):
    """Leaves Lightning's loops, wherever a hook raises it, to continue from a checkpoint; all ranks raise it together.

    First, ``before_rewind(trainer)`` is called of all callbacks that have it: what a callback has changed outside of
    itself is as in a new process then. Module, datamodule, callbacks, optimizers and loops are restored after that.

    Args:
        path: the checkpoint.
        then: called when everything is restored, before the loops begin again.
    """

    def __init__(self, path: Path, then: Callable[[], None]) -> None:
        super().__init__(f"the run continues from {str(path)!r}")
        self.path = path
        self.then = then


class RewindableRun:
    """Runs a trainer's fit loop, again from a checkpoint whenever ``Rewind`` is raised.

    Args:
        trainer: a trainer that fits.
    """

    def __init__(self, trainer: lightning.Trainer) -> None:
        self.trainer = trainer
        self.count = 0

    def __call__(self) -> None:
        """Runs the loop to its end."""
        loop = self.trainer.fit_loop
        while True:
            try:
                type(loop).run(loop)
            except Rewind as raised:
                rewind = raised
            else:
                return
            # Outside of the handler: the traceback holds the batch and all that was computed of it.
            path, then = rewind.path, rewind.then
            del rewind
            self.count += 1
            _restore(self.trainer, path)
            then()


def allow_rewinding(trainer: lightning.Trainer) -> None:
    """Makes the trainer's fit loop run again when ``Rewind`` is raised; called by callbacks before training."""
    vars(trainer.fit_loop)["run"] = RewindableRun(trainer)


def forget_loader(trainer: lightning.Trainer) -> None:
    """Lets a run that goes back ask for its rows as a new process does; called from ``before_rewind``.

    The checkpointed state of the loader is then not restored into the present one, which may have other rows.
    """
    trainer.fit_loop._combined_loader = None


def is_rewound(trainer: lightning.Trainer) -> bool:
    """Returns whether this process has taken the run back to a checkpoint before."""
    run = vars(trainer.fit_loop).get("run")
    return isinstance(run, RewindableRun) and run.count > 0


def _restore(trainer: Any, path: Path) -> None:
    """Restores all that a resumed run restores, in the order of Lightning's ``Trainer._run``."""
    connector, module = trainer._checkpoint_connector, trainer.lightning_module
    # The time that has passed is not taken back, and neither is the checkpoint that the process was started from.
    timers = [(callback, callback.state_dict()) for callback in trainer.callbacks if isinstance(callback, Timer)]
    resumed = connector._ckpt_path

    for callback in trainer.callbacks:
        undo = getattr(callback, "before_rewind", None)
        if callable(undo):
            undo(trainer)

    # State that Lightning keeps of a hook that raised.
    module._current_fx_name = None
    trainer.should_stop, trainer.training = False, True
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    trainer._logger_connector.reset_results()
    trainer._logger_connector.reset_metrics()

    connector._restore_modules_and_callbacks(path, weights_only=True)
    connector.restore_training_state()
    connector.resume_end()
    connector._ckpt_path = resumed
    for timer, state in timers:
        timer.load_state_dict(state)
        # Set where training had ended: the time that passes from here would not count.
        timer._end_time[RunningStage.TRAINING] = None
    _begin_loops_anew(trainer)


def _begin_loops_anew(trainer: lightning.Trainer) -> None:
    """Puts the loops, which hold the restored counters, into the state of a new process."""
    loop: Any = trainer.fit_loop
    validation = loop.epoch_loop.val_loop
    validation._has_run, validation._restart_stage = False, RestartStage.NONE
    loop.epoch_loop._skip_next_val = False
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()

    # The data are asked for again. Lightning restores a loader in the middle of an epoch alone.
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    loop._combined_loader = loop._data_fetcher = None
