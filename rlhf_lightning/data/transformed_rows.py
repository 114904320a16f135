"""Rows derived from a source's rows: one by one by a function, or paired by their ratings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_info

from .cell_checks import check_number, describe_columns, short
from .files import FilteredRowError, RowSource
from .layouts import CONTEXT
from .messages import first_medium

Transform = Callable[[dict[str, Any]], dict[str, Any] | None]


class TransformedRows(RowSource):
    """Rewrites the rows of a source with a function.

    Args:
        inner: the source.
        transform: maps a row's columns to new ones, or to ``None`` to drop the row. A row for which it raises
            ``ValueError``, ``KeyError``, ``TypeError``, ``IndexError`` or ``AttributeError`` is a bad row.
    """

    def __init__(self, inner: RowSource, transform: Transform) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.transform = transform

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored."""
        return self.inner.raw()

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored, the source's parts in a random order."""
        return self.inner.shuffled(draw)

    def parse(self, stored: Any) -> dict[str, Any]:
        """Makes a dictionary of a stored row and rewrites it."""
        row = self.inner.parse(stored)
        try:
            changed: Any = self.transform(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"transform {self._function} failed with {type(error).__name__}: {error}") from error

        # The transform chooses to drop the row, which is not an error.
        if changed is None:
            raise FilteredRowError("the transform")
        if not isinstance(changed, Mapping):
            raise ValueError(
                f"transform {self._function} returned {type(changed).__name__} ({short(changed)}), expected columns "
                "with their values, or None to drop the row"
            )
        return dict(changed)

    @property
    def num_rows(self) -> int | None:
        """Number of rows, including rows that will be dropped."""
        return self.inner.num_rows

    @property
    def fingerprint(self) -> str:
        """A digest of the rows and of the function's name."""
        return blake2b(f"{self.inner.fingerprint}{self._function}".encode(), digest_size=16).hexdigest()

    @property
    def _function(self) -> str:
        named = self.transform if hasattr(self.transform, "__qualname__") else type(self.transform)
        return f"{named.__module__}.{named.__qualname__}"


class PairedRows(RowSource):
    """Pairs the rated completions of one prompt, the better one first.

    Consecutive rows with the same prompt (``system``, ``history`` and ``tools`` included) are paired, each with each,
    by a weighted sum of their ratings; equal sums make no pair. A pair has ``prompt``, ``chosen``, ``rejected``,
    ``chosen_score``, ``rejected_score`` and all other columns in which its two rows agree; its row id is that of the
    earlier row, ``+`` and the number of the later one. A row without prompt, completion or one of the ratings is a bad
    row.

    Args:
        inner: the source, whose rows have ``prompt``, ``completion`` (or ``response``) and ratings, either as columns
            or as numbers by attribute in the column ``ratings``.
        weights: weight of each rating in the sum.
    """

    def __init__(self, inner: RowSource, weights: Mapping[str, float]) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.weights = dict(weights)
        self._described = False

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields pairs, and for each bad row its error.

        Raises:
            ValueError: if there is neither.
        """
        bad = pairs = prompts = 0
        run: list[tuple[str, dict[str, Any]]] = []
        for row_id, row in self._parsed():
            if isinstance(row, ValueError):
                bad += 1
                yield row_id, row
                continue
            # Completions of one prompt follow one another, so that a run ends where the prompt changes.
            if run and run[0][1]["shown"] != row["shown"]:
                for pair in self._pairs(run):
                    pairs += 1
                    yield pair
                run = []
            prompts += not run
            run.append((row_id, row))
        for pair in self._pairs(run):
            pairs += 1
            yield pair
        by = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        if not pairs and not bad:
            raise ValueError(
                f"{self.name!r} has no pairs by {by}: expected rows that follow one another with the same prompt and "
                "different ratings"
            )
        if not self._described:
            self._described = True
            rank_zero_info(f"{self.name}: {pairs} pairs by {by} of {prompts} prompts; equal ratings make none")

    def parse(self, stored: dict[str, Any] | ValueError) -> dict[str, Any]:
        """Returns a pair, or raises the error of a bad row."""
        if isinstance(stored, ValueError):
            raise stored
        return stored

    @property
    def num_rows(self) -> int | None:
        """Not known before all rows are read."""
        return None

    @property
    def fingerprint(self) -> str:
        """A digest of the rows and of the weights."""
        named = f"{self.inner.fingerprint}{sorted(self.weights.items())}"
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def _parsed(self) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
        """Yields rows in normal form: ``prompt``, ``completion``, ``score``, ``shown``, and ``rest`` for the others."""
        for row_id, stored in self.inner.raw():
            try:
                row = self.inner.parse(stored)
                yield row_id, self._scored(row)
            except FilteredRowError:
                continue
            except ValueError as error:
                yield row_id, error

    def _scored(self, row: Mapping[str, Any]) -> dict[str, Any]:
        # Ratings are columns, or a mapping in one column.
        rest = dict(row)
        ratings = rest.pop("ratings", None) or {}
        rated = {**row, **ratings} if isinstance(ratings, Mapping) else row
        aliased = row.get("completion") is None and row.get("response") is not None
        name = "response" if aliased else "completion"
        for wanted in ("prompt", name, *self.weights):
            if rated.get(wanted) is None:
                raise ValueError(
                    f"no column {wanted!r}{describe_columns(rated, wanted)}, expected prompt, completion and the "
                    f"ratings to pair by: {', '.join(self.weights)}"
                )
        score = sum(weight * check_number(rated[rating], rating) for rating, weight in self.weights.items())
        own = ("prompt", "completion", "response", *self.weights)
        rest = {column: value for column, value in rest.items() if column not in own}
        if media := first_medium(rest):
            raise ValueError(f"the row has {media!r}, and media are not supported: remove the row")
        # The model's whole input before the completion: both answers of a pair must answer the same.
        shown = (row["prompt"], *(row.get(column) for column in CONTEXT))
        return {"prompt": row["prompt"], "completion": row[name], "score": score, "shown": shown, "rest": rest}

    def _pairs(self, run: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for (first_id, first), (second_id, second) in combinations(run, 2):
            if first["score"] == second["score"]:
                continue
            better, worse = (first, second) if first["score"] > second["score"] else (second, first)
            # A column in which both rows agree describes the pair; any other belongs to one completion.
            agreed = {name: value for name, value in first["rest"].items() if second["rest"].get(name) == value}
            pair = {
                **agreed,
                "prompt": first["prompt"],
                "chosen": better["completion"],
                "rejected": worse["completion"],
                "chosen_score": better["score"],
                "rejected_score": worse["score"],
            }
            yield f"{first_id}+{second_id.rpartition(':')[2]}", pair
