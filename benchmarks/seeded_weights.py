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
import yaml

ROOT = Path(__file__).resolve().parents[1]
# Sixteen rows of an embedded task for each contract.
ROWS = {
    "SFTDataModule": "sums:demonstrations?rows=16",
    "ContextDataModule": "recall:demonstrations?length=48&facts=4&rows=16",
    "PreferenceDataModule": "sums:preference?rows=16",
    "UnpairedDataModule": "sums:unpaired?rows=16",
    "StepwiseDataModule": "sums:stepwise?rows=16",
    "PromptDataModule": "sums:prompts?rows=16",
}


def methods() -> list[str]:
    """The methods of the package: each is a file of ``modules/`` and a folder of ``configs/``."""
    from rlhf_lightning import modules

    return [getattr(modules, name).__module__.rpartition(".")[2] for name in modules.__all__]


def brevity(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Rewards short completions."""
    return [-float(len(completion)) for completion in completions]


def checksum(method: str, folder: Path) -> str:
    """Trains two steps of a method with its ``default.yaml``, and hashes the exported weights."""
    from rlhf_lightning.cli import main

    config = ROOT / "configs" / method / "default.yaml"
    contract = yaml.safe_load(config.read_text())["data"]["class_path"].rpartition(".")[2]
    arguments = ["fit", "--config", str(config)]
    arguments += [f"--model.init_args.model={ROOT / 'configs/models/nano'}", "--model.init_args.init=random"]
    if contract == "PromptDataModule":
        arguments += ["--model.init_args.num_generations=2", "--model.init_args.max_completion_length=8"]
        # Random weights give no right answers, so exact_answer would be constant: reward length instead.
        arguments += [f"--model.init_args.rewards=[{__name__}.brevity]"]
    arguments += ["--model.init_args.optimizer.init_args.lr=1e-3"]
    arguments += [f"--data.init_args.train={ROWS[contract]}", "--data.init_args.global_batch_size=8"]
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


def run(chosen: list[str]) -> None:
    """Prints one line per method."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    unknown = sorted(set(chosen) - set(methods()))
    if unknown:
        raise SystemExit(f"unknown method {unknown[0]!r}: allowed are {', '.join(methods())}")
    for method in chosen or methods():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{method:20s} {checksum(method, Path(folder))}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
