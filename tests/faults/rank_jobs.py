"""Jobs of the ranks of a run in tests of faults; ``start`` runs a job of this file on two of them."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
import warnings
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import JSONLLogger, ModelExport, PredictionWriter, Throughput, TrainingCheckpoint
from rlhf_lightning.datamodules import SFTDataModule
from tests.helpers import leave_together

ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(7)]
BOUND = 60.0  # seconds in which all ranks end; on a quiet machine it is a second or two


def start(context: ForkServerContext, job: str, model: Path, folder: Path, *args: Any) -> list[BaseProcess]:
    """Two ranks that nobody looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(rank, port, job, model, folder, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def outcomes(ranks: list[BaseProcess], folder: Path) -> list[tuple[int | None, Any]]:
    """Exit status and result or message of each rank."""
    try:
        assert multiprocessing.connection.wait([process.sentinel for process in ranks], 2 * BOUND), "no rank ends"
        deadline = time.monotonic() + BOUND
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, "a rank waits for ever"
        said = [folder / f"said-{rank}.json" for rank in range(2)]
        return [
            (process.exitcode, json.loads(path.read_text()) if path.exists() else None)
            for process, path in zip(ranks, said, strict=True)
        ]
    finally:
        for process in ranks:
            process.kill()


def run_rank(rank: int, port: int, job: str, model: Path, folder: Path, *args: Any) -> None:
    """Runs a job as a rank, and writes down what it returns or raises."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "faults", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = folder / f"said-{rank}.json"
    try:
        place.write_text(json.dumps(globals()[job](rank, model, folder, *args)))
    except ValueError as error:
        place.write_text(json.dumps(str(error)))
        raise SystemExit(1) from None
    finally:
        if job != "stopped":
            leave_together()


def trainer_for(strategy: str, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    """A trainer of two ranks."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    return lightning.Trainer(
        **{"accelerator": "cpu", "devices": 2, "strategy": strategy, "use_distributed_sampler": False}
        | {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        | {
            "enable_checkpointing": saves,
            "callbacks": [*callbacks],
            "max_epochs": -1,
            "max_steps": 3,
            "log_every_n_steps": 1,
        }
        | options
    )


def data(**options: Any) -> SFTDataModule:
    return SFTDataModule(**{"train": ROWS, "val": ROWS[:3], "global_batch_size": 2} | options)


class Sends(lightning.Callback):
    """Sends this process a signal at any moment of the batches after a step."""

    def __init__(self, signum: int, step: int, delay: float) -> None:
        self.signum, self.step, self.delay = signum, step, delay

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            threading.Timer(self.delay, os.kill, (os.getpid(), self.signum)).start()


def stopped(rank: int, model: Path, folder: Path, strategy: str, signum: int, victims: list[int], delay: float) -> None:
    """A run that would take long, and is stopped by a signal to some ranks."""
    sends = [Sends(signum, 2, delay + 0.003 * rank)] if rank in victims else []
    saver = TrainingCheckpoint(str(folder / "checkpoints"), every_n_steps=10**6)
    trainer = trainer_for(strategy, saver, *sends, max_steps=10**5, val_check_interval=2, check_val_every_n_epoch=1)
    trainer.fit(SFTModule(str(model)), data())


def continued(rank: int, model: Path, folder: Path, strategy: str, steps: int) -> int:
    """Continues it."""
    saver = TrainingCheckpoint(str(folder / "checkpoints"), every_n_steps=10**6)
    trainer = trainer_for(strategy, saver, max_steps=steps, val_check_interval=2)
    trainer.fit(SFTModule(str(model)), data(), ckpt_path="last")
    return trainer.global_step


def idle(rank: int, model: Path, folder: Path, strategy: str) -> int:
    """A run in which a rank has no row by the time of the first log, nor ever."""
    trainer = trainer_for(strategy, Throughput())
    trainer.fit(SFTModule(str(model)), data(global_batch_size=1, val=None))
    return trainer.global_step


def own_disks(rank: int, model: Path, folder: Path, strategy: str) -> int:
    """A run in which each rank looks for checkpoints on a disk of its own."""
    saver = TrainingCheckpoint(str(folder / f"disk-{rank}"))
    trainer = trainer_for(strategy, saver, max_steps=2 if not list(folder.glob("disk-0/*.ckpt")) else 4)
    trainer.fit(SFTModule(str(model)), data(), ckpt_path="last")
    return trainer.global_step


class NotFinite(SFTModule):
    """A module whose gradient is NaN."""

    def loss(self, rows: Any, normalizers: Any) -> Any:
        return super().loss(rows, normalizers) * float("nan")


def not_finite(rank: int, model: Path, folder: Path, strategy: str) -> None:
    """A run that ends with an error of the gradient."""
    trainer_for(strategy).fit(NotFinite(str(model)), data(shuffle=False))


def forked(rank: int, model: Path, folder: Path, strategy: str) -> float:
    """A run in processes that the trainer forks: how far the exported weights are from those of the last checkpoint."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name)
    module = SFTModule(str(model), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    trainer = trainer_for(strategy, TrainingCheckpoint(str(folder / "checkpoints")))
    trainer.fit(module, data())
    module.save_pretrained(str(folder / "model"))
    exported = SFTModule(str(folder / "model"))
    exported.configure_model()
    trained = torch.load(folder / "checkpoints" / "step=3.ckpt", weights_only=True)["state_dict"]
    untrained = SFTModule(str(model))
    untrained.configure_model()
    assert max(float((v - untrained.state_dict()[k]).abs().max()) for k, v in trained.items()) > 0.01
    return max(float((value - exported.state_dict()[name]).abs().max()) for name, value in trained.items())


def foreign_log(rank: int, model: Path, folder: Path, strategy: str) -> None:
    """A run whose log would go into somebody else's file, which the first rank alone reads."""
    (folder / f"history-{rank}.jsonl").write_text("mine\n" if rank == 0 else "")
    logger = JSONLLogger(str(folder / f"history-{rank}.jsonl"))
    trainer_for(strategy, logger=logger).fit(SFTModule(str(model)), data())


def no_room(rank: int, model: Path, folder: Path, strategy: str, what: str) -> None:
    """A run that has no room for what the first rank writes alone."""
    own = {"checkpoint": TrainingCheckpoint, "model": ModelExport, "record": ModelExport, "lightning": ModelCheckpoint}
    options: dict[str, Any] = {"every_n_train_steps": 1} if what == "lightning" else {"every_n_steps": 1}
    saver = own[what](str(folder / "saved"), **options)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = trainer_for(strategy, saver)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", _unless_in_memory(full))
        patch.setattr(f"rlhf_lightning.{EXPORTS[what == 'record']}", full)
        trainer.fit(SFTModule(str(model)), data(val=None))


EXPORTS = ("utils.folders.mark", "callbacks.model_export.write_atomically")  # how an export begins, and ends


class InTheWay(lightning.Callback):
    """Puts a file where the first rank is about to make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self.place.write_text("mine")


def no_place(rank: int, model: Path, folder: Path, strategy: str) -> None:
    """Predictions that cannot be written where they should go."""
    writer = PredictionWriter(str(folder / "deep" / "scores.jsonl"))
    rows = data(train=None, val=None, predict=ROWS)
    trainer_for(strategy, writer, InTheWay(folder / "deep")).predict(SFTModule(str(model)), rows)


def _unless_in_memory(full: Any) -> Any:
    save = torch.save
    return lambda value, file, **options: (save if isinstance(file, io.BytesIO) else full)(value, file, **options)


def layerdrop_rate(rank: int, model: Path, folder: Path, strategy: str, dropout: float | None) -> int:
    """A run of a model whose config skips layers."""
    trainer = trainer_for(strategy)
    trainer.fit(SFTModule(str(model), dropout=dropout), data(val=None))
    return trainer.global_step


NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT", signal.SIGUSR1: "SIGUSR1"}
