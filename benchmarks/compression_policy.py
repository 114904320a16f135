"""Trains policies by GRPO with frozen compressors on the task of recall.

    python benchmarks/compression_quality.py --keep runs/compression      # makes the models
    python benchmarks/compression_policy.py --models runs/compression     # seeds 0, 1, 2

The decoders of those compressors go on to ask questions after their first answer, so that no completion counts as
right. A few steps of demonstrations make a policy that stops now and then; GRPO has to teach the rest from the reward
alone, with the summaries of the contexts in view.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from compression_quality import FACTS, LENGTH, accuracy

from rlhf_lightning import GRPOModule, SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.rewards import exact_answer

SHAPE = f"length={LENGTH}&facts={FACTS}&value=1"
TOKENS = 4  # of a completion at most


def fit(module: Any, data: Any, steps: int, folder: Path) -> str:
    """Trains a policy; returns the folder of its export."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelExport(str(folder))],
    )
    trainer.fit(module, data)
    return str(folder)


def right(policy: str, compressor: str, temperature: float) -> float:
    """Accuracy on 200 questions of the test split, 1 where a completion holds the answer and stops."""
    engine = LocalEngine.from_pretrained(policy, compressor=compressor)
    rows = open_task(f"recall:prompts?split=test&rows=200&{SHAPE}&questions={FACTS}")
    prompts, contexts = [row["prompt"] for row in rows], [row["context"] for row in rows]
    sampling = SamplingParams(max_new_tokens=TOKENS, temperature=temperature, seed=0)
    texts = [group[0].text for group in engine.generate(prompts, 1, sampling, contexts=contexts)]
    return accuracy([int(value or 0) for value in exact_answer(prompts, texts, [row["answer"] for row in rows])])


def main() -> None:
    """Trains and measures every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="what compression_quality.py was given as --keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of GRPO")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        place = args.models / f"seed-{seed}"
        front = str(place / "compressor-4")
        lightning.seed_everything(seed, verbose=False)
        shown = f"recall:demonstrations?rows=400&seed={seed + 50}&{SHAPE}"
        sft = SFTModule(front, compressor=front, optimizer=partial(torch.optim.AdamW, lr=1e-4))
        policy = fit(sft, SFTDataModule(train=shown, global_batch_size=16), 6, place / "policy-start")
        before = [right(policy, front, temperature) for temperature in (0.0, 1.0)]

        grpo = GRPOModule(
            policy,
            compressor=front,
            rewards=["rlhf_lightning.rewards.exact_answer"],
            num_generations=8,
            max_completion_length=TOKENS,
            optimizer=partial(torch.optim.AdamW, lr=3e-4),
        )
        asked = f"recall:prompts?rows={16 * args.steps}&seed={seed + 60}&{SHAPE}"
        policy = fit(grpo, PromptDataModule(train=asked, global_batch_size=16), args.steps, place / "policy")
        after = [right(policy, front, temperature) for temperature in (0.0, 1.0)]
        print(f"seed {seed}: greedy {before[0]:.1%} -> {after[0]:.1%}, sampled {before[1]:.1%} -> {after[1]:.1%}")


if __name__ == "__main__":
    main()
