"""Folders of accepted states: whole checkpoints, their results, and a manifest of hashes and decisions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import TaskResult
from ..utils.files import content_hash, json_values, on_first_rank, write_atomically

MANIFEST = "manifest.json"
_OF_STATES = re.compile(r"step=\d+\.(ckpt|json)")


class Snapshots:
    """Keeps accepted states in a folder.

    ``step=<number>.ckpt`` is a checkpoint, ``step=<number>.json`` the results of its model on the suite, and
    ``manifest.json`` lists the states with the SHA-256 of both files, and all decisions.

    Args:
        folder: the folder; one per run.
        keep: number of newest states to keep, at least 1; older ones stay while a checkpoint needs them.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def checkpoint(self, step: int) -> Path:
        """Returns the path of a state's checkpoint."""
        return self.folder / f"step={step}.ckpt"

    def results(self, step: int) -> Path:
        """Returns the path of a state's results."""
        return self.folder / f"step={step}.json"

    def refuse_others(self) -> None:
        """Refuses a folder with states of another run; every rank calls it.

        Raises:
            ValueError: it has a manifest, or a file named as one of a state.
        """
        on_first_rank(self._refuse_others)

    def _refuse_others(self) -> None:
        names = [path.name for path in self.folder.glob("*")] if self.folder.is_dir() else []
        if any(name == MANIFEST or _OF_STATES.fullmatch(name) for name in names):
            raise ValueError(
                f"{str(self.folder)!r} holds accepted states of another run, which this one would replace: resume it "
                "with ckpt_path='last' (--ckpt_path=last), or choose another folder"
            )

    def add(
        self,
        step: int,
        results: Sequence[TaskResult],
        decisions: Sequence[Mapping[str, Any]],
        resumable: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        """Adds a state whose checkpoint is written, and removes the oldest; every rank calls it.

        Args:
            step: optimizer steps of the run.
            results: of its model.
            decisions: all of the run, as plain values.
            resumable: returns the steps of checkpoints from which the run may be resumed, on the first rank: each needs
                the newest state that had been accepted at that time.
        """
        on_first_rank(lambda: self._add(step, results, decisions, resumable()))

    def _add(
        self,
        step: int,
        results: Sequence[TaskResult],
        decisions: Sequence[Mapping[str, Any]],
        resumable: Iterable[int],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([result.as_dict() for result in results], ensure_ascii=False)
        write_atomically(self.results(step), text + "\n")
        paths = {"checkpoint": self.checkpoint(step), "results": self.results(step)}
        entry = {"step": step} | {name: {"file": p.name, "sha256": content_hash(p)} for name, p in paths.items()}
        # A state of the same step, or of a later one, is of a way that the run has left.
        before = self._states()
        states = [*(other for other in before if other["step"] < step), entry]
        needed = {max((s["step"] for s in states if s["step"] <= at), default=None) for at in resumable}
        kept = [state for n, state in enumerate(states, self.keep) if n >= len(states) or state["step"] in needed]
        write_atomically(self.folder / MANIFEST, self._text(kept, decisions))
        for old in (other for other in before if other["step"] not in {state["step"] for state in kept}):
            self.checkpoint(old["step"]).unlink(missing_ok=True)
            self.results(old["step"]).unlink(missing_ok=True)

    def note(self, decisions: Sequence[Mapping[str, Any]]) -> None:
        """Writes the decisions to the manifest; every rank calls it."""
        on_first_rank(lambda: write_atomically(self.folder / MANIFEST, self._text(self._states(), decisions)))

    @staticmethod
    def _text(states: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]) -> str:
        return json.dumps(json_values({"accepted": states, "decisions": decisions}), indent=1) + "\n"

    def _states(self) -> list[dict[str, Any]]:
        path = self.folder / MANIFEST
        return json.loads(path.read_text(encoding="utf-8"))["accepted"] if path.is_file() else []

    def read(self, step: int) -> list[TaskResult]:
        """Reads the results of a state; every rank calls it.

        Raises:
            ValueError: the state is missing, or one of its files is not the one that was written.
        """
        on_first_rank(lambda: self._check(step))
        written = json.loads(self.results(step).read_text(encoding="utf-8"))
        return [TaskResult.read(result) for result in written]

    def check(self, step: int) -> None:
        """Compares the files of a state with their hashes; every rank calls it.

        Raises:
            ValueError: the state is missing, or one of its files is not the one that was written.
        """
        on_first_rank(lambda: self._check(step))

    def _check(self, step: int) -> None:
        states = self._states()
        entry = next((entry for entry in states if entry["step"] == step), None)
        # Each state is a whole checkpoint, which needs no other.
        whole = [place for state in states if state is not entry and (place := self.checkpoint(state["step"])).exists()]
        advice = "restore the folder, or " + (
            f"resume with ckpt_path={str(whole[-1])!r}" if whole else "start a new run from an exported model"
        )
        if entry is None:
            raise ValueError(
                f"{str(self.folder)!r} does not hold the state of step {step}, the last one that was accepted: {advice}"
            )
        for name in ("checkpoint", "results"):
            path = self.folder / entry[name]["file"]
            found = content_hash(path)
            if found != entry[name]["sha256"]:
                wrong = "is missing" if found is None else "does not have the SHA-256 of the manifest"
                raise ValueError(f"{str(path)!r} of the last accepted state {wrong}: {advice}")
