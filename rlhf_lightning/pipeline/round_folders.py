"""Folders of rounds: which models were accepted, and that nothing of an earlier run stays."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ..utils.files import MARKER, listed_names, write_atomically
from ..utils.folders import discard
from .config import Pipeline
from .manifest import Manifest

ROUNDS, MODELS = "rounds", "models.json"


def write_models(folder: Path, models: Sequence[str]) -> None:
    """Lists the accepted models of a loop, as ``merging.options.expand`` reads them: relative to the list.

    Args:
        folder: of the loop.
        models: the accepted models, the first one included.
    """
    # Absolute paths outside of the run stay as they are when the run is moved.
    run = folder.parent.absolute()
    outside = [Path(model).is_absolute() and not Path(model).is_relative_to(run) for model in models]
    places = [model if out else os.path.relpath(model, folder) for model, out in zip(models, outside, strict=True)]
    write_atomically(folder / MODELS, json.dumps(places, indent=1) + "\n")


def discard_later(folder: Path, last: int) -> None:
    """Deletes what the package wrote for rounds above the last one, of a run with more of them.

    Args:
        folder: of the loop.
        last: number of the last round.
    """
    rounds = folder / ROUNDS
    for place in sorted(rounds.iterdir()) if rounds.is_dir() else ():
        if place.name.isdigit() and int(place.name) > last:
            discard_others(place, ())
            _remove(place, "pipeline")


def discard_unreached(body: Pipeline) -> None:
    """Deletes what an earlier run wrote for stages of a round after one that has just ended without a row."""
    records = Manifest(body.run_dir / "manifest.json").stages
    reached = []
    for name in body.stages:
        reached.append(name)
        if records.get(name, {}).get("status") != "finished":
            break
    discard_others(body.run_dir, reached)


def discard_others(place: Path, stages: Collection[str]) -> None:
    """Deletes what the package wrote for other stages of a round than the given ones.

    Args:
        place: the folder of the round.
        stages: names of the stages that it has.
    """
    for inner in sorted(place.iterdir()) if place.is_dir() else ():
        if inner.name not in stages and inner.is_dir() and not inner.is_symlink():
            _remove(inner, "stage")


def _remove(folder: Path, kind: str) -> None:
    """Deletes the files on a folder's list, the list, and the folder if nothing else is in it."""
    names = sorted(listed_names(folder, kind))
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            discard(path)
        else:
            path.unlink(missing_ok=True)
    if names:
        (folder / MARKER).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
