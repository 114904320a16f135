"""Where messages of a run go: the terminal, from a level on, and perhaps a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .validation import check_choice

LEVELS = ("debug", "info", "warning", "error")
# The package's own loggers, and those of Lightning, by which the package also reports.
_LOGGERS = ("rlhf_lightning", "lightning.pytorch", "lightning.fabric")
_WARNINGS = "py.warnings"  # where logging puts warnings
_OPTIONS = {"log_level": "RLHF_LIGHTNING_LOG_LEVEL", "log_file": "RLHF_LIGHTNING_LOG_FILE"}
_chosen = False
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def take_log_options(
    args: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """Takes ``--log_level`` and ``--log_file`` out of a command line; without them, environment variables count.

    Args:
        args: the command line.
        environment: may have ``RLHF_LIGHTNING_LOG_LEVEL`` and ``RLHF_LIGHTNING_LOG_FILE``.

    Returns:
        The other arguments, and the options that are given.

    Raises:
        ValueError: an option without a value.

    Example:
        >>> take_log_options(["fit", "--log_level=error", "--config", "a.yaml"], {})
        (['fit', '--config', 'a.yaml'], {'log_level': 'error'})
    """
    options = {name: environment[variable] for name, variable in _OPTIONS.items() if environment.get(variable)}
    others: list[str] = []
    waiting = list(args)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in _OPTIONS:
            others.append(argument)
            continue
        if not equals and not waiting:
            raise ValueError(f"--{name} has no value: write --{name}={'debug' if name == 'log_level' else 'run.log'}")
        options[name] = value if equals else waiting.pop(0)
    return others, options


def is_chosen() -> bool:
    """Returns whether a level or a file of messages is in effect."""
    return _chosen


@contextmanager
def log_output(log_level: str | None = None, log_file: str | None = None) -> Iterator[None]:
    """Sends messages and warnings of that level and above to the terminal and, on rank 0, to a file.

    Without a level or file, everything stays as it is. Other ranks print warnings and errors of their own alone. An
    error that ends the context is written to the file with its traceback.

    Args:
        log_level: ``debug``, ``info``, ``warning`` or ``error``; by default ``info`` with a file.
        log_file: appended to, with the time, level and logger of each message; its folder is made. None by default.

    Raises:
        ValueError: an unknown level, or a file that cannot be written.
    """
    if log_level is None and log_file is None:
        yield
        return
    global _chosen
    name = (log_level or "info").lower()
    check_choice("log_level", name, LEVELS)
    first = getattr(rank_zero_only, "rank", 0) == 0
    level = getattr(logging, name.upper())
    file = _open(log_file, level) if log_file and first else None
    loggers = [logging.getLogger(each) for each in (*_LOGGERS, _WARNINGS)]
    before = [logger.level for logger in loggers]
    added: list[tuple[logging.Logger, logging.Handler]] = []
    for logger in loggers:
        logger.setLevel(level if first else max(level, logging.WARNING))
        # Where a program has handlers of its own, or Lightning has, they print: another would print twice.
        if not logger.hasHandlers():
            added.append((logger, logging.StreamHandler()))
        if file is not None:
            added.append((logger, file))
    for logger, handler in added:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    _chosen = True
    try:
        yield
    except BaseException as error:
        if file is not None and not isinstance(error, SystemExit):
            file.handle(_record_of(error))
        raise
    finally:
        _chosen = False
        logging.captureWarnings(False)
        for logger, handler in added:
            logger.removeHandler(handler)
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
        if file is not None:
            file.close()


def _open(path: str, level: int) -> logging.FileHandler:
    place = Path(path).expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(place, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"log_file {path!r} cannot be written ({reason}): give another file") from error
    file.setFormatter(logging.Formatter(_FORMAT))
    file.setLevel(level)
    return file


def _record_of(error: BaseException) -> logging.LogRecord:
    details = (type(error), error, error.__traceback__)
    return logging.LogRecord("rlhf_lightning", logging.ERROR, __file__, 0, "the run has failed", None, details)
