"""Reports how far models have moved from their base, and how much they disagree, before they are merged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..utils.files import atomic_file, check_shared, claim, write_atomically
from .methods import Linear
from .methods.base import TensorView
from .sources import check_same, open_source, with_equal_ties
from .stream import Merge, is_merged

# Bounds of the warnings. Models that were trained from one base keep weights that point the same way.
_LEAST_COSINE_OF_WEIGHTS = 0.9
_MOST_DRIFT = 0.5
_LEAST_COSINE_OF_DELTAS = 0.0

# Of the list in the folder of a report.
_KIND, _NAMES = "report of conflicts", ("conflicts.json", "conflicts.png")


@dataclass(frozen=True)
class TensorConflict:
    """Differences of one tensor.

    Args:
        name: of the tensor.
        drift: of each model, the norm of its difference to the base over the norm of the base's tensor.
        cosines: of each pair of models, between their differences; 0 where one is 0.
        sign_disagreement: of each pair, the share of entries with opposite signs among the entries that both changed.
    """

    name: str
    drift: list[float]
    cosines: list[float]
    sign_disagreement: list[float]


@dataclass(frozen=True)
class ConflictReport:
    """Differences of all tensors, and warnings.

    Without a base, differences are to the mean of the models.

    Args:
        models: the folders.
        base: its folder, or ``None``.
        pairs: numbers of the models of each pair.
        tensors: one entry per tensor of more than one element.
        weight_cosines: of each pair, between the whole weights.
        warnings: reasons not to expect a good merge.
    """

    models: list[str]
    base: str | None
    pairs: list[tuple[int, int]]
    tensors: list[TensorConflict]
    weight_cosines: list[float]
    warnings: list[str]

    def table(self, limit: int | None = 20) -> str:
        """Returns the tensors with the lowest cosines as a table.

        Args:
            limit: number of tensors; all by default.
        """
        lines = [f"{'cosine':>8} {'signs':>8} {'drift':>8}  tensor (lowest cosine, most disagreement, largest drift)"]
        ordered = sorted(self.tensors, key=lambda tensor: min(tensor.cosines, default=1.0))
        for tensor in ordered[:limit]:
            values = min(tensor.cosines, default=1.0), max(tensor.sign_disagreement, default=0.0), max(tensor.drift)
            lines.append(" ".join(f"{value:8.3f}" for value in values) + f"  {tensor.name}")
        if limit is not None and len(ordered) > limit:
            lines.append(f"... and {len(ordered) - limit} more")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    @staticmethod
    def check_output(folder: str | Path) -> None:
        """Refuses a folder with other files of the report's names, or with content of another kind, such as a model.

        Raises:
            ValueError: naming the folder or the file.
        """
        check_shared(Path(folder), _KIND, _NAMES)

    def save(self, folder: str | Path) -> None:
        """Writes ``conflicts.json`` and the heat map ``conflicts.png`` into a folder, which may hold other files.

        Raises:
            ValueError: as ``check_output``.
        """
        place = Path(folder)
        claim(place, _KIND, _NAMES)
        write_atomically(place / "conflicts.json", json.dumps(asdict(self), indent=1) + "\n")
        with atomic_file(place / "conflicts.png") as file:
            _heat_map(self).savefig(file, format="png", dpi=120, bbox_inches="tight")


def conflict_report(models: Sequence[str | Path], base: str | Path | None = None) -> ConflictReport:
    """Compares models tensor by tensor, in one pass over their files.

    Args:
        models: at least two folders of models or adapters.
        base: the model that they were trained from.

    Raises:
        ValueError: fewer than two models, or models that do not fit each other.

    Example:
        >>> print(conflict_report(["a", "b"], base="base").table())  # doctest: +SKIP
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries; give at least two to compare")
    opened = [open_source(model, base=base) for model in models]
    everything = with_equal_ties(opened if base is None else [*opened, open_source(base)])
    check_same(everything)
    sources, root = everything[: len(models)], None if base is None else everything[-1]
    run = Merge(sources, root, lambda name: Linear(), torch.float32, lambda name: torch.float32)
    pairs = list(combinations(range(len(sources)), 2))
    tensors, products_MM = [], torch.zeros(len(sources), len(sources), dtype=torch.float64)
    for name, stored in sources[0].tensors.items():
        if is_merged(stored) and stored.elements > 1:
            conflict, part_MM = _compare(run.view(name), pairs)
            tensors.append(conflict)
            products_MM += part_MM
    norms_M = products_MM.diagonal().sqrt()
    cosines = [float(products_MM[a, b] / (norms_M[a] * norms_M[b]).clamp(min=1e-300)) for a, b in pairs]
    names = [str(source.folder) for source in sources]
    warnings = _warnings(names, pairs, tensors, cosines, root is not None)
    return ConflictReport(names, None if root is None else str(root.folder), pairs, tensors, cosines, warnings)


def _compare(view: TensorView, pairs: Sequence[tuple[int, int]]) -> tuple[TensorConflict, torch.Tensor]:
    """Compares one tensor of all models; returns the inner products of the weights as well."""
    products: Any = 0
    deltas: Any = 0
    base_square = 0.0
    opposite, both = [0] * len(pairs), [0] * len(pairs)
    for block in view.blocks():
        base_RC = block.models_MRC.mean(0) if block.base_RC is None else block.base_RC
        deltas_MRC = block.models_MRC - base_RC
        flat_MN, weights_MN = deltas_MRC.flatten(1).double(), block.models_MRC.flatten(1).double()
        products = products + weights_MN @ weights_MN.T
        deltas = deltas + flat_MN @ flat_MN.T
        base_square += float(base_RC.double().square().sum())
        for number, (a, b) in enumerate(pairs):
            signs = deltas_MRC[a].sign() * deltas_MRC[b].sign()
            opposite[number] += int((signs < 0).sum())
            both[number] += int((signs != 0).sum())
    norms = [math.sqrt(max(0.0, float(square))) for square in deltas.diagonal()]
    scale = math.sqrt(base_square) or 1.0
    cosines = [float(deltas[a, b]) / (norms[a] * norms[b]) if norms[a] and norms[b] else 0.0 for a, b in pairs]
    disagreement = [part / whole if whole else 0.0 for part, whole in zip(opposite, both, strict=True)]
    return TensorConflict(view.name, [norm / scale for norm in norms], cosines, disagreement), products


def _warnings(
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    tensors: Sequence[TensorConflict],
    cosines: Sequence[float],
    with_base: bool,
) -> list[str]:
    """Lists reasons not to expect a good merge."""
    found = []
    for (a, b), cosine in zip(pairs, cosines, strict=True):
        if cosine < _LEAST_COSINE_OF_WEIGHTS:
            found.append(
                f"the weights of {names[a]!r} and {names[b]!r} have a cosine of {cosine:.2f}: they have no common base "
                "(models from different seeds do not merge)"
            )
    for number, name in enumerate(names):
        drifts = sorted(tensor.drift[number] for tensor in tensors)
        if with_base and drifts and drifts[len(drifts) // 2] > _MOST_DRIFT:
            found.append(
                f"{name!r} has moved by {drifts[len(drifts) // 2]:.0%} of its base's norm in the median tensor: it was "
                "trained for long, or from another base"
            )
    for number, (a, b) in enumerate(pairs):
        means = [tensor.cosines[number] for tensor in tensors]
        if with_base and means and sum(means) / len(means) < _LEAST_COSINE_OF_DELTAS:
            found.append(
                f"the differences of {names[a]!r} and {names[b]!r} point apart (mean cosine "
                f"{sum(means) / len(means):.2f}): each undoes what the other learned; elect signs (method='ties')"
            )
    return found


def _heat_map(report: ConflictReport) -> Any:
    """Draws cosines and sign disagreement, a row for each tensor."""
    from matplotlib.figure import Figure

    rows = report.tensors
    figure = Figure(figsize=(4 + 1.2 * len(report.pairs), 1.2 + 0.16 * len(rows)))
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{a}-{b}" for a, b in report.pairs]
    panels = (
        ("cosine of differences", [row.cosines for row in rows], "RdBu", -1.0),
        ("opposite signs", [row.sign_disagreement for row in rows], "Reds", 0.0),
    )
    for axis, (title, values, colours, least) in zip(axes, panels, strict=True):
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=least, vmax=1.0)
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(labels)), labels, fontsize=7)
        figure.colorbar(image, ax=axis)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=5)
    names = [f"{n}: {Path(*Path(model).parts[-2:])}" for n, model in enumerate(report.models)]
    figure.supxlabel("\n".join(names), fontsize=7, y=0.0, va="top")
    return figure
