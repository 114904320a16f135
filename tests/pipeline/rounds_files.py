"""A small pipeline of rounds, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_lightning.utils.files import content_hash

VERIFIER = f"{__name__}.first_is_even"


def first_is_even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


def write_rounds(model: str, tmp_path: Path) -> dict[str, Any]:
    """Writes prompts and seed rows; returns a pipeline of two rounds of a model of any size."""
    prompts = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    seeds = [{"prompt": f"{n}-{n}=?", "completion": "#0"} for n in range(12)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    sample = {
        "kind": "sample",
        "model": "${round.model}",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "verifier": VERIFIER,
        "rows": ["demonstrations", "samples"],
        "sampling": {"max_new_tokens": 24},
        "num_samples": 8,
        "seed_rows": str(tmp_path / "seeds.jsonl"),
        "seed_ratio": 0.25,
    }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    train = {
        "kind": "fit",
        "model": {
            "class_path": "SFTModule",
            "init_args": {"model": "${round.model}", "optimizer": optimizer},
        },
        "data": {"class_path": "SFTDataModule", "init_args": {"train": "${outputs.own.demonstrations}"}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False},
    }
    task = {"name": "even", "prompts": str(tmp_path / "prompts.jsonl"), "verifier": VERIFIER}
    loop = {
        "kind": "rounds",
        "model": model,
        "rounds": 2,
        "suite": {"name": "small", "tasks": [task | {"sampling": {"max_new_tokens": 4}}]},
        "criteria": {"accept": "not_worse", "on_reject": "new_seed"},
        "body": {"own": sample, "train": train},
    }
    return {"run_dir": str(tmp_path / "run"), "seed": 3, "stages": {"loop": loop}}


def contents(folder: Path) -> dict[str, str | None]:
    places = ["model", "rounds.jsonl"]
    places += [f"rounds/{n}/{name}" for n in (1, 2) for name in ("own/demonstrations.jsonl", "own/samples.jsonl")]
    return {place: content_hash(folder / place) for place in [*places, "rounds/1/train/model", "rounds/2/train/model"]}
