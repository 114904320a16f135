"""Turns the rows of a source into examples, and counts how many are dropped, cut, skipped or filtered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..sequences.example import Example
from ..utils.progress import progress
from .cell_checks import one_line
from .example_store import ExampleStore
from .files import FilteredRowError, RowSource
from .tokenization import OnTooLong, TooLongError, fit_to_length, longest

OnBadRow = Literal["error", "skip"]

_SHOWN_BAD_ROWS = 3
_FILTERED_BY = "filtered by "


class RowReader:
    """Makes the examples of rows, brings them within a maximum length, and counts the outcomes.

    Args:
        source: the rows.
        make: makes the examples of one row; called with the row's id and its columns.
        max_length: maximum number of tokens of a sequence; ``None`` = unlimited.
        on_too_long: what to do with a longer one.
        on_bad_row: ``error`` at a row that cannot be used, or ``skip`` it.
        opening: tokens kept at the beginning of a text whose start is cut.

    Attributes:
        report: ``rows`` read, ``examples`` made of them, ``kept``, ``dropped`` (too long), ``truncated`` (and kept),
            ``bad`` (rows skipped), ``filtered`` (rows, by the transform or a filter; ``filtered by NAME`` for each),
            ``tokens`` (shared ones once) and the ``longest`` sequence kept.
    """

    def __init__(
        self,
        source: RowSource,
        make: Callable[[str, dict[str, Any]], list[Example]],
        *,
        max_length: int | None = None,
        on_too_long: OnTooLong = "drop",
        on_bad_row: OnBadRow = "error",
        opening: Sequence[int] = (),
    ) -> None:
        self.source = source
        self.make = make
        self.max_length = max_length
        self.on_too_long = on_too_long
        self.on_bad_row = on_bad_row
        self.opening = opening
        names = ("rows", "examples", "kept", "dropped", "truncated", "bad", "filtered", "tokens", "longest")
        self.report = dict.fromkeys(names, 0)

    def read(self, row_id: str, stored: Any) -> list[Example]:
        """Makes the examples of one stored row that are kept.

        Raises:
            ValueError: ``<file>:<line>: what is wrong, what is expected``, unless bad rows are skipped.
        """
        self.report["rows"] += 1
        try:
            examples = self.make(row_id, self.source.parse(stored))
            fitted = [fit_to_length(example, self.max_length, self.on_too_long, self.opening) for example in examples]
        except FilteredRowError as dropped:
            name = f"{_FILTERED_BY}{dropped}"
            self.report["filtered"] += 1
            self.report[name] = self.report.get(name, 0) + 1
            return []
        # `on_too_long: error` was asked for, so `on_bad_row: skip` does not apply.
        except TooLongError as error:
            raise ValueError(one_line(f"{row_id}: {error}")) from error
        except ValueError as error:
            message = one_line(f"{row_id}: {error}")
            if self.on_bad_row == "error":
                raise ValueError(message) from error
            self.report["bad"] += 1
            if self.report["bad"] <= _SHOWN_BAD_ROWS:
                rank_zero_warn(f"skipped {message}")
            return []
        return self._count(fitted)

    def read_all(self) -> ExampleStore:
        """Makes the examples of all rows.

        Raises:
            ValueError: for the first bad row, and if no example is left.
        """
        store = ExampleStore()
        rows = progress(self.source.raw(), f"tokenizing {self.source.name}", self.source.num_rows)
        for row_id, stored in rows:
            for example in self.read(row_id, stored):
                store.append(example)
        if not len(store):
            raise ValueError(f"no example is left: {self.describe()}")
        rank_zero_info(self.describe())
        return store

    def describe(self) -> str:
        """Formats the report as one line."""
        report = self.report
        parts = [f"{report['rows']} rows", f"{report['kept']} of {report['examples']} examples kept"]
        if report["dropped"]:
            parts.append(f"{report['dropped']} dropped as longer than max_length={self.max_length}")
        if report["truncated"]:
            parts.append(f"{report['truncated']} cut to max_length={self.max_length} ({self.on_too_long})")
        if report["bad"]:
            parts.append(f"{report['bad']} bad rows skipped")
        if report["filtered"]:
            by = {name.removeprefix(_FILTERED_BY): n for name, n in report.items() if name.startswith(_FILTERED_BY)}
            names = [f"{number} by {name}" for name, number in by.items()]
            parts.append(
                f"{report['filtered']} rows filtered out "
                + (f"by {next(iter(by))}" if len(by) == 1 else f"({', '.join(names)})")
            )
        parts.append(f"{report['tokens']} tokens, longest sequence {report['longest']}")
        return f"{self.source.name}: {', '.join(parts)}"

    def _count(self, fitted: list[tuple[Example | None, bool]]) -> list[Example]:
        kept = [example for example, _ in fitted if example is not None]
        report = self.report
        report["examples"] += len(fitted)
        report["kept"] += len(kept)
        report["dropped"] += len(fitted) - len(kept)
        report["truncated"] += sum(cut for _, cut in fitted)
        report["tokens"] += sum(example.root.num_tokens for example in kept)
        report["longest"] = max([report["longest"], *(longest(example.root) for example in kept)])
        return kept
