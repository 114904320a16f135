"""Rows of stages that sample: what an interrupted stage has so far, and the files that a finished one writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..self_improvement.replay import kept_lines
from ..self_improvement.row_options import RowOptions
from ..self_improvement.samples import Sample, ScoredPrompt
from ..utils.files import json_line, write_atomically
from ..utils.progress import progress
from .stages import REPLAY, ROWS

SAMPLED = "sampled.jsonl"
PROMPTS_AT_ONCE = 64


class NoRowsError(ValueError):
    """A stage has sampled, and no sample gave a row."""


class Part(NamedTuple):
    """Prompts that were sampled together."""

    prompts: list[ScoredPrompt]
    hinted: list[ScoredPrompt]  # sampled again with a hint, without it


class Journal:
    """Keeps the scored prompts of a stage, part by part; an interrupted stage continues after the last whole one.

    Args:
        file: of the parts, a line each.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parts: list[Part] = []
        if not file.is_file():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        # A crash may leave a part of a line.
        if len(whole) < len(lines):
            file.write_bytes(b"".join(whole))
        self.parts = [_read_part(line) for line in whole]

    def add(self, prompts: Sequence[ScoredPrompt], hinted: Sequence[ScoredPrompt] = ()) -> None:
        """Writes a part before the next one begins."""
        line = json_line({"prompts": list(map(asdict, prompts)), "hinted": list(map(asdict, hinted))})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line)
        # As it is read again: an interrupted stage and one that was not write the same rows.
        self.parts.append(_read_part(line))

    @property
    def samples(self) -> list[Sample]:
        """All samples so far, those with hints left out."""
        return [sample for part in self.parts for scored in part.prompts for sample in scored.samples]


def missing_parts(
    options: RowOptions, journal: Journal, count: int, say: Callable[[str], None]
) -> Iterator[Sequence[int]]:
    """Yields the numbers of the prompts of each part that a journal does not have, until there are ``max_rows`` rows.

    Each part has to be in the journal before the next one is asked for.

    Args:
        options: kinds of rows, and how they are made.
        journal: all that was sampled before.
        count: number of prompts.
        say: shown one line per part.
    """
    kind = options.rows[0]
    made = sum(len(options.make(kind, *part)) for part in journal.parts)
    rest = range(len(journal.parts) * PROMPTS_AT_ONCE, count, PROMPTS_AT_ONCE)
    for start in progress(rest, f"sampling, {PROMPTS_AT_ONCE} prompts at once"):
        if options.max_rows is not None and made >= options.max_rows:
            return
        numbers = range(start, min(start + PROMPTS_AT_ONCE, count))
        yield numbers
        made += len(options.make(kind, *journal.parts[-1]))
        say(f"{numbers.stop} of {count} prompts, {made} {kind}")


def _read_part(line: str | bytes) -> Part:
    written = json.loads(line)
    return Part(*([_read(scored) for scored in written[name]] for name in ("prompts", "hinted")))


def _read(written: dict[str, Any]) -> ScoredPrompt:
    samples = tuple(Sample(**sample) for sample in written["samples"])
    return ScoredPrompt(**{**written, "samples": samples})


def write_rows(
    options: RowOptions,
    journal: Journal,
    folder: Path,
    seed: int,
    advice: str,
    *,
    parts: Sequence[Part] | None = None,
) -> dict[str, float]:
    """Writes a file of each kind of rows, and removes the journal.

    Args:
        options: kinds of rows, and how they are made.
        journal: all that was sampled.
        folder: of the stage.
        seed: of the choice of replayed and of seed rows.
        advice: said where there are no rows of a kind.
        parts: that rows are made of, instead of those of the journal.

    Returns:
        Counts, and the mean reward of the samples.

    Raises:
        NoRowsError: no sample gave a row of a kind.
    """
    samples = journal.samples
    rewards = [sample.score for sample in samples if sample.score is not None]
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    metrics: dict[str, float] = {"samples": len(samples), "mean_reward": mean}
    parts = journal.parts if parts is None else parts
    # All rows before the first file: an error leaves none.
    made = {kind: [row for part in parts for row in options.make(kind, *part)] for kind in options.rows}
    for kind, rows in made.items():
        if not rows:
            found = f"mean reward {mean:.2f}" if rewards else f"none of {len(samples)} samples has a score"
            raise NoRowsError(f"no prompt gave a row of kind {kind!r} ({found}): {advice}")
    first, files = options.rows[0], {}
    own = made[first][: options.max_rows]
    if options.replay is not None:
        priorities = [priority for part in parts for priority in options.priorities(*part)]
        replayed, kept = options.replayed(own, priorities[: len(own)], seed)
        own, metrics["replayed"] = [*own, *replayed], len(replayed)
        files[REPLAY["replay"]] = kept_lines(kept)
    made[first] = options.mixed(own, seed)
    metrics |= {kind: len(rows) for kind, rows in made.items()}
    files |= {ROWS[kind]: "".join(map(json_line, rows)) for kind, rows in made.items()}
    for name, text in files.items():
        write_atomically(folder / name, text)
    journal.file.unlink(missing_ok=True)
    return metrics | {"cut_off": sum(not sample.ended for sample in samples)}


def first_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads the first rows of a file, by default all; none if it does not exist."""
    if not path.is_file() or limit == 0:
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, limit)]
