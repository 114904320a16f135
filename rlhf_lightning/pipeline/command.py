"""``rlhf-lightning pipeline``: parses the command line, runs the pipeline, and prints the results."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

import transformers
from rich.console import Console

from ..core.trainer_checks import check_single_process
from ..utils.imports import find_own_modules
from ..utils.log_output import is_chosen
from ..utils.messages import UsageError, explain
from .config import load_pipeline
from .dry_run import plan_lines
from .report import results_table, write_report
from .runner import run_pipeline

# Lightning's warnings: rows in memory need no workers, and its own use of torch cannot be fixed here.
_EXPECTED_WARNINGS = (".*does not have many workers.*", ".*number of training batches.*", ".*treespec, LeafSpec.*")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"pipeline: {explain(message, (action.dest for action in self._actions))}")


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning pipeline``.

    Args:
        args: ``--config FILE [--run_dir FOLDER] [--dry-run] [--force STAGE ...] [KEY=VALUE ...]``.

    Raises:
        SystemExit: 130 after Ctrl-C.
    """
    parser = _Parser(
        prog="rlhf-lightning pipeline",
        description="Runs the stages of a YAML file that are not done yet.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="the pipeline; configs/... may be one of the package")
    parser.add_argument("--run_dir", help="where everything is written, instead of the file's run_dir")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and why, and run nothing")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE", help="run it although it is finished")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as stages.dpo.trainer.max_epochs=2")

    # Intermixed, so that overrides may stand before and after the options.
    parsed = parser.parse_intermixed_args(args)
    check_single_process("pipeline")
    find_own_modules()
    pipeline = load_pipeline(parsed.config, parsed.overrides, parsed.run_dir)
    console = Console()
    started = time.time()
    _quieten()
    if parsed.dry_run:
        print("\n".join(plan_lines(pipeline, parsed.force)))
        return

    # Each line shows the time since the start.
    try:
        manifest = run_pipeline(
            pipeline,
            lambda line: console.print(f"[{time.time() - started:6.1f} s] {line}", markup=False),
            parsed.force,
        )
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: the same command resumes from the last finished stage in {pipeline.run_dir}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    report = write_report(pipeline, manifest)
    console.print(results_table(pipeline, manifest))
    console.print(f"report: {report}", markup=False, soft_wrap=True)


def _quieten() -> None:
    """Leaves the terminal to the stages' own lines, unless a level is asked for; suppresses expected warnings only."""
    for name in () if is_chosen() else ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
