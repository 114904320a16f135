"""Signals stop a run between two batches, on all ranks at once, and never in the middle of what ranks do together."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import lightning
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..distributed.collectives import max_over_ranks

# Seconds in which a second Ctrl-C is taken for the same one: launchers pass on what their processes get anyway.
_SAME = 1.0


class StopOnSignal(lightning.Callback):
    """Stops a run at the end of the batch in which SIGTERM, Ctrl-C or SIGUSR1 arrives, on whatever rank.

    Lightning's own handler runs a collective wherever the signal finds a rank, and waits for ever where the others are
    in another one. Here a handler only takes note; ranks agree at the end of each batch, of training or evaluation.
    Then Lightning raises ``SIGTERMException``, upon which ``TrainingCheckpoint`` saves, and the process exits with 128
    and the signal's number, so that what follows in a script does not take the run for a finished one. A second Ctrl-C
    stops at once, without a checkpoint. On SLURM with requeueing, its signal requeues the job after the batch.

    Every post-training module brings it along.
    """

    def __init__(self) -> None:
        self.signum = 0  # the signal that stops the run; 0 for none
        self._noted = 0.0
        self._requeue: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Takes the place of Lightning's handlers, which it registers when everything is set up."""
        self.signum = 0
        connector: Any = trainer._signal_connector
        vars(connector).pop("_slurm_sigusr_handler_fn", None)
        self._requeue = connector._slurm_sigusr_handler_fn
        connector._sigterm_notifier_fn = connector._slurm_sigusr_handler_fn = self.note

    def note(self, signum: int, frame: Any) -> None:
        """Takes note of a signal.

        Raises:
            KeyboardInterrupt: Ctrl-C for the second time.
        """
        now = time.monotonic()
        if self.signum:
            if signum == signal.SIGINT and now - self._noted > _SAME:
                raise KeyboardInterrupt
            return
        self.signum, self._noted = int(signum), now
        if signum == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
            # Straight to the terminal: what is written otherwise may be in the middle of a line, and locked.
            os.write(2, b"\nstopping after this batch; Ctrl-C again stops at once, without a checkpoint\n")

    # Lightning registers SIGTERM alone, and restores all handlers at the end.

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to listen."""
        self._listen()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to listen."""
        self._listen()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to listen."""
        self._listen()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to listen."""
        self._listen()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to listen."""
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # Whoever has a handler of his own keeps it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.note)
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, self.note)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Agrees whether to stop; Lightning does after the batch's metrics are logged."""
        self._agree(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Agrees whether to stop; a validation that is training's will be run again."""
        self._agree(trainer, pl_module)

    def on_test_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Agrees whether to stop."""
        self._agree(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Agrees whether to stop, and does: Lightning's own loop would not."""
        if self._agree(trainer, pl_module):
            raise SIGTERMException

    def _agree(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> bool:
        # A signal may arrive while ranks agree: the result must not take the place of what the handler noted meanwhile.
        agreed = max_over_ranks(self.signum, module.device)
        if agreed:
            self.signum = agreed
            trainer._signal_connector.received_sigterm = True
        return bool(agreed)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Makes the exit status that of the signal."""
        if not isinstance(exception, SIGTERMException) or not self.signum:
            return
        exception.code = 128 + self.signum
        rank_zero_info(f"stopped by {signal.Signals(self.signum).name} after step {trainer.global_step}")
        environment = trainer._accelerator_connector.cluster_environment
        if (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and self.signum == environment.requeue_signal
            and trainer.state.fn == "fit"
        ):
            self._requeue(self.signum, None)
