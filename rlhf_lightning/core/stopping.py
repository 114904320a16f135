"""Signal handling: a run stops between two batches, on all ranks at once, never in the middle of a collective."""

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

# Seconds within which a second Ctrl-C counts as the same: launchers forward signals that their processes also receive.
_SAME = 1.0


class StopOnSignal(lightning.Callback):
    """Stops a run at the end of the batch in which SIGTERM, Ctrl-C or SIGUSR1 arrives on any rank.

    Lightning's own handler runs a collective wherever the signal interrupts a rank, and deadlocks if other ranks are in
    another collective. This handler only records the signal; ranks agree at the end of each batch, of training or
    evaluation. Then Lightning raises ``SIGTERMException``, on which ``TrainingCheckpoint`` saves, and the process exits
    with 128 plus the signal's number, so that a script does not mistake the run for a finished one. A second Ctrl-C
    stops immediately, without a checkpoint. On SLURM with requeueing, its signal requeues the job after the batch.

    Added automatically by every post-training module.
    """

    def __init__(self) -> None:
        self.signum = 0  # the signal that stops the run; 0 for none
        self._noted = 0.0
        self._requeue: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Replaces Lightning's handlers, which Lightning registers at the end of setup."""
        self.signum = 0
        connector: Any = trainer._signal_connector
        vars(connector).pop("_slurm_sigusr_handler_fn", None)
        self._requeue = connector._slurm_sigusr_handler_fn
        connector._sigterm_notifier_fn = connector._slurm_sigusr_handler_fn = self.note

    def note(self, signum: int, frame: Any) -> None:
        """Records a signal.

        Raises:
            KeyboardInterrupt: Ctrl-C for the second time.
        """
        # The handler only records: collectives and files are out of reach within a signal handler.
        now = time.monotonic()
        if self.signum:
            if signum == signal.SIGINT and now - self._noted > _SAME:
                raise KeyboardInterrupt
            return
        self.signum, self._noted = int(signum), now
        if signum == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
            # A raw write: buffered streams may be locked by the code that the signal interrupts.
            os.write(2, b"\nstopping after this batch; Ctrl-C again stops at once, without a checkpoint\n")

    # Lightning registers only SIGTERM, and restores all handlers at the end.

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Registers the handlers of SIGINT and SIGUSR1."""
        self._listen()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Registers the handlers of SIGINT and SIGUSR1."""
        self._listen()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Registers the handlers of SIGINT and SIGUSR1."""
        self._listen()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Registers the handlers of SIGINT and SIGUSR1."""
        self._listen()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Registers the handlers of SIGINT and SIGUSR1."""
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # Handlers that the user has registered are kept.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.note)
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, self.note)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Agrees whether to stop; Lightning stops after the batch's metrics are logged."""
        self._agree(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Agrees whether to stop; a validation within training will be run again on resume."""
        self._agree(trainer, pl_module)

    def on_test_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Agrees whether to stop."""
        self._agree(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Agrees whether to stop, and raises ``SIGTERMException``, as Lightning's prediction loop does not."""
        if self._agree(trainer, pl_module):
            raise SIGTERMException

    def _agree(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> bool:
        # A signal may arrive during the collective: a result of 0 must not overwrite what the handler has recorded.
        agreed = max_over_ranks(self.signum)
        if agreed:
            self.signum = agreed
            # Lightning's own flag, with which it ends the loops and saves.
            trainer._signal_connector.received_sigterm = True
        return bool(agreed)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Sets the exit status to 128 plus the signal, and requeues a SLURM job."""
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
