"""Reports the results of a run: a table on the terminal, ``summary.json`` and ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from rich.markup import escape
from rich.table import Table

from ..loggers import read_history
from ..self_improvement.gate import CapabilityCriteria
from ..utils import yaml_parser
from ..utils.files import write_atomically
from .config import Pipeline
from .figures import comparison_figure, points, stage_figure
from .fit_stage import HISTORY
from .judging import DECISION, EVALUATION
from .manifest import Manifest
from .round_folders import ROUNDS
from .rounds_stage import RECORD
from .row_files import first_lines
from .sample_stage import ANSWERS
from .stages import ROWS, FitStage
from .tested import compare_tests

_NUM_PAIRS, _MOST_ROUNDS = 3, 100


def summarize(pipeline: Pipeline, manifest: Manifest) -> dict[str, Any]:
    """Collects the results as plain values, stage by stage."""
    stages = []
    tested = compare_tests(pipeline, [name for name in pipeline.stages if "evaluation" in manifest.stages[name]])
    for name in pipeline.stages:
        record = manifest.stages[name]
        evaluation = record.get("evaluation", {})
        # Plain values only, which JSON and the template can show.
        stages.append(
            {
                "stage": name,
                "kind": record["kind"],
                "ran": record["ran"],
                "seconds": record["seconds"] + evaluation.get("seconds", 0.0),
                "test_accuracy": evaluation.get("accuracy"),
                "test_rows": evaluation.get("rows"),
                **(tested[name].as_dict() if name in tested else {}),
                "metrics": record["metrics"],
                "outputs": {place: str(pipeline.folder(name) / place) for place in record["outputs"]},
            }
        )
    return {"title": pipeline.title, "seed": pipeline.seed, "versions": manifest.content["versions"], "stages": stages}


def results_table(pipeline: Pipeline, manifest: Manifest) -> Table:
    """Makes a table of the results for the terminal."""
    table = Table(title=escape(pipeline.title), title_justify="left")
    for heading in ("stage", "what it did", "validation", "test", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for row in summarize(pipeline, manifest)["stages"]:
        seconds = f"{row['seconds']:.0f}" + ("" if row["ran"] else " (before)")
        table.add_row(row["stage"], _what(row), _measured(row["metrics"], "val"), _tested(row), seconds)
    return table


def write_report(pipeline: Pipeline, manifest: Manifest) -> Path:
    """Writes ``summary.json`` and ``report.html`` into the run directory; returns the latter's path."""
    summary = summarize(pipeline, manifest)
    write_atomically(pipeline.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")

    # One view for each stage, and one for each comparison of stages.
    stages = [_stage_view(pipeline, manifest, row) for row in summary["stages"]]

    comparisons = [
        {
            "title": item.title or item.metric,
            "text": item.text,
            "figure": comparison_figure(
                item.metric, {n: (_history(pipeline, n), _exported_step(manifest, n)) for n in item.stages}, item.over
            ),
            "rows": [_compared(pipeline, manifest, item.metric, name) for name in item.stages],
        }
        for item in pipeline.compare
    ]

    # Completions and configs are untrusted text: autoescape; an undefined name is a mistake of the template.
    template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(template).render(
        title=pipeline.title,
        summary=summary,
        stages=stages,
        tests=[row for row in summary["stages"] if "test_interval" in row],
        comparisons=comparisons,
        config=yaml_parser.dump(pipeline.source),
    )
    write_atomically(pipeline.run_dir / "report.html", page)
    return pipeline.run_dir / "report.html"


def _stage_view(pipeline: Pipeline, manifest: Manifest, row: dict[str, Any]) -> dict[str, Any]:
    name = row["stage"]
    record = manifest.stages[name]
    folder = pipeline.folder(name)
    history = _history(pipeline, name)
    shown = record.get("evaluation", {}).get("shown", 0)
    return row | {
        "what": _what(row),
        "validation": _measured(row["metrics"], "val"),
        "tested": _tested(row),
        "tested_briefly": _right(row) if "test_interval" in row else _tested(row),
        "figure": stage_figure(history, _exported_step(manifest, name)) if history else None,
        "answers": first_lines(folder / ANSWERS, shown),
        "pairs": first_lines(folder / ROWS["pairs"], _NUM_PAIRS),
        "rounds": [_round_view(record) for record in first_lines(folder / RECORD, _MOST_ROUNDS)],
        "rounds_folder": f"{name}/{ROUNDS}",
        "level": 1 - 2 * float((record["config"].get("criteria") or {}).get("level", CapabilityCriteria.level)),
        "reason": _reason(folder / DECISION),
        "page": _page(record, name) if (folder / EVALUATION).is_dir() else None,
        "config": yaml_parser.dump(record["config"]),
    }


def _compared(pipeline: Pipeline, manifest: Manifest, metric: str, name: str) -> dict[str, Any]:
    """First, highest and last value of a metric in a stage, and its exported model's test accuracy."""
    steps, values = points(_history(pipeline, name), metric)
    return {
        "stage": name,
        "steps": int(steps[-1]) if steps else 0,
        "values": [values[0], max(values), values[-1]] if values else [None] * 3,
        "exported": int(_exported_step(manifest, name)),
        "test": manifest.stages[name].get("evaluation", {}).get("accuracy"),
    }


def _history(pipeline: Pipeline, name: str) -> list[dict[str, Any]]:
    return read_history(pipeline.folder(name) / HISTORY) if isinstance(pipeline.stages[name], FitStage) else []


def _exported_step(manifest: Manifest, name: str) -> float:
    return float(manifest.stages[name]["metrics"].get("exported_step", 0))


def _what(row: dict[str, Any]) -> str:
    metrics = row["metrics"]
    if row["kind"] in ("sample", "refine", "self-play"):
        made = (
            ", ".join(f"{metrics[name]:.0f} {name}" for name in ROWS if name in metrics and name != "samples") or "rows"
        )
        return f"{made} from {metrics['samples']:.0f} samples, mean reward {metrics['mean_reward']:.3g}"
    if row["kind"] == "generate":
        score = f", mean score {metrics['mean_score']:.3g}" if "mean_score" in metrics else ""
        return f"{metrics['rows']} answers to {metrics['prompts']} prompts, {metrics['cut_off']} cut off{score}"
    if row["kind"] == "compress":
        accuracy = f", accuracy {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        return f"{metrics['rows']:.0f} contexts, {metrics['ratio']:.3g} tokens per entry that is kept{accuracy}"
    if row["kind"] == "merge":
        models = int(metrics["models"])
        soup = f": {int(metrics['ingredients'])} of {models}, metric {metrics['soup']:.4g}" if "soup" in metrics else ""
        return f"{models} models merged{soup}"
    if row["kind"] in _OTHER:
        return _OTHER[row["kind"]](metrics)
    steps, exported = int(metrics["steps"]), int(metrics["exported_step"])
    return f"{steps} steps" if steps == exported else f"{steps} steps, exported step {exported}"


def _of_labels(metrics: dict[str, float]) -> str:
    return f"{metrics['steps']:.0f} steps of {metrics['solutions']:.0f} solutions labelled"


def _of_challenge(metrics: dict[str, float]) -> str:
    kept = f"{metrics['rows']:.0f} of {metrics['new_prompts']:.0f} new prompts"
    return f"{kept} are solved sometimes, pass rate {metrics['pass_rate']:.1%}"


def _of_accuracies(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.partition('/')[2]} {value:.1%}" for name, value in metrics.items())


def _of_gate(metrics: dict[str, float]) -> str:
    verdict = "accepted" if metrics["accepted"] else "rejected"
    return f"{verdict}: {metrics['difference']:+.1%} ({metrics['low']:+.1%} to {metrics['high']:+.1%})"


def _of_export(metrics: dict[str, float]) -> str:
    return f"{metrics['tensors']:.0f} tensors, {metrics['greedy_agreement']:.1%} of greedy tokens as before"


def _of_rounds(metrics: dict[str, float]) -> str:
    found = f"{metrics['accepted']:.0f} of {metrics['rounds']:.0f} rounds accepted"
    if "accuracy" in metrics:
        found += f", suite {metrics['accuracy_before']:.1%} → {metrics['accuracy']:.1%}"
    return found


_OTHER: dict[str, Callable[[dict[str, float]], str]] = {
    "challenge": _of_challenge,
    "label-steps": _of_labels,
    "evaluate": _of_accuracies,
    "gate": _of_gate,
    "export": _of_export,
    "rounds": _of_rounds,
}


def _round_view(record: dict[str, Any]) -> dict[str, Any]:
    """Describes a round: accuracies are means over the suite's tasks."""
    accuracy = {name: sum(found.values()) / len(found) for name, found in record.get("accuracy", {}).items()}
    between = f"{record['low']:+.1%} to {record['high']:+.1%}" if "low" in record else ""
    return {
        "number": record["round"],
        "verdict": record["verdict"],
        "accuracy": f"{accuracy['accepted']:.1%} → {accuracy['candidate']:.1%}" if accuracy else "",
        "between": between,
        "reason": record["reason"],
    }


def _reason(decision: Path) -> str | None:
    """The reason of a gate's decision; ``None`` without a gate."""
    return str(json.loads(decision.read_text(encoding="utf-8"))["reason"]) if decision.is_file() else None


def _page(record: dict[str, Any], name: str) -> str | None:
    """The page of an evaluation, from the run directory."""
    return f"{name}/{EVALUATION}/report.html" if record["kind"] in ("evaluate", "gate", "rounds") else None


def _tested(row: dict[str, Any]) -> str:
    """Describes the test results: exact answers of greedy completions, else loss and preferences."""
    if "test_interval" in row:
        low, high = row["test_interval"]
        return f"{_right(row)} ({low:.1%} to {high:.1%})"
    return _measured(row["metrics"], "test")


def _right(row: dict[str, Any]) -> str:
    return f"{row['test_accuracy']:.1%} of {row['test_rows']} right"


def _measured(metrics: dict[str, float], prefix: str) -> str:
    """Describes loss and accuracy of the exported model on a set, and the loss before training if measured."""
    shown = []
    if f"{prefix}/loss" in metrics:
        before = metrics.get(f"{prefix}_before/loss")
        shown.append(f"loss {'' if before is None else f'{before:.3f} → '}{metrics[f'{prefix}/loss']:.3f}")
    shown += [
        f"{n} {metrics[f'{prefix}/{n}']:.1%}" for n in ("accuracy", "rewards/accuracies") if f"{prefix}/{n}" in metrics
    ]
    return ", ".join(shown)
