"""``rlhf-lightning generate``: answers prompts from a file, and writes or prints the answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import transformers

from ..distributed.collectives import rank_prefix
from ..inference.specs import scorer_spec, with_options
from ..inference.telemetry import Telemetry
from ..utils import yaml_parser
from ..utils.command_line import parse_options
from ..utils.files import json_line, json_values
from ..utils.imports import find_own_modules
from ..utils.messages import UsageError
from .options import EngineOptions, GenerateOptions
from .run import generate_rows

_Options = TypeVar("_Options", bound=EngineOptions)


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning generate``.

    Args:
        args: those of :class:`GenerateOptions`, or ``--config FILE`` with them.

    Raises:
        SystemExit: 130 after Ctrl-C.
    """
    options = read_options("generate", GenerateOptions, args, (generate_rows.__doc__ or "").partition("\n")[0])
    # Kept: a progress bar would redirect what is printed to where it is itself.
    screen = sys.stdout

    def emit(row: Mapping[str, Any]) -> None:
        line = json_line(json_values(row)) if options.prompt is None else f"{row['completion']}\n"
        screen.write(line)
        screen.flush()

    try:
        summary = generate_rows(
            options,
            emit if options.output is None else None,
            show_progress=options.output is not None or not screen.isatty(),
        )
    except KeyboardInterrupt:
        kept = (
            "" if options.output is None else f"; what is finished is in {options.output}: the same command continues"
        )
        print(f"\ninterrupted{kept}", file=sys.stderr)
        raise SystemExit(130) from None
    if rank_prefix() in ("", "rank 0: "):
        print(summary_line(summary), file=sys.stderr)


def summary_line(summary: Mapping[str, Any]) -> str:
    """Says in one line what a run has done.

    Example:
        >>> telemetry = {"prompt_tokens": 9, "new_tokens": 20, "prefill_seconds": 0.5, "decode_seconds": 1.0}
        >>> summary_line({"rows": 4, "prompts": 2, "cut_off": 1, "seconds": 1.6, "telemetry": telemetry})
        '4 answers to 2 prompts in 1.6 s, 1 cut off: prompts 9 tokens (0.5 s), new 20 tokens (1.0 s)'
    """
    score = f", mean score {summary['mean_score']:.3g}" if "mean_score" in summary else ""
    return (
        f"{summary['rows']} answers to {summary['prompts']} prompts in {summary['seconds']:.1f} s, "
        f"{summary['cut_off']} cut off{score}: {Telemetry(**summary['telemetry'])}"
    )


# Shared with ``chat``.


def read_options(command: str, cls: type[_Options], args: Sequence[str], description: str) -> _Options:
    """Parses a command line.

    Args:
        command: its name.
        cls: its options.
        args: the command line; options of a strategy or scorer may follow as ``--strategy.NAME=VALUE``.
        description: of the command.

    Raises:
        UsageError: an option does not exist, or has a wrong value.
    """
    rest, further = take_spec_options(args, ("strategy", "scorer"))
    values = parse_options(command, cls, rest, description)
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    try:
        for name, write in (("strategy", with_options), ("scorer", scorer_spec)):
            if further[name]:
                if values[name] is None:
                    first = next(iter(further[name]))
                    raise UsageError(f"{command}: --{name}.{first} is an option of a {name}: give --{name} as well")
                values[name] = write(values[name], further[name])
        options = cls(**values)
        options.check()
    except TypeError as error:  # an option that a strategy or scorer does not have
        raise UsageError(f"{command}: {error}") from error
    return options


def take_spec_options(args: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Takes the options of named objects out of a command line.

    Returns:
        The other arguments, and for each name its options, those of groups nested.

    Raises:
        UsageError: one has no value.

    Example:
        >>> take_spec_options(["--a", "mcts", "--a.n=2", "--a.budget.tokens", "9", "--b=1"], ["a"])
        (['--a', 'mcts', '--b=1'], {'a': {'n': 2, 'budget': {'tokens': 9}}})
    """
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    waiting = list(args)
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.partition("=")
        name, dot, path = key.removeprefix("--").partition(".")
        if not (key.startswith("--") and dot and path and name in found):
            rest.append(argument)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UsageError(f"{key} has no value: write {key}=VALUE")
            value = waiting.pop(0)
        group = found[name]
        *above, last = path.removeprefix("init_args.").split(".")
        for part in above:
            inner = group.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError(
                    f"{key} is an option of --{name}.{part}, which is given as {inner!r}: write one of them"
                )
            group = inner
        group[last] = yaml_parser.plain(yaml_parser.load(value))
    return rest, found
