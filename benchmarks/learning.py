"""Does it learn? The quickstart over several seeds: test accuracy after SFT, after DPO, and after DPO without a stop.

    python benchmarks/learning.py                         # seeds 0, 1, 2
    python benchmarks/learning.py --seeds 0 1 2 3 4 --run_dir runs/learning

What is required: SFT between 30 % and 75 %, and DPO at least 15 points above it, both as means over the seeds. Runs
that are finished are not repeated. The exit status says whether the requirements hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LEAST, MOST, MARGIN = 0.30, 0.75, 0.15
STAGES = ("sft", "dpo", "dpo_longer")


def run(config: str, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs a pipeline in a process of its own and returns its summary."""
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", "--config", config, "--run_dir", str(run_dir)]
    subprocess.run([*command, *overrides], check=True)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def main() -> int:
    """Runs all seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pipelines/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()

    table = Table(title="test accuracy (greedy, exact answer)", title_justify="left")
    for heading in ("seed", *STAGES, "DPO - SFT", "minutes"):
        table.add_column(heading, justify="right")
    accuracies: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for seed in args.seeds:
        summary = run(args.config, args.run_dir / f"seed-{seed}", [f"seed={seed}", *args.overrides])
        stages = {stage["stage"]: stage for stage in summary["stages"]}
        for stage in STAGES:
            accuracies[stage].append(stages[stage]["test_accuracy"])
        seconds = sum(stage["seconds"] for stage in stages.values())
        table.add_row(str(seed), *_row({stage: accuracies[stage][-1] for stage in STAGES}), f"{seconds / 60:.1f}")
    means = {stage: statistics.mean(values) for stage, values in accuracies.items()}
    table.add_section()
    table.add_row("mean", *_row(means), "")
    Console().print(table)
    competent = LEAST <= means["sft"] <= MOST
    learned = means["dpo"] - means["sft"] >= MARGIN
    print(f"SFT between {LEAST:.0%} and {MOST:.0%}: {'yes' if competent else 'NO'}")
    print(f"DPO at least {MARGIN:.0%} above: {'yes' if learned else 'NO'}")
    return 0 if competent and learned else 1


def _row(values: dict[str, float]) -> list[str]:
    return [*(f"{values[stage]:.1%}" for stage in STAGES), f"{100 * (values['dpo'] - values['sft']):+.1f} points"]


if __name__ == "__main__":
    sys.exit(main())
