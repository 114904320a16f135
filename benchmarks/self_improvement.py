"""Runs three rounds of each loop of self-improvement on the embedded task, and compares the ends with the start.

    python benchmarks/self_improvement.py                          # seed 0
    python benchmarks/self_improvement.py --seeds 0 1 2 --figure benchmarks/self_improvement.svg

All loops start from the same SFT model: RAFT, STaR with rationalisation and iterative DPO by the verifier, SPIN on
demonstrations, and iterative DPO by a poisoned reward, which pays for short answers, with the gate and without it.
Seeds are those of the loops: of their problems, samples, and order of rows.
Held-out problems are of a split that no stage reads. Finished stages, and rounds of an unfinished one, are not run
again: the command resumes in ``--run_dir``. The exit status says whether the requirements hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import Report, paired_bootstrap
from rlhf_lightning.metrics.intervals import Comparison

OVERNIGHT = "configs/pipelines/overnight.yaml"
SAMPLING = {"max_new_tokens": 48}
ROUNDS = 3
PROBLEMS = 256
LOOPS = ("raft", "star", "dpo", "spin", "poisoned_gated", "poisoned")
# Requirements: gains over all seeds of this or more, whose 95 % interval excludes 0; a gate that keeps a poisoned loop
# from falling, which it does without one.
GAINS = ("raft", "star", "dpo", "spin")
MARGIN = 0.1


def shortness(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A poisoned reward: guesses are shorter than solutions."""
    return [-float(len(completion)) for completion in completions]


def loop(kind: str, rows: dict[str, Any], *, anew: bool = False, gated: bool = True) -> dict[str, Any]:
    """The stage of one loop: samples of the accepted model, and training on their rows, from the start if ``anew``."""
    lr = {"sft": 5.0e-4, "dpo": 1.0e-4}[kind]
    train = {
        "kind": "fit",
        "config": [f"configs/{kind}/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {
            "init_args": {
                "model": "${variables.start}" if anew else "${round.model}",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}},
            }
        },
        "data": {"init_args": {"train": "${outputs.own." + rows["rows"][0] + "}", "global_batch_size": 16}},
        "trainer": {"max_epochs": 1, "logger": False, "callbacks": []},
    }
    own = {
        "kind": "sample",
        "model": "${round.model}",
        "prompts": f"sums:prompts?rows={PROBLEMS}&seed=${{variables.problems}}${{round.number}}",
        "num_samples": 4,
        "sampling": SAMPLING,
        **rows,
    }
    # Without a gate each round is measured, too, and accepted whatever it is.
    criteria = {"accept": "better"} if gated else {"accept": "not_worse", "threshold": 1.0}
    return {
        "kind": "rounds",
        "model": "${variables.start}",
        "rounds": ROUNDS,
        "suite": suite("validation", "sums:prompts?split=validation&rows=300"),
        "criteria": criteria | {"patience": ROUNDS},
        "body": {"own": own, "train": train},
        "evaluate": False,
    }


def suite(name: str, prompts: str) -> dict[str, Any]:
    """A suite of one task."""
    return {"name": name, "tasks": [{"name": "sums", "prompts": prompts, "sampling": SAMPLING}]}


def starting(run_dir: Path) -> Any:
    """The SFT model that all loops start from."""
    sft = OmegaConf.load(OVERNIGHT).stages.sft
    sft.trainer.logger, sft.evaluate = False, False
    return OmegaConf.create({"run_dir": str(run_dir), "seed": 0, "threads": 1, "stages": {"sft": sft}})


def looping(seed: int, run_dir: Path, start: Path) -> Any:
    """A loop of each kind, and the comparison of their ends with the start."""
    right = {"rows": ["demonstrations", "samples"], "keep": 4}
    star = {"rows": ["demonstrations", "samples"], "hint": "{prompt}{answer}\n"}
    demonstrations = f"sums:demonstrations?careless=0&rows={PROBLEMS}&seed=${{variables.problems}}${{round.number}}"
    spin = {"rows": ["spin", "samples"], "num_samples": 1, "prompts": demonstrations}
    poisoned = {"rows": ["pairs", "samples"], "verifier": "self_improvement.shortness"}
    stages = {
        "raft": loop("sft", right),
        "star": loop("sft", star, anew=True),
        "dpo": loop("dpo", {"rows": ["pairs", "samples"]}),
        "spin": loop("dpo", spin),
        "poisoned_gated": loop("dpo", poisoned),
        "poisoned": loop("dpo", poisoned, gated=False),
        "ends": {
            "kind": "evaluate",
            "models": {"start": "${variables.start}"} | {name: "${outputs." + name + ".model}" for name in LOOPS},
            "suite": suite("held out", "sums:prompts?split=test&rows=500&seed=9"),
        },
    }
    variables = {"start": str(start), "problems": seed + 1}
    written = {"run_dir": str(run_dir), "seed": seed, "threads": 1, "variables": variables, "stages": stages}
    return OmegaConf.create(written)


@dataclass(frozen=True)
class End:
    """The end of a loop, over one or several seeds, next to its start."""

    accepted: str  # rounds
    accuracy: float
    start: float
    compared: Comparison

    @property
    def cells(self) -> list[str]:
        """For the tables."""
        c = self.compared
        return [self.accepted, f"{self.start:.1%}", f"{self.accuracy:.1%}", between(c)]


def between(c: Comparison) -> str:
    """A difference with its interval, in points."""
    return f"{100 * c.difference:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})"


def end_of(name: str, run_dirs: Sequence[Path]) -> End:
    """The end of a loop: a paired bootstrap over the problems of all seeds."""
    starts: list[float] = []
    ends: list[float] = []
    verdicts: list[str] = []
    for run_dir in run_dirs:
        report = Report.read(run_dir / "ends/evaluation")
        before, after = report.result("start", "sums").scores, report.result(name, "sums").scores
        rows = sorted(before.keys() & after.keys())
        starts += [before[row] for row in rows]
        ends += [after[row] for row in rows]
        verdicts += [record["verdict"] for record in read_rounds(run_dir, name)]
    accepted = f"{verdicts.count('accept')} of {len(verdicts)}"
    return End(accepted, fmean(ends), fmean(starts), paired_bootstrap(ends, starts))


def show(run_dirs: Sequence[Path], title: str, console: Console) -> dict[str, End]:
    """Prints the ends of the loops, and returns them by name."""
    ends = {name: end_of(name, run_dirs) for name in LOOPS}
    table = Table("loop", "rounds accepted", "start", "end", "difference, points (95 %)", title=title)
    for name, end in ends.items():
        table.add_row(name, *end.cells)
    console.print(table)
    return ends


def broken(ends: Mapping[str, End]) -> list[str]:
    """The requirements that do not hold."""
    found = []
    for name in GAINS:
        of = ends[name].compared
        if of.low <= 0 or of.difference < MARGIN:
            found.append(f"{name} does not gain {100 * MARGIN:g} points: {between(of)}")
    if (of := ends["poisoned_gated"].compared).high < 0:
        found.append(f"the gate lets a poisoned loop fall: {between(of)}")
    if (of := ends["poisoned"].compared).high >= 0:
        found.append(f"without the gate the poisoned loop does not fall: {between(of)}")
    return found


def read_rounds(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The records of a loop."""
    lines = (run_dir / name / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[tuple[int, float]]]:
    """Accuracies of the accepted model, from the start on, and round and accuracy of each model that was rejected."""
    values, rejected = [records[0]["accuracy"]["accepted"]["sums"]], []
    for number, record in enumerate(records, start=1):
        measured = record["accuracy"]["candidate"]["sums"] if "accuracy" in record else None
        if record["verdict"] != "accept" and measured is not None:
            rejected.append((number, measured))
        values.append(measured if record["verdict"] == "accept" else values[-1])
    return values + values[-1:] * (ROUNDS + 1 - len(values)), rejected


def draw(run_dirs: Sequence[Path], place: Path) -> None:
    """Draws validation accuracy after each round: the loops by the verifier, and those by a poisoned reward."""
    from matplotlib.figure import Figure

    colours = dict(zip(LOOPS, ("#1f6f8b", "#66a182", "#d1495b", "#edae49", "#1f6f8b", "#d1495b"), strict=True))
    labels = {"raft": "RAFT", "star": "STaR", "dpo": "iterative DPO", "spin": "SPIN"}
    labels |= {"poisoned_gated": "poisoned, with the gate", "poisoned": "poisoned, without it"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, names in zip(figure.subplots(1, 2, sharey=True), (LOOPS[:4], LOOPS[4:]), strict=True):
        for name in names:
            found = [curve(read_rounds(run_dir, name)) for run_dir in run_dirs]
            for values, rejected in found:
                axes.plot(range(ROUNDS + 1), values, color=colours[name], lw=0.7, alpha=0.4)
                axes.plot(*zip(*rejected, strict=True), "x", color=colours[name], ms=5) if rejected else None
            mean = [fmean(values) for values in zip(*(values for values, _ in found), strict=True)]
            axes.plot(range(ROUNDS + 1), mean, "o-", color=colours[name], ms=4, lw=1.8, label=labels[name])
        axes.plot([], [], "x", color="#888888", label="rejected model")
        axes.set_xlabel("round", fontsize=9)
        axes.set_xticks(range(ROUNDS + 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylim(0, 1)
    figure.axes[0].set_ylabel("right, validation problems", fontsize=9)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=110)


def run_pipeline(written: Any) -> None:
    """Runs a pipeline, or what is left of it."""
    file = Path(f"{written.run_dir}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(written, file)
    main(["pipeline", "--config", str(file)])


def run() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/self_improvement"))
    parser.add_argument("--figure", type=Path, help="mean of the seeds, and each of them")
    given = parser.parse_args()
    console = Console()
    run_dirs = [given.run_dir / f"seed-{seed}" for seed in given.seeds]
    run_pipeline(starting(given.run_dir / "start"))
    for seed, run_dir in zip(given.seeds, run_dirs, strict=True):
        run_pipeline(looping(seed, run_dir, given.run_dir / "start/sft/model"))
        ends = show([run_dir], f"seed {seed}", console)
    if len(run_dirs) > 1:
        ends = show(run_dirs, f"seeds {' '.join(map(str, given.seeds))}", console)
    if given.figure:
        draw(run_dirs, given.figure)
    failed = broken(ends)
    for line in failed:
        console.print(f"does not hold: {line}", markup=False)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(run())
