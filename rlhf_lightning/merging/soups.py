"""Model soups: means of fine-tuned models (Wortsman et al., 2022, arXiv:2203.05482)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from ..utils.files import check_replaceable, is_record, read_marker, write_atomically
from ..utils.validation import check_choice
from .merge import merge
from .sources import find_folder

_RECORDED = ("ingredients", "value", "values", "tried", "mode")  # exactly the keys of a soup's record


def uniform_soup(models: Sequence[str | Path], output: str | Path, **options: Any) -> Path:
    """Averages models, with ``weights`` if given.

    Args:
        models: at least two folders: checkpoints of one run, or of runs that began with the same model.
        output: the folder to write.
        options: of ``merge``, such as ``weights`` or ``dtype``.

    Returns:
        The folder.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries; a soup needs at least two")
    return merge("linear", models=models, output=output, **options)


@dataclass(frozen=True)
class GreedySoup:
    """The result of ``greedy_soup``.

    Args:
        folder: of the soup; of the best model where no mean was better.
        ingredients: the models in it.
        value: the metric of the soup.
        values: of each model, in the given order.
        tried: the models that were tried after the best, with the metric of the soup with each.
    """

    folder: Path
    ingredients: list[str]
    value: float
    values: list[float]
    tried: list[tuple[str, float]]


def greedy_soup(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    evaluate: Callable[[Path], float],
    mode: Literal["max", "min"] = "max",
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> GreedySoup:
    """Adds models to a mean as long as that gets better on held-out data, the best models first.

    Every model is evaluated, then in descending order each is added to the soup if the mean with it is strictly better;
    so the soup is at least as good as its best model on the metric it is chosen by. Ties in the order keep the given
    one.

    Args:
        models: at least one folder.
        output: the folder to write: the mean, or a copy of the best model where no mean was better. All trials are
            next to it, in ``<output>.soup.json``.
        evaluate: returns the metric of a model's folder.
        mode: whether more (``max``) or less of the metric is better.
        say: called with a line for each evaluation.
        options: of ``merge``, such as ``dtype``.

    Raises:
        ValueError: no model, a metric that is not a number, or a file ``<output>.soup.json`` that is no
            record of a soup.

    Example:
        >>> greedy_soup(["a", "b", "c"], "soup", evaluate=accuracy).ingredients  # doctest: +SKIP
        ['b', 'a']
    """
    check_choice("mode", mode, ("max", "min"))
    if not models:
        raise ValueError("models is empty; a soup needs at least one")
    if options.get("base") is not None:
        find_folder(options["base"])  # before anything is evaluated
    target = Path(output).expanduser().resolve()
    written = target.with_name(f"{target.name}.soup.json")
    _check_places(target, written)
    sign = 1.0 if mode == "max" else -1.0

    def mean(numbers: Sequence[int], place: Path, **more: Any) -> Path:
        return merge("linear", models=[models[number] for number in numbers], output=place, **options, **more)

    def measured(folder: Path, what: str) -> float:
        value = float(evaluate(folder))
        if math.isnan(value):
            raise ValueError(f"the metric of {what} is nan: a soup cannot be chosen by it")
        say(f"{what}: {value:.6g}")
        return value

    values = [measured(Path(model), str(model)) for model in models]
    order = sorted(range(len(models)), key=lambda number: -sign * values[number])
    chosen, best = [order[0]], values[order[0]]

    # Trials are written next to the output, on the same disk, and removed in the end.
    target.parent.mkdir(parents=True, exist_ok=True)
    trials, tried = Path(mkdtemp(prefix=f".{target.name}.soup.", dir=target.parent)), []
    try:
        for number in order[1:]:
            trial = mean([*chosen, number], trials / "trial")
            value = measured(trial, f"with {models[number]}")
            tried.append((str(models[number]), value))
            if sign * value > sign * best:
                chosen, best = [*chosen, number], value
    finally:
        shutil.rmtree(trials, ignore_errors=True)
    mean(chosen, target, keep=len(chosen) == 1)
    found = GreedySoup(target, [str(models[n]) for n in chosen], best, values, tried)
    record = {"ingredients": found.ingredients, "value": best, "values": values, "tried": tried, "mode": mode}
    write_atomically(written, json.dumps(record, indent=1) + "\n")
    return found


def _check_places(target: Path, path: Path) -> None:
    """Refuses, before anything is evaluated, to replace a foreign folder, or what is no record of a soup."""
    listed = read_marker(target)
    check_replaceable(target, "model" if listed is None else listed["kind"])
    if path.exists() and not is_record(path, _RECORDED):
        raise ValueError(
            f"{str(path)!r} already exists and was not written by greedy_soup, which would replace it: move it away, "
            "or choose another output"
        )
