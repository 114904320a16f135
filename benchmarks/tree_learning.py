"""Trains GRPO on samples and on search trees from the same short SFT, on the embedded task, over several seeds.

    python benchmarks/tree_learning.py                          # seeds 0, 1, 2
    python benchmarks/tree_learning.py --seeds 0 --kinds beam   # some of it

Prints the accuracy of greedy completions of test problems before and after, the tokens drawn and the seconds. Each kind
has the same prompts and steps; searches draw more tokens and share some. The exit status says whether every kind gains
at least 10 points with every seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch

from rlhf_lightning import GRPOModule, SFTModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule
from rlhf_lightning.evaluation.answers import answer_prompts, load_verifier, read_prompts
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import load_causal_lm, load_tokenizer

LEAST_GAIN = 0.10
VERIFIER = "rlhf_lightning.rewards.exact_answer"
NANO = str(Path(__file__).parents[1] / "configs/models/nano")
BEAM = {"class_path": "BeamSearch", "init_args": {"width": 2, "expand": 3}}
MCTS = {"class_path": "MCTS", "init_args": {"simulations": 6, "actions": 3, "rollouts": 1, "rollout_weight": 1.0}}
KINDS: dict[str, dict[str, Any]] = {
    "samples": {"rollouts": "samples"},
    "beam": {"rollouts": BEAM},
    "mcts": {"rollouts": MCTS, "comparison": "subtree", "visit_weights": "log"},
    "mixed": {"rollouts": ["samples", BEAM], "comparison": "sibling"},
}


class Tokens(lightning.Callback):
    """Adds up the tokens that were drawn, whole trees included."""

    def __init__(self) -> None:
        self.drawn = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Counts those of an iteration."""
        searched = trainer.callback_metrics.get("train/tree/search_tokens", torch.tensor(0.0))
        sampled = [c for group in pl_module.last_rollouts.completions for c in group if not hasattr(c, "branch")]
        self.drawn += float(searched) + sum(len(completion.token_ids) for completion in sampled)


def fit(module: Any, data: Any, steps: int, folder: Path, *callbacks: lightning.Callback) -> float:
    """Trains, exports, and returns the seconds."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    module.save_pretrained(str(folder))
    return seconds


def accuracy(folder: Path, rows: int) -> float:
    """The share of test problems whose greedy completion is right."""
    model, tokenizer = load_causal_lm(str(folder), dtype=torch.float32, trainable=False), load_tokenizer(str(folder))
    prompts = read_prompts(f"sums:prompts?split=test&rows={rows}", tokenizer)
    greedy = SamplingParams(max_new_tokens=64, temperature=0.0)
    groups = answer_prompts(LocalEngine(model, tokenizer), prompts, load_verifier(VERIFIER), sampling=greedy)
    return statistics.mean(float(group[0].reward or 0.0) for group in groups)


def start(seed: int, steps: int, folder: Path) -> None:
    """Trains a model on demonstrations, half of them guesses."""
    lightning.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0)
    schedule = partial(WarmupSchedule, warmup_steps=0.1, decay="cosine")
    module = SFTModule(NANO, init="random", optimizer=optimizer, lr_scheduler=schedule)
    train = f"sums:demonstrations?rows={64 * steps}&seed={seed}"
    fit(module, SFTDataModule(train=train, global_batch_size=64, seed=seed), steps, folder)


def main() -> int:
    """Prints a table and checks the requirement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--sft_steps", type=int, default=700)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--test_rows", type=int, default=300)
    args = parser.parse_args()

    torch.set_num_threads(1)
    learned = True
    print(f"{'seed':>4} {'kind':8} {'accuracy':>8} {'gain':>6} {'tokens':>8} {'seconds':>7}", flush=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as place:
            sft = Path(place) / "sft"
            start(seed, args.sft_steps, sft)
            before = accuracy(sft, args.test_rows)
            print(f"{seed:4} {'sft':8} {before:8.3f}", flush=True)
            for kind in args.kinds:
                module = GRPOModule(
                    str(sft),
                    rewards=[VERIFIER],
                    num_generations=8,
                    max_completion_length=64,
                    tree=KINDS[kind],
                    optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
                    lr_scheduler=partial(WarmupSchedule, warmup_steps=10, decay="constant"),
                    seed=seed,
                )
                train = f"sums:prompts?rows={16 * args.iterations}&seed={seed}3"
                data, tokens = PromptDataModule(train=train, global_batch_size=16, seed=seed), Tokens()
                seconds = fit(module, data, args.iterations, Path(place) / kind, tokens)
                after = accuracy(Path(place) / kind, args.test_rows)
                learned = learned and after - before >= LEAST_GAIN
                told = f"{after:8.3f} {after - before:+6.3f} {tokens.drawn:8.0f} {seconds:7.0f}"
                print(f"{seed:4} {kind:8} {told}", flush=True)
    print(f"{'yes' if learned else 'NO '}  every kind gains at least {LEAST_GAIN:.0%} with every seed")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
