"""Runs three rounds of each loop of self-improvement on the embedded task, and compares the ends with the start.

    python benchmarks/self_improvement.py                          # seed 0
    python benchmarks/self_improvement.py --seeds 0 1 2 --figure benchmarks/self_improvement.svg
    python benchmarks/self_improvement.py --loops judged league    # some loops of those in self_improvement_loops.py

Most loops start from the same SFT model. Those in which the model judges or revises answers, or writes problems, start
from one that has learned this as well. Two are iterative DPO by a poisoned reward, which pays for short answers, with
the gate and without it. Seeds are those of the loops: of their problems, samples, and order of rows. Held-out problems
are of a split that no stage reads; of the problems that a model writes, one or two may be among them.

Finished stages, and rounds of an unfinished one, are not run again: the command resumes in ``--run_dir``. Three seeds
of all take under 20 minutes of one core. The exit status says whether the requirements hold.
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
from self_improvement_loops import LOOPS, PANELS, ROUNDS, UNFIT, looping, starting

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import Report, paired_bootstrap
from rlhf_lightning.metrics.intervals import Comparison

# Requirements: gains over all seeds of this or more, whose 95 % interval excludes 0; a gate that keeps a poisoned loop
# from falling, which it does without one.
MARGIN = 0.1
COLOURS = ("#1f6f8b", "#66a182", "#d1495b", "#edae49", "#7a5195", "#8d6e63", "#444444", "#00a6a6")


def shortness(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A poisoned reward: guesses are shorter than solutions."""
    return [-float(len(completion)) for completion in completions]


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
    """The end of a loop: a paired bootstrap over problems, of the means over seeds.

    All seeds answer the same problems, from the same start: a problem with its answers is what is drawn.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    verdicts: list[str] = []
    for run_dir in run_dirs:
        report = Report.read(run_dir / "ends/evaluation")
        before, after = report.result(LOOPS[name].start, "sums").scores, report.result(name, "sums").scores
        for row in sorted(before.keys() & after.keys()):
            found.setdefault(row, []).append((before[row], after[row]))
        verdicts += [record["verdict"] for record in read_rounds(run_dir, name)]
    starts, ends = ([fmean(one[n] for one in pairs) for pairs in found.values()] for n in (0, 1))
    accepted = f"{verdicts.count('accept')} of {len(verdicts)}"
    return End(accepted, fmean(ends), fmean(starts), paired_bootstrap(ends, starts))


def show(names: Sequence[str], run_dirs: Sequence[Path], title: str, console: Console) -> dict[str, End]:
    """Prints the ends of loops, and returns them by name."""
    ends = {name: end_of(name, run_dirs) for name in names}
    table = Table("loop", "rounds accepted", "start", "end", "difference, points (95 %)", title=title)
    for name, end in ends.items():
        table.add_row(LOOPS[name].label, *end.cells)
    console.print(table)
    return ends


def broken(ends: Mapping[str, End]) -> list[str]:
    """The requirements that do not hold."""
    found = []
    for name, end in ends.items():
        of = end.compared
        if name not in UNFIT and (of.low <= 0 or of.difference < MARGIN):
            found.append(f"{name} does not gain {100 * MARGIN:g} points: {between(of)}")
        elif name in UNFIT and name != "poisoned" and of.high < 0:
            found.append(f"the gate lets {name} fall: {between(of)}")
        elif name == "poisoned" and of.high >= 0:
            found.append(f"without the gate the poisoned loop does not fall: {between(of)}")
    return found


def read_rounds(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The records of a loop: of its stage, or the decisions of its gate within one fit."""
    file = run_dir / name / "rounds.jsonl"
    if file.is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((run_dir / f"{name}/accepted/manifest.json").read_text(encoding="utf-8"))
    return [
        found
        | {
            "accuracy": {
                "accepted": {"sums": found["scores"]["sums"] - found["difference"]},
                "candidate": found["scores"],
            }
        }
        for found in manifest["decisions"]
    ]


def curve(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[tuple[int, float]]]:
    """Accuracies of the accepted model, from the start on, and round and accuracy of each model that was rejected."""
    # A round without a row has no accuracies.
    values, rejected = [next(r["accuracy"]["accepted"]["sums"] for r in records if "accuracy" in r)], []
    for number, record in enumerate(records, start=1):
        measured = record["accuracy"]["candidate"]["sums"] if "accuracy" in record else None
        if record["verdict"] != "accept" and measured is not None:
            rejected.append((number, measured))
        values.append(measured if record["verdict"] == "accept" else values[-1])
    return values + values[-1:] * (ROUNDS + 1 - len(values)), rejected


def draw(names: Sequence[str], run_dirs: Sequence[Path], place: Path) -> None:
    """Draws validation accuracy after each round, in a panel for loops of each kind."""
    from matplotlib.figure import Figure

    panels = {title: [name for name in loops if name in names] for title, loops in PANELS.items()}
    panels = {title: members for title, members in panels.items() if members}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * lines), layout="constrained")
    drawn = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in drawn[len(panels) :]:
        axes.remove()
    for axes, (title, members) in zip(drawn, panels.items(), strict=False):
        for colour, name in zip(COLOURS, members, strict=False):
            found = [curve(read_rounds(run_dir, name)) for run_dir in run_dirs]
            last = max(len(values) for values, _ in found)
            found = [(values + values[-1:] * (last - len(values)), rejected) for values, rejected in found]
            for values, rejected in found:
                axes.plot(range(last), values, color=colour, lw=0.7, alpha=0.4)
                axes.plot(*zip(*rejected, strict=True), "x", color=colour, ms=5) if rejected else None
            mean = [fmean(values) for values in zip(*(values for values, _ in found), strict=True)]
            axes.plot(range(last), mean, "o-", color=colour, ms=4, lw=1.8, label=LOOPS[name].label)
        axes.plot([], [], "x", color="#888888", label="rejected model")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("round", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    drawn[0].set_ylim(0, 1.03)
    for axes in drawn[::columns]:
        axes.set_ylabel("right, validation problems", fontsize=9)
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
    parser.add_argument("--loops", choices=[*LOOPS], nargs="+", default=[*LOOPS], help="all by default")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/self_improvement"))
    parser.add_argument("--figure", type=Path, help="mean of the seeds, and each of them")
    given = parser.parse_args()
    console = Console()
    run_dirs = [given.run_dir / f"seed-{seed}" for seed in given.seeds]
    run_pipeline(starting(given.run_dir / "start"))
    for seed, run_dir in zip(given.seeds, run_dirs, strict=True):
        run_pipeline(looping(seed, run_dir, given.run_dir / "start", given.loops))
        ends = show(given.loops, [run_dir], f"seed {seed}", console)
    if len(run_dirs) > 1:
        ends = show(given.loops, run_dirs, f"seeds {' '.join(map(str, given.seeds))}", console)
    if given.figure:
        draw(given.loops, run_dirs, given.figure)
    failed = broken(ends)
    for line in failed:
        console.print(f"does not hold: {line}", markup=False)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(run())
