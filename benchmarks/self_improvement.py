"""Runs three rounds of each loop of self-improvement on the embedded task, and compares the ends with the start.

    python benchmarks/self_improvement.py                          # seed 0
    python benchmarks/self_improvement.py --seeds 0 1 2
    python benchmarks/self_improvement.py --figure benchmarks/self_improvement.png

All loops start from the same SFT model: rejection sampling and iterative DPO by the verifier, SPIN on demonstrations,
and iterative DPO by a poisoned reward, which pays for short answers, with the gate and without it. Held-out problems
are of a split that no stage reads. Finished stages are not repeated. The exit status says whether requirements hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import Report

OVERNIGHT = "configs/pipelines/overnight.yaml"
ROUNDS = 3
LOOPS = ("raft", "dpo", "spin", "poisoned_gated", "poisoned")
# Requirements: gains whose 95 % interval excludes 0; a gate that keeps a poisoned loop from falling.
GAINS = ("raft", "dpo", "spin")


def shortness(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A poisoned reward: guesses are shorter than solutions."""
    return [-float(len(completion)) for completion in completions]


def loop(kind: str, rows: dict[str, Any], gated: bool) -> dict[str, Any]:
    """The stage of one loop."""
    lr = {"sft": 2.0e-4, "dpo": 1.0e-4}[kind]
    train = {
        "kind": "fit",
        "config": [f"configs/{kind}/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {
            "init_args": {
                "model": "${round.model}",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}},
            }
        },
        "data": {"init_args": {"train": "${outputs.own." + rows["rows"][0] + "}", "global_batch_size": 32}},
        "trainer": {"max_epochs": 1, "logger": False, "callbacks": []},
    }
    own = {
        "kind": "sample",
        "model": "${round.model}",
        "prompts": "sums:prompts?rows=512&seed=${seed}",
        "num_samples": 4,
        "sampling": {"max_new_tokens": 48},
        **rows,
    }
    task = {"name": "sums", "prompts": "sums:prompts?split=validation&rows=400", "sampling": {"max_new_tokens": 48}}
    # Without a gate each round is measured, too, and accepted whatever it is.
    criteria = {"accept": "better"} if gated else {"accept": "not_worse", "threshold": 1.0}
    return {
        "kind": "rounds",
        "model": "${outputs.sft.model}",
        "rounds": ROUNDS,
        "suite": {"name": "validation", "tasks": [task]},
        "criteria": criteria | {"patience": ROUNDS},
        "body": {"own": own, "train": train},
        "evaluate": False,
    }


def pipeline(seed: int, run_dir: Path) -> Any:
    """The SFT model, a loop of each kind, and their comparison."""
    sft = OmegaConf.load(OVERNIGHT).stages.sft
    sft.trainer.logger, sft.evaluate = False, False
    poisoned = {"rows": ["pairs", "samples"], "verifier": "self_improvement.shortness"}
    spin = {
        "rows": ["spin", "samples"],
        "num_samples": 1,
        "prompts": "sums:demonstrations?careless=0&rows=512&seed=${seed}",
    }
    stages = {
        "sft": sft,
        "raft": loop("sft", {"rows": ["demonstrations", "samples"]}, gated=True),
        "dpo": loop("dpo", {"rows": ["pairs", "samples"]}, gated=True),
        "spin": loop("dpo", spin, gated=True),
        "poisoned_gated": loop("dpo", poisoned, gated=True),
        "poisoned": loop("dpo", poisoned, gated=False),
        "ends": {
            "kind": "evaluate",
            "models": {name: "${outputs." + name + ".model}" for name in ("sft", *LOOPS)},
            "suite": {
                "name": "held out",
                "tasks": [
                    {
                        "name": "sums",
                        "prompts": "sums:prompts?split=test&rows=500&seed=9",
                        "sampling": {"max_new_tokens": 48},
                    }
                ],
            },
        },
    }
    return OmegaConf.create({"run_dir": str(run_dir), "seed": seed, "threads": 1, "stages": stages})


def show(seed: int, run_dir: Path, console: Console) -> list[str]:
    """Prints the ends of the loops; returns the requirements that do not hold."""
    report = Report.read(run_dir / "ends/evaluation")
    table = Table("loop", "rounds accepted", "right", "difference from the start", title=f"seed {seed}")
    start = report.result("sft", "sums").accuracy
    table.add_row("start", "", f"{start.value:.1%}", "")
    broken = []
    for name in LOOPS:
        records = read_rounds(run_dir, name)
        verdicts = [record["verdict"] for record in records]
        found = report.comparison(name, "sums")
        assert found is not None
        of = found.comparison
        accuracy = report.result(name, "sums").accuracy.value
        between = f"{of.difference:+.1%} ({of.low:+.1%} to {of.high:+.1%})"
        table.add_row(name, f"{verdicts.count('accept')} of {len(verdicts)}", f"{accuracy:.1%}", between)
        if name in GAINS and of.low <= 0:
            broken.append(f"seed {seed}: {name} does not gain: {between}")
        if name == "poisoned_gated" and of.high < 0:
            broken.append(f"seed {seed}: the gate lets a poisoned loop fall: {between}")
        if name == "poisoned" and of.high >= 0:
            broken.append(f"seed {seed}: without the gate the poisoned loop does not fall: {between}")
    console.print(table)
    return broken


def read_rounds(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The records of a loop."""
    lines = (run_dir / name / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw(run_dir: Path, place: str) -> None:
    """Draws the accuracy on validation problems after each round: of the model that the loop continues from."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in LOOPS:
        records = read_rounds(run_dir, name)
        values = [records[0]["accuracy"]["accepted"]["sums"]]
        for record in records:
            measured = record["accuracy"]["candidate"]["sums"] if "accuracy" in record else values[-1]
            if record["verdict"] == "accept":
                values.append(measured)
            else:
                axes.plot([len(values)], [measured], "x", color="#888888")
                values.append(values[-1])
        axes.plot(range(len(values)), values, marker="o", markersize=4, label=name.replace("_", ", "))
    axes.set_xlabel("round (crosses: rejected)")
    axes.set_ylabel("right, validation")
    axes.set_xticks(range(ROUNDS + 1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(place, dpi=110)


def run() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--run_dir", default="runs/self_improvement")
    parser.add_argument("--figure", help="of the first seed")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # the poisoned reward is found by its dotted path
    console, broken = Console(), []
    for seed in given.seeds:
        run_dir = Path(given.run_dir) / f"seed-{seed}"
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = run_dir.parent / f"seed-{seed}.yaml"
        OmegaConf.save(pipeline(seed, run_dir), file)
        main(["pipeline", "--config", str(file)])
        broken += show(seed, run_dir, console)
    if given.figure:
        draw(Path(given.run_dir) / f"seed-{given.seeds[0]}", given.figure)
    for line in broken:
        console.print(f"does not hold: {line}", markup=False)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(run())
