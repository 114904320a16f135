"""One training run in a process of its own, or a rank of one, which may kill itself while it writes."""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch

from rlhf_lightning import DPOModule, GRPOModule, PPOModule, SFTModule
from rlhf_lightning.callbacks import ModelExport, TrainingCheckpoint
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.rewards._line_worker import LineWorker

LORA = {"r": 2, "lora_dropout": 0.2}
PAIRS = [{"prompt": f"{n}+{n}=?", "chosen": f"#{2 * n}", "rejected": f"#{2 * n + 1} no"} for n in range(7)]
ON_POLICY = {"num_generations": 2, "max_completion_length": 4}
RANKS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "killed"}
SCRIPT = """
import json, os, sys
open(os.path.join(os.path.dirname(__file__), f"pid-{os.getpid()}"), "w").close()
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(sum(json.loads(line)) % 7 / 7), flush=True)
"""


class AskingReward:
    """A reward that asks a process of its own, as those of code and mathematics do."""

    def __init__(self, script: Path) -> None:
        self.worker = LineWorker(script, timeout=10.0, memory_mb=1024)

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [self.worker.ask([int(token) for token in tokens]) for tokens in completion_ids]


def parts(method: str, model: str, folder: Path) -> tuple[Any, Any]:
    """The module and the data of a method."""
    pairs, prompts = {"train": PAIRS, "val": PAIRS[:2]}, {"train": [{"prompt": row["prompt"]} for row in PAIRS[:4]]}
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
        return SFTModule(model, lora=LORA), SFTDataModule(train=rows, val=rows[:2], global_batch_size=2)
    if method == "dpo":
        return DPOModule(model, lora=LORA), PreferenceDataModule(**pairs, global_batch_size=2)
    script = folder / "worker.py"
    script.write_text(SCRIPT)
    rewards = [AskingReward(script)]
    if method == "grpo":
        module: Any = GRPOModule(model, lora=LORA, rewards=rewards, beta=0.1, **ON_POLICY)
    else:
        module = PPOModule(model, lora=LORA, rewards=rewards, num_updates=2, kl={"target": 0.1}, **ON_POLICY)
    return module, PromptDataModule(**prompts, global_batch_size=2)


class Clock(lightning.Callback):
    """Writes down where training starts, and says that it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        (self.folder / "started").write_text(str(trainer.global_step))


class Dies(lightning.Callback):
    """Ends this process at some moment between a step and the end of the next one."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.begun = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            moment = random.Random().uniform(0, time.monotonic() - self.begun)
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif trainer.global_step > self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """Counts flushes to disk and checkpoints, and dies over one of them.

    Args:
        dies_at: ``("flush", n)``: before the n-th flush of a file or folder; ``("half", n)``: when half of the n-th
            checkpoint is written; ``("peer", n)``: the other rank dies then, and this one continues writing.
        peer: the file with the other rank's process id.
    """

    def __init__(self, dies_at: tuple[str, int] | None, peer: Path | None = None) -> None:
        self.dies_at = dies_at
        self.peer = peer
        self.counts = {"flush": 0, "half": 0}
        self.fsync, self.save = os.fsync, torch.save
        os.fsync, torch.save = self.flush, self.write  # type: ignore[assignment]

    def counted(self, kind: str) -> bool:
        self.counts[kind] += 1
        return self.dies_at == (kind, self.counts[kind])

    def flush(self, descriptor: int) -> None:
        if self.counted("flush"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.fsync(descriptor)

    def write(self, value: Any, file: Any, **options: Any) -> None:
        if isinstance(file, io.BytesIO):  # a tensor that ranks send each other, and no checkpoint
            self.save(value, file, **options)
            return
        dies = self.counted("half")
        if not dies and self.dies_at != ("peer", self.counts["half"]):
            self.save(value, file, **options)
            return
        buffer = io.BytesIO()
        self.save(value, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        os.kill(os.getpid() if dies or self.peer is None else int(self.peer.read_text()), signal.SIGKILL)
        file.write(content[len(content) // 2 :])


def run(method: str, model: str, folder: str, dies_at: tuple[str, int] | None = None) -> None:
    """Starts or takes up a run; leaves ``counts.json`` when it comes to its end."""
    begun, place, writes = time.monotonic(), Path(folder), Writes(dies_at)
    fit(method, model, place, ModelExport(str(place / "model"), every_n_steps=1), devices=1)
    (place / "counts.json").write_text(json.dumps(writes.counts | {"seconds": time.monotonic() - begun}))


def run_rank(method: str, model: str, folder: str, strategy: str, kind: str, number: int, victim: int) -> None:
    """Starts or takes up a run as the rank that the environment says.

    Args:
        method: ``sft`` or ``dpo``.
        model: the model's folder.
        folder: the run's.
        strategy: of Lightning.
        kind: as in ``Writes``; ``step``: a moment after the step ``number``; empty: it lives.
        number: which write or step.
        victim: the rank that dies; rank 0 is the one that writes.
    """
    place, rank = Path(folder), os.environ["RANK"]
    (place / f"rank-{rank}").write_text(str(os.getpid()))
    dies = [Dies(number)] if kind == "step" and rank == str(victim) else []
    Writes((kind, number) if rank == "0" else None, place / "rank-1")
    fit(method, model, place, *dies, devices=2, strategy=strategy, use_distributed_sampler=False)


def start_rank(rank: int, port: int, *args: Any) -> None:
    """A rank without a launcher that looks after it, as some clusters start them."""
    os.environ.update(RANKS | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)})
    faulthandler.enable()  # a library that aborts says where each thread was
    run_rank(*args)


def fit(method: str, model: str, place: Path, *callbacks: lightning.Callback, **options: Any) -> None:
    """Eight steps, with a checkpoint after each."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lightning.seed_everything(7, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=8,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            TrainingCheckpoint(str(place / "checkpoints"), every_n_steps=1, keep=2),
            *callbacks,
            Clock(place),
        ],
        **options,
    )
    module, data = parts(method, model, place)
    trainer.fit(module, datamodule=data, ckpt_path="last")


if __name__ == "__main__":
    run_rank(*sys.argv[1:6], int(sys.argv[6]), int(sys.argv[7]))
