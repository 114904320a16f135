"""A conversation with a model: turns, answers that are shown while they are written, and commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.chat_template import ChatTemplate
from ..data.text_tokens import encode, prompt_tokens
from ..inference import EnsemblePolicy, LocalEngine, SamplingParams, Strategy, derive_seed
from ..inference.answering import takes_tokens
from ..inference.completion import GrowingText, Request
from ..inference.telemetry import Telemetry
from ..utils.files import json_line, json_values, write_atomically
from ..utils.messages import did_you_mean
from .options import ChatOptions

PLAIN_FORMAT = "'System: ...', 'User: ...' and 'Assistant: ...', a line each"
_STOP = "\nUser:"
_COMMANDS = {
    "/reset": "forgets the conversation; the system message stays",
    "/system": "TEXT sets the system message; alone, shows it",
    "/save": "FILE writes the conversation as a row of JSON Lines, with the column messages",
    "/help": "lists these commands; a line that begins with // is sent with one / less",
    "/quit": "ends the program, as the end of the input does",
}


class _StoppedError(Exception):
    """Raised to end an answer."""


class Chat:
    """A conversation.

    Args:
        options: settings of the samples, system message, seed.
        engine: an engine or a strategy.
        show: shows a piece of an answer at once.
        say: shows a line about the conversation.

    Attributes:
        messages: the turns so far, without the system message.
        answers: number of answers, stopped ones included; a turn that has none, such as a failed one, does not count.
    """

    def __init__(
        self, options: ChatOptions, engine: Any, show: Callable[[str], object], say: Callable[[str], object]
    ) -> None:
        self.options, self.engine, self.show, self.say = options, engine, show, say
        self.system = options.system
        self.messages: list[dict[str, Any]] = []
        self.answers = 0
        # Of the user, those without an answer included: a turn that is tried again draws anew.
        self._turns = 0
        self.tokenizer = engine.tokenizer
        self.has_template = self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def run(self, lines: Iterable[str]) -> None:
        """Answers lines, and carries out the commands among them, until they end or one is ``/quit``."""
        for line in lines:
            text = line.strip()
            if text.startswith("/") and not text.startswith("//"):
                if text.split()[0] == "/quit":
                    return
                self._command(*text.partition(" ")[::2])
            elif text:
                self.answer(text.removeprefix("/") if text.startswith("//") else text)

    def answer(self, text: str) -> str:
        """Answers a turn of the user, and shows the answer while it is written; Ctrl-C ends it where it is.

        Returns:
            The answer; if it is empty, the turn is forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""

        def show(piece: str) -> None:
            nonlocal answer
            # After the colon of the plain format, an answer begins with a blank.
            piece = piece if answer or self.has_template else piece.lstrip()
            answer += piece
            self.show(piece)

        failed = True
        try:
            said = self._write(show)
            failed = False
        except (_StoppedError, KeyboardInterrupt):
            said = "stopped"
        except ValueError as error:
            # The history may no longer fit, or the template refuses it.
            said = f"{error} (/reset forgets the conversation)"
        if answer or not failed:
            self.show("\n")
        if said:
            self.say(said)
        self._turns += 1
        if answer:
            self.answers += 1
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()
        return answer

    def telemetry(self) -> Telemetry:
        """Tells what the answers so far have cost."""
        return Telemetry.of(self.engine)

    # Answers.

    def context(self) -> list[dict[str, Any]]:
        """Returns the messages that the model is given."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def prompt(self) -> list[int]:
        """Returns the tokens from which the next answer is written.

        Raises:
            ValueError: the chat template refuses the messages.
        """
        if self.has_template:
            text = ChatTemplate(self.tokenizer).context(self.context(), self.options.chat_template_kwargs)
            return encode(self.tokenizer, text)
        return prompt_tokens(self.tokenizer, plain_prompt(self.context()))

    def sampling(self) -> SamplingParams:
        """Returns the settings of the samples; without a template, the next turn of the user ends an answer, too."""
        if self.has_template:
            return self.options.sampling
        return replace(self.options.sampling, stop=(*self.options.sampling.stop, _STOP))

    def _write(self, show: Callable[[str], object]) -> str:
        """Shows an answer; returns what there is to say of it."""
        prompt, params = self.prompt(), self.sampling()
        seed = derive_seed(self.options.seed, self._turns)
        if isinstance(self.engine, Strategy):
            with _ctrl_c(at_once=True):
                encoded = [prompt] if takes_tokens(self.engine) else None
                found = self.engine.search([self.context()], [seed], sampling=params, encoded=encoded)[0]
            show(found.text)
            return f"{'' if found.score is None else f'score {found.score:.3g}, '}{found.tokens} tokens"
        if not isinstance(self.engine, LocalEngine | EnsemblePolicy):
            with _ctrl_c(at_once=True):
                given = prompt if takes_tokens(self.engine) else self.context()
                completion = self.engine.generate([given], 1, params, seeds=[[seed]])[0][0]
            show(completion.text)
            return ""
        shown = ShownText(self.tokenizer, params.stop)
        with _ctrl_c() as stop_asked:

            def watch(request: Request) -> None:
                if piece := shown.push(request.token_ids):
                    show(piece)
                if stop_asked():
                    raise _StoppedError

            completion = self.engine.generate([prompt], 1, params, seeds=[[seed]], watch=watch)[0][0]
        show(completion.text[len(shown.text) :])
        return ""

    # Commands.

    def _command(self, name: str, argument: str) -> None:
        if name == "/reset":
            self.messages.clear()
        elif name == "/system" and argument.strip():
            self.system = argument.strip()
        elif name == "/system":
            self.say(self.system or "there is no system message")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/help":
            for command, text in _COMMANDS.items():
                self.say(f"{command} {text}")
        else:
            self.say(f"there is no command {name!r}{did_you_mean(name, _COMMANDS)} (/help lists them)")

    def _save(self, name: str) -> None:
        place = Path(name).expanduser()
        if not name:
            self.say("/save needs a file: /save chat.jsonl")
        elif place.exists():
            self.say(f"{name!r} exists: save to another file")
        else:
            try:
                write_atomically(place, json_line(json_values({"messages": self.context()})))
            except OSError as error:
                self.say(f"{name!r} cannot be written ({error.strerror}): save to another file")


class ShownText:
    """The text of an answer that can be shown: whole characters, and nothing that may become a stop string.

    Args:
        tokenizer: decodes the tokens.
        stop: the stop strings.

    Attributes:
        text: what ``push`` has returned so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._grown = GrowingText(tokenizer)
        self._stop = stop
        self.text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes all tokens so far; returns what can be shown in addition."""
        self._grown.push(token_ids)
        whole = self._grown.text
        ends = [at for string in self._stop if (at := whole.find(string)) >= 0]
        end = min([*ends, len(whole) - _begun(whole, self._stop)])
        piece = whole[len(self.text) : end]
        self.text += piece
        return piece


def _begun(text: str, stop: Sequence[str]) -> int:
    r"""Counts the last characters of a text with which a stop string may have begun.

    Example:
        >>> _begun("so\nUse", ["\nUser:"]), _begun("so", ["\nUser:"])
        (4, 0)
    """
    lengths = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return max(lengths, default=0)


def plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    r"""Writes a conversation for a model without a chat template.

    Example:
        >>> plain_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
        'System: Be brief.\nUser: Why?\nAssistant:'
    """
    lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


@contextmanager
def _ctrl_c(*, at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """Lets Ctrl-C ask for a stop; the second time, or with ``at_once``, it raises where the program is.

    An answer stops between two tokens, so that the model and its caches are left as after any other.

    Returns:
        A function that tells whether it was asked for.
    """
    asked = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked or at_once:
            raise KeyboardInterrupt
        asked = True

    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
