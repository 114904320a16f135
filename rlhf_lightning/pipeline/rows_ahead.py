"""Rows that a run has not written yet: how many, and how long, at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..data.sources import open_source
from .stages import ChallengeStage, LabelStage, RowStage

# Rows whose tokens are counted.
_COUNTED = 32
# Completions in a row of each kind.
_COMPLETIONS = {"pairs": 2, "spin": 2, "demonstrations": 1, "unpaired": 1, "samples": 1}


@dataclass(frozen=True)
class RowsAhead:
    """A file that a stage will write.

    Args:
        rows: at most.
        prompt: tokens of a prompt, a mean.
        completions: tokens of a row's completions, at most.
    """

    rows: int
    prompt: float
    completions: float


class Sources:
    """Counts rows of sources: rows that are there, and rows that stages will write.

    Attributes:
        ahead: files that stages will write.
    """

    def __init__(self) -> None:
        self.ahead: dict[str, RowsAhead] = {}

    def find(self, source: Any) -> list[RowsAhead]:
        """Returns what of a source is ahead; nothing if all of it is there."""
        parts = source if isinstance(source, list) else [source]
        return [self.ahead[part] for part in parts if isinstance(part, str) and part in self.ahead]

    def count(self, source: Any) -> int | None:
        """Returns the number of rows, at most; ``None`` if unknown."""
        found = self.find(source)
        there = source
        if found and isinstance(source, list):
            there = [part for part in source if part not in self.ahead]
        elif found:
            there = None
        try:
            rows = open_source(there).num_rows if there else 0 if found else None
        except (ValueError, OSError):
            return None
        return None if rows is None else rows + sum(one.rows for one in found)

    def first(self, source: Any) -> list[Mapping[str, Any]]:
        """Returns the first rows of a source that is there."""
        if isinstance(source, Mapping):
            return [source]
        if self.find(source) or self.count(source) is None:
            return []
        return [row for _, row in islice(open_source(source), _COUNTED)]


def rows_ahead(
    stage: Any, outputs: Mapping[str, str], prompts: int, each: int, tokens: int, mean: float
) -> dict[str, RowsAhead]:
    """Lists the files that a stage will write.

    Args:
        stage: of any kind.
        outputs: its files by their names.
        prompts: their number.
        each: completions of a prompt, of all players together.
        tokens: of a completion, at most.
        mean: tokens of a prompt.
    """
    if isinstance(stage, ChallengeStage):
        return {outputs["prompts"]: RowsAhead(stage.number, float(tokens), 0.0)}
    if isinstance(stage, LabelStage):
        # A row of each solution, as long as one.
        return {outputs["rows"]: RowsAhead(prompts * each, mean, tokens)}
    if not isinstance(stage, RowStage):
        return {}
    found = {}
    for position, kind in enumerate(stage.rows):
        rows = prompts * _of_a_prompt(stage, kind, each)
        if position == 0:
            rows = _mixed(stage, rows)
        found[outputs[kind]] = RowsAhead(rows, mean, float(_COMPLETIONS[kind] * tokens))
    return found


def _of_a_prompt(stage: RowStage, kind: str, each: int) -> int:
    """Rows of a kind that a prompt gives, at most."""
    if kind == "pairs":
        return 1 if stage.pairing == "best_worst" else each * (each - 1) // 2
    if kind == "demonstrations" and stage.keep is not None:
        return min(stage.keep, each)
    return each


def _mixed(stage: RowStage, rows: int) -> int:
    """Rows of the first kind, with rows that are mixed in."""
    rows = rows if stage.max_rows is None else min(rows, stage.max_rows)
    replay = stage.replay_options
    if replay is not None:
        rows += min(replay.capacity, round(replay.share * rows))
    return round(rows / (1 - stage.seed_ratio))
