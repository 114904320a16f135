"""Ranks stop together, resume together, decide together, and give back what they computed together."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.cli import main
from rlhf_lightning.core import stopping
from rlhf_lightning.core.stopping import StopOnSignal
from rlhf_lightning.core.trainer_checks import check_launch
from rlhf_lightning.distributed.collectives import is_peer_loss

from . import rank_jobs
from .rank_jobs import ROWS, outcomes, start

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that need not import everything again: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([rank_jobs.__name__])
    return context


def checkpoints(folder: Path) -> list[int]:
    return [int(path.stem.partition("=")[2]) for path in (folder / "checkpoints").glob("*.ckpt")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f1_a_signal_stops_all_ranks_with_a_checkpoint(processes, strategy, signum, tiny_model_folder, tmp_path):
    """To one rank, the other, or both (a little apart), at any moment of a batch or a validation."""
    chance = random.Random(f"{strategy}{signum}")
    for number, victims in enumerate(([0], [1], [0, 1], [1, 0])):
        folder = tmp_path / str(number)
        folder.mkdir()
        delay = chance.uniform(0, 0.3)
        ranks = start(processes, "stopped", tiny_model_folder(), folder, strategy, signum, victims, delay)
        found = outcomes(ranks, folder)
        assert [code for code, _ in found] == [128 + signum] * 2, (victims, delay, found)
        steps = checkpoints(folder)
        assert len(steps) == 1, (victims, delay)
        assert steps[0] >= 2
    ranks = start(processes, "continued", tiny_model_folder(), folder, strategy, steps[0] + 3)
    assert outcomes(ranks, folder) == [(0, steps[0] + 3)] * 2


def test_f1_a_signal_that_arrives_while_ranks_agree_is_not_lost(monkeypatch):
    """The handler runs when the collective returns, before its result is kept: most signals on a busy machine."""
    stop = StopOnSignal()
    trainer = SimpleNamespace(_signal_connector=SimpleNamespace(received_sigterm=False))
    module = SimpleNamespace(device=torch.device("cpu"))

    def max_over_ranks(signum):
        if not signum:
            stop.note(signal.SIGTERM, None)
        return signum

    monkeypatch.setattr(stopping, "max_over_ranks", max_over_ranks)
    stop.on_train_batch_end(trainer, module)
    assert not trainer._signal_connector.received_sigterm
    stop.on_train_batch_end(trainer, module)
    assert trainer._signal_connector.received_sigterm
    assert stop.signum == signal.SIGTERM


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["torchrun", "own"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f1_launchers_end_with_what_they_launched(strategy, launcher, tiny_model_folder, tmp_path):
    """SIGTERM to the process that was started: a shell does not continue with the next command."""
    script = tmp_path / "run.py"
    script.write_text(
        "import logging, sys, warnings\n"
        "from pathlib import Path\n"
        "from tests.faults import rank_jobs\n"
        "logging.disable(logging.WARNING)\n"
        "warnings.simplefilter('ignore')\n"
        "folder = Path(sys.argv[2])\n"
        "import lightning\n"
        "class Begins(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == 2:\n"
        "            (folder / f'begun-{trainer.global_rank}').touch()\n"
        "saver = rank_jobs.TrainingCheckpoint(str(folder / 'checkpoints'), every_n_steps=10**6)\n"
        "trainer = rank_jobs.trainer_for(sys.argv[3], saver, Begins(), max_steps=10**5)\n"
        "trainer.fit(rank_jobs.SFTModule(sys.argv[1]), rank_jobs.data())\n"
    )
    command = [str(script), str(tiny_model_folder()), str(tmp_path), strategy]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not all((tmp_path / f"begun-{rank}").exists() for rank in range(2)):
            assert process.poll() is None, "it ended before it began"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        status = process.wait(rank_jobs.BOUND)
    finally:
        process.kill()
    assert status not in (0, None)
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f2_a_rank_without_rows_does_not_leave_the_others_waiting(processes, strategy, tiny_model_folder, tmp_path):
    assert outcomes(start(processes, "idle", tiny_model_folder(), tmp_path, strategy), tmp_path) == [(0, 3)] * 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f3_all_ranks_resume_the_same_checkpoint_or_none(processes, strategy, tiny_model_folder, tmp_path):
    assert outcomes(start(processes, "own_disks", tiny_model_folder(), tmp_path, strategy), tmp_path) == [(0, 2)] * 2
    kept = (tmp_path / "disk-0" / "step=2.ckpt").read_bytes()
    found = outcomes(start(processes, "own_disks", tiny_model_folder(), tmp_path, strategy), tmp_path)
    for code, message in found:
        assert code == 1
        assert "rank 0 (on " in message
        assert f"resumes {str(tmp_path / 'disk-0' / 'step=2.ckpt')!r} of step 2, and rank 1 (on " in message
        assert "resumes nothing: keep checkpoints where all machines can read them" in message
    assert (tmp_path / "disk-0" / "step=2.ckpt").read_bytes() == kept


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f7_a_log_that_is_somebody_elses_ends_all_ranks_with_the_reason(
    processes, strategy, tiny_model_folder, tmp_path
):
    found = outcomes(start(processes, "foreign_log", tiny_model_folder(), tmp_path, strategy), tmp_path)
    reason = f"{str(tmp_path / 'history-0.jsonl')!r} is not a log of metrics and is left unchanged: choose another path"
    assert found == [(1, reason)] * 2
    assert (tmp_path / "history-0.jsonl").read_text() == "mine\n"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", ["checkpoint", "model", "record", "lightning"])
def test_f7_no_room_where_one_rank_writes_ends_all_ranks_with_the_reason(
    processes, strategy, what, tiny_model_folder, tmp_path
):
    found = outcomes(start(processes, "no_room", tiny_model_folder(), tmp_path, strategy, what), tmp_path)
    [(code, message), other] = found
    assert code == 1
    assert other == found[0]
    assert "No space left on device" in message
    if what != "record":
        kind = "model to" if what == "model" else "checkpoint"
        assert message.startswith(f"cannot write the {kind} ")
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".ckpt" or path.name == "config.json"]


@pytest.mark.slow
@pytest.mark.distributed
def test_f7_predictions_that_cannot_be_written_end_all_ranks_with_the_reason(processes, tiny_model_folder, tmp_path):
    found = outcomes(start(processes, "no_place", tiny_model_folder(), tmp_path, "ddp"), tmp_path)
    [(code, message), other] = found
    assert code == 1
    assert other == found[0]
    assert f"File exists: {str(tmp_path / 'deep')!r}" in message


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_f4_what_forked_processes_have_trained_is_exported(processes, strategy, tiny_model_folder, tmp_path):
    process = processes.Process(
        target=rank_jobs.run_rank, args=(0, 0, "forked", tiny_model_folder(), tmp_path, strategy)
    )
    process.start()
    process.join(120)
    process.kill()
    assert json.loads((tmp_path / "said-0.json").read_text()) == 0.0


def test_f4_weights_are_loaded_into_a_model_that_is_built_first(tiny_model_folder):
    """A strategy that forks loads the trained weights into a model that is already built."""
    trained, fresh = SFTModule(str(tiny_model_folder())), SFTModule(str(tiny_model_folder()))
    trained.configure_model()
    state = {name: value + 1 for name, value in trained.state_dict().items()}
    fresh.load_state_dict(state, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert fresh.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            r"torchrun started 2 processes, and trainer.devices and trainer.num_nodes make 1: set --trainer.devices",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, r"srun started 4 processes, and trainer.devices and trainer.num_nodes make 1"),
    ],
)
@pytest.mark.parametrize("entrance", ["fit", "validate", "predict"])
def test_f5_processes_that_would_each_run_alone_are_refused(
    environment, message, entrance, monkeypatch, tiny_model_folder
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=message):
        getattr(trainer, entrance)(SFTModule(str(tiny_model_folder())), rank_jobs.data(predict=ROWS))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_f5_the_number_of_ranks_is_checked_under_every_strategy(strategy, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(ValueError, match=r"torchrun started 4 processes, and .* make 2: .*\(together 4\)"):
        check_launch(trainer)


def test_f5_machines_that_nobody_names_are_not_waited_for(monkeypatch):
    for name in ("MASTER_ADDR", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match=r"trainer.num_nodes is 2, and the address of .*torchrun --nnodes=2"):
        check_launch(trainer)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_launch(trainer)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pipeline", "--config", "configs/pipelines/quickstart.yaml"],
        ["label-steps", "--model=x", "--prompts=sums:prompts?rows=2", "--output=x.jsonl"],
    ],
)
def test_f5_commands_of_one_process_are_not_run_in_several(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 1
    assert f"rank 1: {arguments[0]} runs in one process, and torchrun started 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.distributed
def test_f7_the_message_of_a_gradient_says_whose_rows_they_are(processes, tiny_model_folder, tmp_path):
    found = outcomes(start(processes, "not_finite", tiny_model_folder(), tmp_path, "ddp"), tmp_path)
    for code, message in found:
        assert code == 1
        assert "norm is nan in step 1 (rows of rank 0: memory:1; of rank 1: memory:2)" in message


def test_f7_a_rank_that_lost_another_says_so_in_a_line(monkeypatch, capsys):
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3\nmore"
    assert not is_peer_loss(RuntimeError("shapes do not fit"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def dispatch(arguments: Any) -> None:
        raise RuntimeError(gloo)

    monkeypatch.setattr("rlhf_lightning.cli._dispatch", dispatch)
    with pytest.raises(SystemExit) as left:
        main(["fit"])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("rlhf-lightning: rank 1: another rank has failed (")
    assert said.count("\n") == 1
