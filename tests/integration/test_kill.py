"""Killed at any moment, also in the middle of writing, a run is taken up and ends where it would have ended.

``RLHF_LIGHTNING_KILLS=20`` kills every method so many times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning.core.checkpoint_io import damage
from rlhf_lightning.utils.files import REPLACED, hidden_sibling

from . import kill_worker
from .test_resume import assert_same

KILLS = int(os.environ.get("RLHF_LIGHTNING_KILLS", "3"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 20 * KILLS)]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that need not import everything again: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_worker.__name__])
    return context


def start(context: ForkServerContext, *args: object) -> BaseProcess:
    process = context.Process(target=kill_worker.run, args=args)
    process.start()
    return process


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("=")[2]) for path in (folder / "checkpoints").glob("*.ckpt"))


def outcome(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    last = torch.load(folder / "checkpoints" / f"step={steps(folder)[-1]}.ckpt", weights_only=True)
    return last, load_file(folder / "model" / "adapter_model.safetensors")


def assert_nothing_half_written(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("*.ckpt"):
        assert damage(path) is None, path
    for model in (folder / "model", hidden_sibling(folder / "model", REPLACED)):
        if model.exists():
            assert load_file(model / "adapter_model.safetensors")
            assert json.loads((model / "adapter_config.json").read_text())["r"] == 2


def assert_no_orphans(folder: Path) -> None:
    """Every process that a reward has started is gone, or goes in a moment."""
    deadline = time.monotonic() + 10
    for file in folder.glob("pid-*"):
        place = Path("/proc") / file.name.partition("-")[2]
        while (place / "cmdline").is_file() and str(folder).encode() in (place / "cmdline").read_bytes():
            assert time.monotonic() < deadline, f"process {place.name} outlives the run that started it"
            time.sleep(0.02)
        file.unlink()


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo"])
def test_a_killed_run_ends_where_it_would_have_ended(processes, tiny_model_folder, tmp_path, method):
    model, chance = str(tiny_model_folder()), random.Random(f"{method}{KILLS}")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    first = start(processes, method, model, str(whole))
    first.join()
    assert first.exitcode == 0
    counts = json.loads((whole / "counts.json").read_text())
    for number in range(KILLS):
        kind = ("time", "half", "flush")[(number + len(method)) % 3]
        before = steps(folder)
        (folder / "started").unlink(missing_ok=True)
        if kind == "time":
            process = start(processes, method, model, str(folder))
            process.join(chance.uniform(0.1, 0.8) * counts["seconds"])
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        else:
            # Writes to come fall with every step that is already made.
            left = max(1, counts[kind] * (8 - max(before, default=0)) // 8 - 1)
            process = start(processes, method, model, str(folder), (kind, chance.randint(1, max(1, left // 2))))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if kind == "half" and process.exitcode:
            leftover = next((folder / "checkpoints").glob(".*.partial"))
            assert damage(leftover)
        if (folder / "started").is_file():
            assert int((folder / "started").read_text()) == max(before, default=0), "not the newest checkpoint"
        assert_nothing_half_written(folder)
        assert_no_orphans(folder)
    last = start(processes, method, model, str(folder))
    last.join()
    assert last.exitcode == 0
    assert_no_orphans(folder)
    (expected, expected_model), (found, found_model) = outcome(whole), outcome(folder)
    assert steps(folder) == steps(whole)
    for name in ("state_dict", "optimizer_states", "post_training", "on_policy"):
        assert_same(found.get(name), expected.get(name), name)
    assert_same(found_model, expected_model)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step={n}.ckpt" for n in steps(whole)]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
