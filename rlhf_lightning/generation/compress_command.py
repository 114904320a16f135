"""``rlhf-lightning compress``: compresses the contexts of rows, and answers their prompts after what is left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from ..inference.specs import compressor_spec
from ..utils.command_line import parse_options
from ..utils.files import json_line, json_values
from ..utils.imports import find_own_modules
from ..utils.messages import UsageError
from .command import take_spec_options
from .compress import CompressOptions, compress_rows


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning compress``.

    Args:
        args: those of :class:`CompressOptions`, or ``--config FILE`` with them; options of a compressor may follow as
            ``--compressor.NAME=VALUE``.

    Raises:
        UsageError: an option does not exist, or has a wrong value.
    """
    rest, further = take_spec_options(args, ("compressor",))
    values = parse_options("compress", CompressOptions, rest, (compress_rows.__doc__ or "").partition("\n")[0])
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    try:
        values["compressor"] = compressor_spec(values["compressor"], further["compressor"])
    except TypeError as error:  # an option that a compressor does not have
        raise UsageError(f"compress: {error}") from error
    options = CompressOptions(**values)

    def emit(row: Mapping[str, Any]) -> None:
        sys.stdout.write(json_line(json_values(row)))

    summary = compress_rows(options, emit if options.output is None else None)
    print(summary_line(summary), file=sys.stderr)


def summary_line(summary: Mapping[str, float]) -> str:
    """Says in one line what has been done.

    Example:
        >>> figures = {"rows": 2, "context_tokens": 256, "entries": 64, "ratio": 4.0, "bytes": 98304, "accuracy": 0.5}
        >>> summary_line(figures | {"compress_seconds": 0.25, "answer_seconds": 0.5})
        '2 rows: 256 tokens of contexts as 64 entries (4x, 0.1 MB) in 0.2 s, answered in 0.5 s, accuracy 50.0%'
    """
    accuracy = f", accuracy {summary['accuracy']:.1%}" if "accuracy" in summary else ""
    return (
        f"{summary['rows']:.0f} rows: {summary['context_tokens']:.0f} tokens of contexts as {summary['entries']:.0f} "
        f"entries ({summary['ratio']:.3g}x, {summary['bytes'] / 1e6:.1f} MB) in {summary['compress_seconds']:.1f} s, "
        f"answered in {summary['answer_seconds']:.1f} s{accuracy}"
    )
