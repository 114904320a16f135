"""Options of the rows that are made of scored samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.sources import open_source
from ..inference.reasoning_rows import REASONING, Reasoning
from ..utils.validation import check_choice, check_count, check_fraction, check_not_negative
from .mixing import mix_rows
from .replay import KeptRow, RowReplay, exchange, priority_of, read_kept, read_replay
from .row_makers import PAIRINGS, Row, demonstrations, preference_pairs, scored_rows, spin_pairs, unpaired_rows
from .samples import ScoredPrompt

KINDS_OF_ROWS = ("pairs", "demonstrations", "unpaired", "spin", "samples")


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Rows that are made of scored samples.

    Args:
        rows: kinds of rows to write, each into a file of its name: ``pairs`` (preferences), ``demonstrations`` (the
            best samples), ``unpaired`` (samples with labels), ``spin`` (the rows' demonstrations against samples) and
            ``samples`` (all, with scores).
        threshold: least score of a right sample: of ``demonstrations`` (null takes any) and the labels of ``unpaired``.
        keep: of ``demonstrations``, largest number of a prompt; null for all.
        reasoning: of ``demonstrations`` of a strategy that thinks: whether the thought is ``kept``, ``masked`` (part of
            the prompt, and not learned) or ``stripped``; see ``inference.reasoning_rows``.
        margin: of ``pairs``, their scores differ by more.
        pairing: of ``pairs``: ``best_worst`` of each prompt, or ``all``.
        demonstration: of ``spin``, the column with demonstrations.
        seed_rows: a source of rows that are mixed with those of the first kind.
        seed_ratio: their share, in [0, 1).
        replay: options of ``self_improvement.RowReplay``: rows of the first kind come back in later rounds.
        max_rows: largest number of new rows of the first kind; no prompt is sampled once there are so many. Self-play
            samples the others only if its trial, which is whole, gave fewer.
    """

    rows: list[str] = field(default_factory=lambda: ["pairs"])
    threshold: float | None = 0.5
    keep: int | None = 1
    reasoning: Reasoning = "stripped"
    margin: float = 0.0
    pairing: Literal["best_worst", "all"] = "best_worst"
    demonstration: str = "completion"
    seed_rows: str | list[str] | None = None
    seed_ratio: float = 0.0
    replay: dict[str, Any] | None = None
    max_rows: int | None = None

    def check(self) -> None:
        """Checks the options before anything is sampled.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        check_choice("pairing", self.pairing, PAIRINGS)
        check_choice("reasoning", self.reasoning, REASONING)
        if self.reasoning != "stripped" and "demonstrations" not in self.rows:
            raise ValueError(f"reasoning is {self.reasoning!r}, which demonstrations have: add them to rows")
        # Stages that can search have the option.
        if self.reasoning != "stripped" and getattr(self, "strategy", None) is None:
            raise ValueError(
                f"reasoning is {self.reasoning!r}, and nothing thinks here: a stage of kind sample or refine does with "
                "strategy: hidden_reasoning"
            )
        check_not_negative("margin", self.margin, "0 takes every difference")
        check_fraction("seed_ratio", self.seed_ratio, "0.2 is usual")
        for name in ("keep", "max_rows"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), "null for all")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be finite, or null")
        if self.threshold is None and "unpaired" in self.rows:
            raise ValueError("threshold is null, and the labels of unpaired rows need one: 0.5 for scores of 0 and 1")
        if (self.seed_rows is None) != (self.seed_ratio == 0):
            raise ValueError(f"seed_rows is {self.seed_rows!r} and seed_ratio {self.seed_ratio}: give both, or neither")
        _ = self.replay_options

    @property
    def replay_options(self) -> RowReplay | None:
        """The options of replay, checked; ``None`` without it."""
        return None if self.replay is None else read_replay(self.replay)

    def make(self, kind: str, prompts: Sequence[ScoredPrompt], hinted: Sequence[ScoredPrompt] = ()) -> list[Row]:
        """Makes the rows of one kind; those of each prompt do not depend on the others.

        Args:
            kind: of the rows.
            prompts: with their samples.
            hinted: the same of prompts that were sampled with a hint, for demonstrations.
        """
        if kind == "pairs":
            return preference_pairs(prompts, margin=self.margin, pairing=self.pairing)
        if kind == "demonstrations":
            return demonstrations(
                [*prompts, *hinted], threshold=self.threshold, keep=self.keep, reasoning=self.reasoning
            )
        if kind == "unpaired":
            assert self.threshold is not None  # checked
            return unpaired_rows(prompts, threshold=self.threshold)
        return spin_pairs(prompts, column=self.demonstration) if kind == "spin" else scored_rows(prompts)

    def priorities(self, prompts: Sequence[ScoredPrompt], hinted: Sequence[ScoredPrompt] = ()) -> list[float]:
        """Returns the priority in replay of each row of the first kind that ``make`` makes of the same."""
        replay, kind = self.replay_options, self.rows[0]
        assert replay is not None
        return [
            priority_of(scored, replay.priority)
            for scored, part in [*((p, ([p], [])) for p in prompts), *((p, ([], [p])) for p in hinted)]
            for _ in self.make(kind, *part)
        ]

    def replayed(self, rows: Sequence[Row], priorities: Sequence[float], seed: int) -> tuple[list[Row], list[KeptRow]]:
        """Draws rows of earlier rounds, and keeps those of this one; ``self_improvement.replay.exchange`` tells how."""
        replay = self.replay_options
        assert replay is not None
        before = [] if replay.rows is None else read_kept(replay.rows)
        return exchange(list(zip(rows, priorities, strict=True)), before, replay, seed=seed)

    def mixed(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """Adds the seed rows, chosen by a seed."""
        if self.seed_rows is None:
            return list(rows)
        seeds = [row for _, row in open_source(self.seed_rows)]
        return mix_rows(rows, seeds, ratio=self.seed_ratio, seed=seed)
