"""Command lines of subcommands whose options are a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import jsonargparse

from . import yaml_parser
from .messages import UsageError, explain
from .packaged_configs import with_packaged_configs


class CommandParser(jsonargparse.ArgumentParser):
    """A parser that takes values as written, and raises errors of one line that begin with the subcommand.

    Args:
        command: words after ``rlhf-lightning``; the first is the subcommand.
        description: what it does, for ``--help``.
    """

    def __init__(self, *args: Any, command: str = "", **kwargs: Any) -> None:
        self.command = command
        if command:
            kwargs["prog"] = f"rlhf-lightning {command}"
        # Parsers of nested options are made by jsonargparse, with arguments of its own.
        super().__init__(*args, **{"parser_mode": yaml_parser.MODE, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error in the words of the command line.

        Raises:
            UsageError: always.
        """
        names = (action.dest for action in self._actions)
        where = f"{self.command.split()[0]}: " if self.command else ""
        raise UsageError(f"{where}{explain(message, names)}") from ex


def parse_options(command: str, cls: type, args: Sequence[str], description: str) -> dict[str, Any]:
    """Parses the options of a dataclass, which ``--config FILE`` may hold as well.

    Args:
        command: the subcommand.
        cls: the dataclass.
        args: the command line.
        description: of the command.

    Returns:
        The value of each field.

    Raises:
        UsageError: an option does not exist, is missing, or has a wrong value.
    """
    parser = CommandParser(command=command, description=description)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_class_arguments(cls, as_group=False)
    given = yaml_parser.plain(parser.instantiate(parser.parse_args([*with_packaged_configs(args)])))
    return {option.name: given[option.name] for option in fields(cls)}
