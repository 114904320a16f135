"""Times MCTS over many prompts together against the same searches one prompt at a time.

    python benchmarks/search_speed.py                         # 16 prompts
    python benchmarks/search_speed.py --prompts 4 --rounds 5

Policy and process reward model are random and small; steps have four tokens, solutions up to 32. Values come from a
rollout of each new node, or from the process reward model, which reads the same tokens either way. The exit status says
whether 16 prompts with rollouts take at most a quarter of the time together. That they find together what each finds
alone is tested (``tests/inference``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.inference import MCTS, LocalEngine, ProcessScorer, SamplingParams, VerifierScorer
from rlhf_lightning.models import ProcessRewardModel, load_causal_lm, load_tokenizer
from rlhf_lightning.sequences import register_attention

NANO = str(Path(__file__).parents[1] / "configs/models/nano")
LEAST_SPEEDUP = 4.0


def digits(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward: the share of digits."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def compare(strategy: MCTS, prompts: list[str], rounds: int, clock: Callable[[], float]) -> float:
    """Runs both ways in turn; returns the median ratio of their times."""
    params, ratios = SamplingParams(max_new_tokens=32), []
    for turn in range(rounds + 1):
        start = clock()
        strategy.search(prompts, seeds=range(len(prompts)), sampling=params)
        middle = clock()
        for number, prompt in enumerate(prompts):
            strategy.search([prompt], seeds=[number], sampling=params)
        if turn:  # the first turn probes
            ratios.append((clock() - middle) / (middle - start))
    return statistics.median(ratios)


def main() -> int:
    """Prints both ratios, and checks the requirement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter

    loading: dict[str, Any] = {"init": "random", "dtype": torch.float32, "trainable": False}
    tokenizer = load_tokenizer(NANO)
    engine = LocalEngine(load_causal_lm(NANO, **loading), tokenizer)
    judge = load_causal_lm(NANO, attn_implementation=register_attention(), **loading)
    prompts = [row["prompt"] + "\n" for row in open_task(f"sums:prompts?rows={args.prompts}&split=test")]
    shared: dict[str, Any] = {"simulations": args.simulations, "actions": 3}
    shared |= {"step_separator": None, "max_step_tokens": 4}
    ways = {
        "rollouts": MCTS(engine, scorer=VerifierScorer(digits), rollouts=1, rollout_weight=1.0, **shared),
        "process reward model": MCTS(
            engine, scorer=ProcessScorer(ProcessRewardModel(judge, tokenizer=tokenizer)), **shared
        ),
    }
    found = {name: compare(strategy, prompts, args.rounds, clock) for name, strategy in ways.items()}
    for name, ratio in found.items():
        print(f"{name:22s} {args.prompts} prompts together are {ratio:.2f} times as fast as one at a time")
    holds = found["rollouts"] >= LEAST_SPEEDUP
    print(f"{'yes' if holds else 'NO '}  with rollouts at least {LEAST_SPEEDUP:g} times")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
