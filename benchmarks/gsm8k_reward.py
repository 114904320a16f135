"""Trains a reward model to tell right from wrong on GSM8K's model solutions, compared with length alone.

A small model from scratch first learns to write the reference solutions of GSM8K's training problems, then to prefer
right to wrong among four models' solutions of 1,000 other problems. It ranks right against wrong solutions of 319 more
(problems that have both: 568 and 163). A model of 4 million parameters soon memorizes the 1,888 pairs, so the rate is
low. The length baseline prefers the longer solution, or the shorter one, whichever is right more often on the 1,000.
Intervals are bootstrapped over problems, because pairs of one problem are not independent.

    python benchmarks/gsm8k_reward.py --path data/gsm8k          # train.jsonl and example_model_solutions.jsonl
    python benchmarks/gsm8k_reward.py --path data/gsm8k --sft runs/gsm8k/sft/model  # starts from a model that can write
    python benchmarks/gsm8k_reward.py --path data/gsm8k --tiny   # a few steps, to see that it runs

The exit status says whether the reward model's interval excludes chance.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule
from rlhf_lightning.sequences import Example

MODEL = str(Path(__file__).resolve().parents[1] / "configs" / "models" / "small")
RESAMPLES = 10_000
Array = npt.NDArray[np.float64]


def options(lr: float) -> dict[str, Any]:
    """Options of both stages, except the learning rate."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.01),
        "lr_scheduler": partial(WarmupSchedule, warmup_steps=0.1, decay="cosine"),
        "micro_batch_tokens": 4096,
    }


def fit(module: Any, data: lightning.LightningDataModule, args: argparse.Namespace, epochs: int) -> None:
    """Trains, and prints the result in one line."""
    begin = time.perf_counter()
    run = trainer(max_epochs=epochs, max_steps=4 if args.tiny else -1)
    run.fit(module, datamodule=data)
    seconds = time.perf_counter() - begin
    loss = float(run.callback_metrics["train/loss"])
    print(f"{type(module).__name__}: {run.global_step} steps in {seconds:.0f} s, last loss {loss:.3f}", flush=True)


def trainer(**settings: Any) -> lightning.Trainer:
    """Makes a quiet trainer without checkpoints."""
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def train(args: argparse.Namespace, folder: str) -> tuple[RewardModule, PreferenceDataModule]:
    """Trains both stages; returns the reward model and the held-out pairs."""
    where = f"path={args.path}" + ("&rows=64" if args.tiny else "")
    solved = f"gsm8k:preference?pairs=all&{where}"
    lightning.seed_everything(args.seed, verbose=False)
    if args.sft is None:
        sft = SFTModule(MODEL, init="random", **options(1e-3))
        data = SFTDataModule(
            train=f"gsm8k:demonstrations?{where}", global_batch_size=16, max_length=512, seed=args.seed
        )
        fit(sft, data, args, args.sft_epochs)
        sft.save_pretrained(folder)
    reward = RewardModule(
        args.sft or folder, pooling=args.pooling, num_models=args.num_models, seed=args.seed, **options(args.lr)
    )
    pairs = PreferenceDataModule(
        train=f"{solved}&split=train",
        predict=f"{solved}&split=heldout",
        global_batch_size=16,
        max_length=512,
        on_too_long="truncate_end",  # a few solutions repeat themselves without end
        seed=args.seed,
    )
    fit(reward, pairs, args, args.epochs)
    return reward, pairs


def longer(examples: list[Example]) -> Array:
    """By how many tokens the right solution is longer than the wrong one, ``(pairs,)``."""
    solutions = [example.root.children for example in examples]
    return np.array([float(len(right.tokens) - len(wrong.tokens)) for right, wrong in solutions])


def right(margins: Array) -> Array:
    """1 where the right solution is ranked above the wrong one, a half for ties, ``(pairs,)``."""
    return (np.sign(margins) + 1) / 2


def interval(values: Array, problems: npt.NDArray[np.int64], seed: int = 0) -> tuple[float, float, float]:
    """The mean over pairs, and its 95 % interval by resampling problems with replacement."""
    sums, counts = np.bincount(problems, weights=values), np.bincount(problems)
    draws = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def main() -> int:
    """Trains, ranks the held-out pairs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=os.environ.get("GSM8K_DIR"), help="GSM8K's folder (default: $GSM8K_DIR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", help="folder of a language model to start from, in place of one from scratch")
    parser.add_argument("--pooling", choices=("last", "mean"), default="last")
    parser.add_argument("--sft_epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--num_models", type=int, default=1, help="members of the reward model's ensemble")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.path:
        parser.error("--path is GSM8K's folder, with train.jsonl and example_model_solutions.jsonl")

    with tempfile.TemporaryDirectory() as folder:
        reward, pairs = train(args, f"{folder}/sft")
        rows = [row for batch in trainer().predict(reward, datamodule=pairs) or [] for row in batch]

    # The length baseline takes its direction from the training pairs, as the reward model takes its weights.
    margins = np.array([row["rewards"][0] - row["rewards"][1] for row in rows])
    seen, held_out = (
        [e for batch in loader for e in batch] for loader in (pairs.train_dataloader(), pairs.predict_dataloader())
    )
    _, problems = np.unique([example.root.tokens.tobytes().hex() for example in held_out], return_inverse=True)
    prefer_longer = right(longer(seen)).mean() >= 0.5
    by_length = right(longer(held_out) if prefer_longer else -longer(held_out))
    ranked = right(margins)

    count = f"{len(rows)} pairs of {problems.max() + 1} held-out problems"
    table = Table(title=f"right above wrong, {count}", title_justify="left")
    for heading in ("", "accuracy", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    results = {
        "reward model": interval(ranked, problems),
        f"length alone ({'longer' if prefer_longer else 'shorter'})": interval(by_length, problems),
    }
    for name, (mean, low, high) in results.items():
        table.add_row(name, f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
    mean, low, high = interval(ranked - by_length, problems)
    table.add_row("difference", f"{100 * mean:+.1f} points", f"{100 * low:+.1f} to {100 * high:+.1f}")
    Console().print(table)
    better = results["reward model"][1] > 0.5
    print(f"better than chance: {'yes' if better else 'NO'}")
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
