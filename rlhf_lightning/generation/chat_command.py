"""``rlhf-lightning chat``: a conversation on the terminal, or with what is piped into it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from ..core.trainer_checks import check_single_process
from .chat import PLAIN_FORMAT, Chat
from .command import read_options
from .options import ChatOptions


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning chat``.

    Args:
        args: those of :class:`ChatOptions`, or ``--config FILE`` with them.
    """
    options = read_options("chat", ChatOptions, args, "Talks with a model; /help lists the commands.")
    check_single_process("chat")
    chat = Chat(options, options.engine(), _show, _say)
    if not chat.has_template:
        _say(f"the model has no chat template: turns are written as {PLAIN_FORMAT}")
    if sys.stdin.isatty():
        _say("/help lists the commands; Ctrl-C stops an answer")
    chat.run(_lines())
    _say(f"{chat.answers} answers: {chat.telemetry()}")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Yields what is typed or piped, until it ends; Ctrl-C discards a line."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - lets input() edit lines and remember them; missing on Windows

        prompt = "> "
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("\n/quit ends the program")
            continue
        yield line
