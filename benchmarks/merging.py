"""Trains two specialists from one start, merges them by every method, and tests both skills; or measures speed.

    python benchmarks/merging.py                                    # seeds 0, 1, 2: the table
    python benchmarks/merging.py --figure benchmarks/merging.png    # and a figure
    python benchmarks/merging.py --speed                            # time and memory of a merge on disk instead

The skills are sums of three small numbers and sums of three large ones. A model of both, trained too briefly, is the
start; each specialist continues with one skill at a constant rate, and exports its last checkpoints. Methods have their
default options unless the table says otherwise. Soups are chosen on validation problems; everything else is greedy
accuracy on test problems. The exit status says whether the requirements hold with every seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import merging_speed
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.evaluation.answers import answer_prompts, load_verifier, read_prompts
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.merging import EnsemblePolicy, greedy_soup, merge, uniform_soup
from rlhf_lightning.models import load_causal_lm, load_tokenizer

LEAST_KEPT = 0.90
VERIFIER = load_verifier("rlhf_lightning.rewards.exact_answer")
NANO = str(Path(__file__).parents[1] / "configs/models/nano")
SKILLS = {"small": "terms=3&low=1&high=20", "large": "terms=3&low=50&high=90"}
GREEDY = SamplingParams(max_new_tokens=32, temperature=0.0)
BATCH = 64
# A label, the method, and its options.
MERGES: list[tuple[str, str, dict[str, Any]]] = [
    ("linear", "linear", {}),
    ("slerp", "slerp", {}),
    ("karcher", "karcher", {}),
    ("geometric_median", "geometric_median", {}),
    ("model_stock", "model_stock", {}),
    ("task_arithmetic", "task_arithmetic", {}),
    ("ties", "ties", {}),
    ("ties, density 0.5", "ties", {"density": 0.5}),
    ("dare", "dare", {}),
    ("dare_ties", "dare_ties", {}),
    ("della", "della", {}),
    ("breadcrumbs", "breadcrumbs", {}),
    ("sign_consensus", "sign_consensus", {}),
    ("fisher", "fisher", {}),
    ("regmean", "regmean", {}),
]
Accuracies = tuple[float, float]


# Training.


def demonstrations(skills: Sequence[str], rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows of some skills in turn, all by the careful author."""
    query = f"&rows={rows // len(skills)}&seed={seed}&careless=0"
    parts = [open_task(f"sums:demonstrations?{SKILLS[skill]}{query}") for skill in skills]
    return [row for rows_of_skills in zip(*parts, strict=True) for row in rows_of_skills]


def train(
    start: str,
    skills: Sequence[str],
    steps: int,
    folder: Path,
    seed: int,
    *,
    rate: float,
    decay: str,
    every: int | None,
) -> None:
    """Trains on some skills; exports the model, or a model every so many steps."""
    lightning.seed_everything(seed, verbose=False)
    init = {"init": "random"} if start == NANO else {}
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
    schedule = partial(WarmupSchedule, warmup_steps=0.1, decay=decay)
    module = SFTModule(start, optimizer=optimizer, lr_scheduler=schedule, **init)
    data = SFTDataModule(train=demonstrations(skills, BATCH * steps, seed), global_batch_size=BATCH, seed=seed)
    export = ModelExport(str(folder if every is None else folder / "model-{step}"), every_n_steps=every)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[export],
    )
    trainer.fit(module, data)


def accuracy(engine: Any, skill: str, split: str, rows: int) -> float:
    """The share of problems whose greedy completion is right."""
    prompts = read_prompts(f"sums:prompts?split={split}&rows={rows}&{SKILLS[skill]}", engine.tokenizer)
    groups = answer_prompts(engine, prompts, VERIFIER, sampling=GREEDY)
    return statistics.mean(float(group[0].reward or 0.0) for group in groups)


def both(folder: Path, split: str, rows: int) -> Accuracies:
    """Accuracy of a model's folder on the two skills."""
    model = load_causal_lm(str(folder), dtype=torch.float32, trainable=False)
    engine = LocalEngine(model, load_tokenizer(str(folder)))
    small, large = (accuracy(engine, skill, split, rows) for skill in SKILLS)
    return small, large


# One seed.


def specialists(place: Path, seed: int, args: argparse.Namespace) -> tuple[Path, dict[str, list[Path]]]:
    """Trains the start and the specialists; returns the start and every specialist's checkpoints, the last one last."""
    start = place / "start"
    train(NANO, [*SKILLS], args.start_steps, start, seed, rate=2e-3, decay="cosine", every=None)
    found = {}
    for number, skill in enumerate(SKILLS, start=1):
        folder, every = place / skill, args.steps // 8
        train(
            str(start), [skill], args.steps, folder, 10 * seed + number, rate=args.rate, decay="constant", every=every
        )
        found[skill] = sorted(folder.glob("model-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    return start, found


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains, merges and tests with one seed."""
    found: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        start, checkpoints = specialists(place, seed, args)
        ends = [checkpoints[skill][-1] for skill in SKILLS]
        table = found["accuracies"] = {"start": both(start, "test", args.rows)}
        for skill, end in zip(SKILLS, ends, strict=True):
            table[f"specialist, {skill}"] = both(end, "test", args.rows)
        print(f"seed {seed}", table, flush=True)

        rows = place / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in demonstrations([*SKILLS], 256, seed + 100)))
        for label, method, options in MERGES:
            data = {"rows": str(rows)} if method in ("fisher", "regmean") else {}
            merge(method, base=start, models=ends, output=place / "merged", **options, **data)
            table[label] = both(place / "merged", "test", args.rows)
            print(f"  {label:20s} {table[label]}", flush=True)

        def measure(folder: Path) -> float:
            return statistics.mean(both(folder, "validation", args.rows))

        models = [*checkpoints["small"][-2:], *checkpoints["large"][-2:]]
        soup = greedy_soup(models, place / "soup", evaluate=measure)
        found["soup"] = {"value": soup.value, "best": max(soup.values), "ingredients": len(soup.ingredients)}
        table["greedy soup of four"] = both(place / "soup", "test", args.rows)
        engine = EnsemblePolicy([str(end) for end in ends], combine="arithmetic")
        table["ensemble (no merge)"] = tuple(accuracy(engine, skill, "test", args.rows) for skill in SKILLS)

        # The mean of the last checkpoints of each specialist, on its own skill.
        found["means"] = {}
        for number, skill in enumerate(SKILLS):
            last = checkpoints[skill][-args.last :]
            mean = both(uniform_soup(last, place / f"mean-{skill}"), "test", args.rows)[number]
            found["means"][skill] = {"last": table[f"specialist, {skill}"][number], "mean": mean}
    print(f"seed {seed}", found["soup"], found["means"], flush=True)
    return found


# The result.


def kept(table: dict[str, Accuracies], label: str) -> Accuracies:
    """The shares of the specialists' accuracies that a model has."""
    small, large = (table[f"specialist, {skill}"][number] for number, skill in enumerate(SKILLS))
    return table[label][0] / small, table[label][1] / large


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A row for each model, best first: accuracy on both skills with every seed, and the least share that is kept."""
    tables = [result["accuracies"] for result in results]
    worst = {label: min(min(kept(table, label)) for table in tables) for label in tables[0]}
    seeds = " | ".join(f"seed {result['seed']}: {' / '.join(SKILLS)}" for result in results)
    lines = [f"| | {seeds} | least kept |", "|---|" + "---|" * (len(results) + 1)]
    first = [label for label in worst if label == "start" or label.startswith("specialist")]
    for label in first + sorted(set(worst) - set(first), key=lambda label: -worst[label]):
        cells = " | ".join(f"{table[label][0]:.1%} / {table[label][1]:.1%}" for table in tables)
        lines.append(f"| {label} | {cells} | {worst[label]:.0%} |")
    for skill in SKILLS:
        cells = " | ".join("{last:.1%} -> {mean:.1%}".format(**result["means"][skill]) for result in results)
        lines.append(f"| {skill}: last checkpoint -> mean of the last | {cells} | |")
    return "\n".join(lines)


def requirements(results: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The requirements, and whether every seed meets them."""
    tables = [result["accuracies"] for result in results]
    labels = [label for label, _, _ in MERGES]
    best = max(labels, key=lambda label: min(min(kept(table, label)) for table in tables))
    good = all(min(kept(table, best)) >= LEAST_KEPT for table in tables)
    soups = [result["soup"] for result in results]
    return {
        f"the best method ({best}) keeps at least {LEAST_KEPT:.0%} of both skills": good,
        "no greedy soup is below its best member": all(soup["value"] >= soup["best"] for soup in soups),
    }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Shares of both skills that the methods keep: means over the seeds, and thin marks for the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    labels = [label for label in results[0]["accuracies"] if not label.startswith("specialist")]
    markers = "osD^v<>pPX*hd8"
    for number, label in enumerate(labels):
        shares = [kept(result["accuracies"], label) for result in results]
        colour = f"C{number % 10}"
        axes.plot(*zip(*shares, strict=True), ls="", marker=".", ms=4, color=colour, alpha=0.5)
        middle = [statistics.mean(values) for values in zip(*shares, strict=True)]
        marker = markers[number % len(markers)]
        axes.plot(*middle, ls="", marker=marker, ms=8, color=colour, markeredgecolor="white", label=label)
    for line in (axes.axvline, axes.axhline):
        line(LEAST_KEPT, color="#888888", lw=0.8, ls="--")
    axes.set_xlabel("sums of small numbers: share of the specialist's accuracy", fontsize=9)
    axes.set_ylabel("sums of large numbers: share of the specialist's accuracy", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def main() -> int:
    """Runs all seeds, prints the table, and reports which requirements hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start_steps", type=int, default=560, help="of the common start")
    parser.add_argument("--steps", type=int, default=160, help="of each specialist")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of the specialists")
    parser.add_argument("--rows", type=int, default=300, help="test problems of each skill")
    parser.add_argument("--last", type=int, default=4, help="checkpoints in the mean of the last")
    parser.add_argument("--results", type=Path, help="JSON lines, one per seed: read if there, continued, and written")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--speed", action="store_true", help="measure time and memory instead; see its own --help")
    args = parser.parse_args()

    torch.set_num_threads(1)
    lines = args.results.read_text().splitlines() if args.results and args.results.is_file() else []
    done = {entry["seed"]: entry for entry in map(json.loads, lines)}
    for seed in args.seeds:
        if seed not in done:
            done[seed] = run(seed, args)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(done[seed]) + "\n")
    results = [done[seed] for seed in args.seeds]
    print(markdown(results))
    if args.figure:
        draw(results, args.figure)
    checks = requirements(results)
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(merging_speed.main() if "--speed" in sys.argv else main())
