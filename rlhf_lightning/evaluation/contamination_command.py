"""``rlhf-lightning contamination``: finds rows of an evaluation whose text other rows have as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.command_line import parse_options
from ..utils.files import json_line, write_atomically
from .contamination import contamination

# Contaminated rows that are printed.
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ContaminationOptions:
    """Options of ``contamination``.

    Args:
        rows: a file, folder, hub id or task: the rows to check, such as those of an evaluation; or a list of them.
        against: the rows that they should not share text with, such as those of training.
        n: words of an n-gram, at least 1.
        threshold: a row is contaminated if the share of its words within shared n-grams is above this, in [0, 1).
        columns: columns of the rows to check; all with text by default.
        output: a JSON Lines file with every row's overlap, which must not exist; none by default.
    """

    rows: list[str] | str
    against: list[str] | str
    n: int = 13
    threshold: float = 0.0
    columns: list[str] | None = None
    output: str | None = None


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning contamination``.

    Args:
        args: those of :class:`ContaminationOptions`, or ``--config FILE`` with them.

    Raises:
        ValueError: the output exists, or the rows cannot be compared.
    """
    description = "Finds rows whose n-grams other rows have as well."
    options = ContaminationOptions(**parse_options("contamination", ContaminationOptions, args, description))
    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None and output.exists():
        raise ValueError(f"output {options.output!r} already exists: pass another file, or move it away")
    found = contamination(
        options.rows, options.against, n=options.n, threshold=options.threshold, columns=options.columns
    )
    for row in sorted((row for row in found.rows if row.share > found.threshold), key=lambda row: -row.share)[:_SHOWN]:
        print(f"{row.row_id}: {row.share:.0%} of {row.words} words, as in {row.found_in}: {row.ngram:.100}")
    print(f"{len(found.contaminated)} of {len(found.rows)} rows share {found.n}-grams ({found.share:.1%})")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, "".join(json_line(asdict(row)) for row in found.rows))
