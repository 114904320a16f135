"""Prints a checksum of the weights after two steps of each default.yaml: unchanged by refactoring.

    python benchmarks/seeded_weights.py                      # all methods
    python benchmarks/seeded_weights.py dpo grpo             # some

Every run is seeded, in fp32, on one CPU core, from the tiny model's random weights, on the embedded task. A change that
is not meant to change numbers (names, folders, options) leaves each checksum as it was on the same machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = {
    "sft": "demonstrations",
    "reward": "preference",
    "process_reward": "stepwise",
    "dpo": "preference",
    "simpo": "preference",
    "kto": "unpaired",
    "grpo": "prompts",
    "ppo": "prompts",
}


def brevity(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Rewards short completions."""
    return [-float(len(completion)) for completion in completions]


def checksum(method: str, folder: Path) -> str:
    """Trains two steps of a method with its ``default.yaml``, and hashes the exported weights."""
    from rlhf_lightning.cli import main

    arguments = ["fit", "--config", str(ROOT / "configs" / method / "default.yaml")]
    arguments += [f"--model.init_args.model={ROOT / 'configs/models/nano'}", "--model.init_args.init=random"]
    if CONTRACTS[method] == "prompts":
        arguments += ["--model.init_args.num_generations=2", "--model.init_args.max_completion_length=8"]
        # Random weights give no right answers, so exact_answer would be constant: reward length instead.
        arguments += [f"--model.init_args.rewards=[{__name__}.brevity]"]
    arguments += ["--model.init_args.optimizer.init_args.lr=1e-3"]
    arguments += [f"--data.init_args.train=sums:{CONTRACTS[method]}?rows=16", "--data.init_args.global_batch_size=8"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=2"]
    arguments += [f"--trainer.default_root_dir={folder}", "--trainer.logger=false", "--trainer.callbacks=null"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    export = "rlhf_lightning.callbacks.ModelExport"
    arguments += [f"--trainer.callbacks+={export}", f"--trainer.callbacks.folder={folder / 'model'}"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(arguments)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(said.getvalue().strip()[-2000:]) from end
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted((folder / "model").glob("*.safetensors")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def run(methods: list[str]) -> None:
    """Prints one line per method."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    unknown = sorted(set(methods) - set(CONTRACTS))
    if unknown:
        raise SystemExit(f"unknown method {unknown[0]!r}: allowed are {', '.join(CONTRACTS)}")
    for method in methods or list(CONTRACTS):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{method:15s} {checksum(method, Path(folder))}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
