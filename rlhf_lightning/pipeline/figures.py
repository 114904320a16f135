"""Draws the report's curves, as images to embed in HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
_SECOND_PANEL = ("val/accuracy", "val/rewards/accuracies", "val/mean_token_accuracy")
_COLOURS = ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#8d6a9f")
_SMOOTHED = 25
TRAIN_SECONDS = "time/train_seconds"


def points(history: History, name: str, over: str = "steps") -> tuple[list[float], list[float]]:
    """The steps, or the seconds of training, at which a metric was logged, and its values.

    Lightning numbers steps from 0 and a validation by the step before it; the first is that of the untrained model.
    """
    rows = [row for row in history if row.get(name) is not None]
    if over == "seconds":
        return [float(row.get(TRAIN_SECONDS) or 0.0) for row in rows], [float(row[name]) for row in rows]
    steps = [float(row["step"]) for row in rows]
    if name.startswith("val/"):
        steps = [step + 1 if n or step else 0.0 for n, step in enumerate(steps)]
    return steps, [float(row[name]) for row in rows]


def stage_figure(history: History, exported_step: float) -> str:
    """Plots the loss and the stage's main metric over its steps; a line marks the exported model."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, values = points(history, "train/loss")
    left.plot(steps, values, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
    left.plot(steps, _smooth(values), color=_COLOURS[0], label="train")
    _plot(left, history, "val/loss", _COLOURS[1], "validation")
    _dress(left, "loss", exported_step)

    # The main metric of the method; without validation, the norm of the gradient.
    second = next((name for name in _SECOND_PANEL if points(history, name)[0]), "train/grad_norm")
    _plot(right, history, second, _COLOURS[1], second)
    _dress(right, second, exported_step)
    return as_image(figure)


def comparison_figure(metric: str, runs: Mapping[str, tuple[History, float]], over: str = "steps") -> str:
    """Plots one metric over the steps, or the seconds of training, of several stages; circles mark exported models.

    Args:
        metric: its logged name.
        runs: by stage, its history and the step of its export.
        over: ``steps`` or ``seconds``.
    """
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    longest = max((points(history, metric, over)[0] or [0.0])[-1] for history, _ in runs.values())
    for colour, (name, (history, exported_step)) in zip(cycle(_COLOURS), runs.items(), strict=False):
        steps, values = points(history, metric, over)
        exported = dict(zip(points(history, metric)[0], steps, strict=True)).get(exported_step)
        # Where runs coincide, the shorter one is on top.
        shape: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6, "zorder": 3 - len(steps) / 1e6}
        axes.plot(steps, values, color=colour, label=name, **shape)
        at = [value for step, value in zip(steps, values, strict=True) if step == exported]
        if exported is not None and at:
            axes.plot([exported], at[-1:], "o", color=colour, markersize=11, fillstyle="none", markeredgewidth=2)
        # A line marks runs that ended earlier than others, by early stopping or a guard.
        if over == "steps" and steps and steps[-1] < longest:
            axes.axvline(steps[-1], color=colour, linestyle=":", linewidth=1.2)
            axes.annotate(f" {name} stopped", (steps[-1], 0.02), xycoords=("data", "axes fraction"), color=colour)
    _dress(axes, metric, None)
    if over == "seconds":
        axes.set_xlabel("seconds of training", fontsize=9)
    return as_image(figure)


def as_image(figure: Figure) -> str:
    """Encodes a figure as a ``data:`` URL."""
    buffer = io.BytesIO()
    # Without a date, so that the same run gives the same file.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plot(axes: Axes, history: History, name: str, colour: str, label: str) -> None:
    steps, values = points(history, name)
    axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)


def _dress(axes: Axes, title: str, exported_step: float | None) -> None:
    if exported_step:
        axes.axvline(exported_step, color="#888888", linestyle="--", linewidth=1, label="exported")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running means over the last few values."""
    width = max(1, min(_SMOOTHED, len(values) // 10))
    return [
        sum(values[max(0, n - width + 1) : n + 1]) / len(values[max(0, n - width + 1) : n + 1])
        for n in range(len(values))
    ]
