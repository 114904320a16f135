"""Records the contents of a run directory and their origin; written atomically after every change."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..utils.files import content_hash, write_atomically

_PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "numpy")


class Manifest:
    """The record of a run: per stage its key, inputs, outputs, metrics and times.

    Args:
        path: ``manifest.json``; an earlier run's is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stages": {}}
        if path.is_file():
            self.content = _read_record(path)

    @property
    def stages(self) -> dict[str, Any]:
        """The records by stage."""
        stages: dict[str, Any] = self.content["stages"]
        return stages

    def is_finished(self, stage: str, key: str, folder: Path) -> bool:
        """Whether a stage was finished with this key and its outputs are unchanged."""
        record = self.stages.get(stage, {})
        if record.get("status") != "finished" or record.get("key") != key:
            return False
        return all(content_hash(folder / place) == digest for place, digest in record["outputs"].items())

    def force(self, stages: Collection[str]) -> float:
        """Records which stages are forced to run.

        Returns:
            The time since when they are: that of an earlier run if it was interrupted with the same stages, else now.
        """
        since = self.forced_since(stages)
        if since is None:
            since = time.time()
            self.content.pop("forced", None)
            if stages:
                self.content["forced"] = {"stages": sorted(set(stages)), "since": since}
        return since

    def forced_since(self, stages: Collection[str]) -> float | None:
        """Returns the time of the run that was interrupted with these stages forced, or ``None``."""
        before = self.content.get("forced")
        return before["since"] if isinstance(before, dict) and before["stages"] == sorted(set(stages)) else None

    def is_started(self, stage: str, since: float) -> bool:
        """Whether a stage was started at a time or later."""
        return bool(self.stages.get(stage, {}).get("started", 0.0) >= since)

    def save(self) -> None:
        """Writes the manifest."""
        write_atomically(self.path, json.dumps(self.content, indent=2) + "\n")


def _read_record(path: Path) -> dict[str, Any]:
    """Reads the manifest of an earlier run.

    Raises:
        ValueError: it is damaged.
    """
    advice = "restore it, or delete it: the stages then run again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the manifest {str(path)!r} is damaged ({str(error).splitlines()[0]}): {advice}") from error
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(record, dict) for record in stages.values()):
        raise ValueError(f"the manifest {str(path)!r} is damaged (it has no stages): {advice}")
    found: dict[str, Any] = content
    return found


def versions() -> dict[str, str]:
    """Versions of the package and of the packages that its results depend on."""
    found = {"rlhf-lightning": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def stage_key(config: Any, inputs: Mapping[str, str], run_dir: Path) -> str:
    """Hashes everything that a stage's result depends on; moving the run directory does not change it."""
    # As JSON, in which tuples are lists and unknown objects text: a manifest that is read back gives the same key.
    content = json.loads(json.dumps([config, dict(inputs), __version__], default=str))
    return hashlib.sha256(json.dumps(_anywhere(content, str(run_dir)), sort_keys=True).encode()).hexdigest()


def _anywhere(value: Any, run_dir: str) -> Any:
    """Replaces the run directory in all texts of a value; the current folder does not appear in paths."""
    if isinstance(value, dict):
        return {_anywhere(key, run_dir): _anywhere(item, run_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_anywhere(item, run_dir) for item in value]
    return value.replace(run_dir, "<run_dir>") if isinstance(value, str) and run_dir != "." else value
