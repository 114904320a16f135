"""``rlhf-lightning merge``: merges models, verifies a merge, and reports conflicts before one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import transformers

from ..merging import conflict_report, merge, verify
from ..merging.conflicts import ConflictReport
from ..merging.options import MergeOptions
from ..utils import yaml_parser
from ..utils.command_line import CommandParser, parse_options
from ..utils.imports import find_own_modules
from ..utils.messages import UsageError
from .merge_stage import run_merge

_USAGE = """\
usage: rlhf-lightning merge --method NAME --models '[A, B]' --output FOLDER [--base FOLDER] [--NAME VALUE ...]
       rlhf-lightning merge verify FOLDER
       rlhf-lightning merge conflicts --models '[A, B]' [--base FOLDER] [--output FOLDER]"""


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning merge``.

    Args:
        args: those of :class:`MergeOptions`, or ``--config FILE`` with them; ``verify FOLDER``; ``conflicts`` with
            ``--models``, ``--base`` and ``--output``.

    Raises:
        SystemExit: 1 if ``verify`` finds a difference.
    """
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    if args[:1] == ["verify"]:
        _verify(args[1:])
    elif args[:1] == ["conflicts"]:
        _conflicts(args[1:])
    else:
        description = (merge.__doc__ or "").partition("\n")[0]
        options = MergeOptions(**parse_options("merge", MergeOptions, args, description))
        try:
            options.check()
        except ValueError as error:
            raise UsageError(f"merge: {error}") from error
        print(f"merged: {run_merge(options).folder}")


def _verify(args: Sequence[str]) -> None:
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError("merge verify needs one folder: rlhf-lightning merge verify FOLDER")
    differences = verify(args[0])
    for line in differences:
        print(line)
    if differences:
        sys.exit(1)
    print("nothing differs from the manifest")


def _conflicts(args: Sequence[str]) -> None:
    parser = CommandParser(command="merge conflicts", description="Compares models before a merge.")
    parser.add_argument("--models", type=list[str], required=True, help="folders of models or adapters")
    parser.add_argument("--base", type=str | None, default=None, help="the model that they were trained from")
    parser.add_argument("--output", type=str | None, default=None, help="folder of conflicts.json and conflicts.png")
    given = yaml_parser.plain(parser.parse_args([*args]))
    if given["output"]:
        ConflictReport.check_output(given["output"])
    report = conflict_report(given["models"], given["base"])
    print(report.table())
    if given["output"]:
        report.save(given["output"])
        print(f"report: {given['output']}")
