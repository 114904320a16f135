"""``rlhf-lightning chat``: turns against an engine called by hand, commands, streaming, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.generation.chat import Chat, ShownText
from rlhf_lightning.generation.options import ChatOptions
from rlhf_lightning.inference import LocalEngine, MajorityVote, SamplingParams, derive_seed

from ..helpers import char_tokenizer, save_tiny_model, tiny_model
from ..test_cli import refused

REPOSITORY = Path(__file__).parents[2]
PARAMS = SamplingParams(max_new_tokens=6, top_k=20)


@pytest.fixture
def engine() -> LocalEngine:
    return LocalEngine(tiny_model("llama"), char_tokenizer(), cache="paged")


class Screen:
    """Output of a conversation."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.lines: list[str] = []

    @property
    def shown(self) -> str:
        return "".join(self.pieces)


def talk(engine: Any, *lines: str, **options: Any) -> tuple[Chat, Screen]:
    screen = Screen()
    chat = Chat(
        ChatOptions(model="", **{"sampling": PARAMS, **options}), engine, screen.pieces.append, screen.lines.append
    )
    chat.run(lines)
    return chat, screen


def alone(text: str, number: int, seed: int = 0) -> str:
    """The answer after a rendered conversation, from an engine of its own without a cache across calls."""
    engine = LocalEngine(tiny_model("llama"), char_tokenizer())
    return engine.generate([text], 1, PARAMS, seeds=[[derive_seed(seed, number)]])[0][0].text


def test_every_answer_continues_the_conversation(engine):
    chat, screen = talk(engine, "1+1", "", "2+2", "/reset", "3+3", system="be brief", seed=4)
    first = alone("<system>be brief\n<user>1+1\n<assistant>", 0, 4)
    second = alone(f"<system>be brief\n<user>1+1\n<assistant>{first}<eos><user>2+2\n<assistant>", 1, 4)
    third = alone("<system>be brief\n<user>3+3\n<assistant>", 2, 4)
    assert screen.shown == f"{first}\n{second}\n{third}\n"
    assert chat.context() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": third},
    ]
    assert screen.lines == []
    # The pages of the turn before are found again: whole ones of 16 tokens.
    assert chat.telemetry().reused_tokens >= 32
    assert chat.telemetry().new_tokens == 18


def test_text_is_shown_as_it_is_written(engine):
    _, screen = talk(engine, "1+1")
    assert len(screen.pieces) == 6 + 2  # of each token; the rest of the answer, which is empty, and the line's end
    assert screen.pieces[:6] == list(alone("<user>1+1\n<assistant>", 0))


def test_commands(engine, tmp_path):
    saved = tmp_path / "chat.jsonl"
    lines = [
        "/system",
        "/system be brief",
        "/system",
        "1+1",
        f"/save {saved}",
        f"/save {saved}",
        "/save",
        "/rest",
        "/help",
    ]
    chat, screen = talk(engine, *lines, "//half", "/quit", "2+2")
    assert json.loads(saved.read_text()) == {"messages": chat.context()[:3]}
    assert saved.read_text().count("\n") == 1
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["1+1", "/half"]
    assert screen.lines[:2] == ["there is no system message", "be brief"]
    assert screen.lines[2:5] == [
        f"'{saved}' exists: save to another file",
        "/save needs a file: /save chat.jsonl",
        "there is no command '/rest'; did you mean '/reset'? (/help lists them)",
    ]
    assert [line.split()[0] for line in screen.lines[5:]] == ["/reset", "/system", "/save", "/help", "/quit"]


def test_a_conversation_that_no_longer_fits(engine):
    chat, screen = talk(engine, "1+1", "1" * 120, "2+2")
    assert len(screen.lines) == 1
    assert "leaves no room in the model's 128 positions" in screen.lines[0]
    assert screen.lines[0].endswith("(/reset forgets the conversation)")
    assert [message["content"] for message in chat.messages][::2] == ["1+1", "2+2"]


def test_only_answers_are_counted(engine):
    # A turn that fails before a token does not count; its turn has a number, by which the next one is drawn.
    chat, _ = talk(engine, "1+1", "1" * 120, "2+2")
    assert chat.answers == 2
    first = chat.messages[1]["content"]
    assert chat.messages[3]["content"] == alone(f"<user>1+1\n<assistant>{first}<eos><user>2+2\n<assistant>", 2)
    # Nor is an end alone, or a turn that is stopped before its first token.
    silent = Scripted(char_tokenizer(), "", "2")
    assert talk(silent, "1+1", "1+1")[0].answers == 1
    chat, screen = talk(Stopped(char_tokenizer()), "1+1")
    assert (chat.answers, chat.messages, screen.lines) == (0, [], ["stopped"])


class Scripted:
    """Writes an answer with one token per character."""

    def __init__(self, tokenizer: Any, *answers: str) -> None:
        self.tokenizer, self.answers, self.prompts = tokenizer, list(answers), []

    def generate(self, prompts: Sequence[Any], num_samples: int, sampling: SamplingParams, *, seeds: Any) -> Any:
        self.prompts.append((self.tokenizer.decode(prompts[0]), sampling.stop))
        from rlhf_lightning.inference import Completion

        return [[Completion([5], self.answers.pop(0), [0.0], "stop")]]


class Stopped(Scripted):
    """Is interrupted before it has an answer."""

    def generate(self, prompts: Sequence[Any], num_samples: int, sampling: SamplingParams, *, seeds: Any) -> Any:
        raise KeyboardInterrupt


def test_a_model_without_a_template():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    engine = Scripted(tokenizer, " it is 2", " 4")
    chat, screen = talk(engine, "1+1", "2+2", system="be brief")
    # Capital letters are unknown to this tokenizer.
    rendered = "System: be brief\nUser: 1+1\nAssistant: it is 2\nUser: 2+2\nAssistant:"
    rendered = rendered.replace("S", "<unk>").replace("U", "<unk>").replace("A", "<unk>")
    assert engine.prompts[1] == (rendered, ("\nUser:",))
    assert engine.prompts[0][0] == rendered[: rendered.index(" it")]
    assert screen.shown == "it is 2\n4\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "4"}


def test_a_stop_string_is_never_shown():
    tokenizer = char_tokenizer()
    shown = ShownText(tokenizer, ["\nuser:", "##"])
    ids = tokenizer("a\nu#b\nuse\nuser: c")["input_ids"]
    pieces = [shown.push(ids[: number + 1]) for number in range(len(ids))]
    # Held back while it may still become a stop string.
    assert pieces[:9] == ["a", "", "", "\nu", "#b", "", "", "", ""]
    assert "".join(pieces) == shown.text == "a\nu#b\nuse"


def test_a_strategy_answers(engine):
    strategy = MajorityVote(engine, n=3)
    chat, screen = talk(strategy, "1+1")
    prompt = "<user>1+1\n<assistant>"
    expected = strategy.search([prompt], [derive_seed(0, 0)], sampling=PARAMS)[0]
    assert screen.shown == f"{expected.text}\n"
    assert screen.lines == [f"score {expected.score:.3g}, {expected.tokens} tokens"]
    assert chat.telemetry().expansions == 6


def test_ctrl_c_stops_an_answer_and_not_the_conversation(engine):
    chat, screen = talk(engine)
    show, shown = chat.show, []

    def press(piece: str) -> None:
        shown.append(piece)
        show(piece)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    chat.show = press
    before = signal.getsignal(signal.SIGINT)
    chat.run(["1+1"])
    whole = alone("<user>1+1\n<assistant>", 0)
    assert chat.messages[-1] == {"role": "assistant", "content": whole[:2]}
    assert screen.lines == ["stopped"]
    assert chat.answers == 1
    assert signal.getsignal(signal.SIGINT) is before
    chat.run(["2+2"])
    assert chat.messages[-1]["content"] == alone(f"<user>1+1\n<assistant>{whole[:2]}<eos><user>2+2\n<assistant>", 1)


def test_piped_lines(tiny_model_folder: Callable[[str], Path], monkeypatch, capsys):
    options = ["--sampling.max_new_tokens=6", "--sampling.top_k=20", "--system=be brief"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1\n/quit\n2+2\n"))
    main(["chat", f"--model={tiny_model_folder('llama')}", *options])
    captured = capsys.readouterr()
    assert captured.out == alone("<system>be brief\n<user>1+1\n<assistant>", 0) + "\n"
    assert captured.err.strip().splitlines()[-1].startswith("1 answers: prompts 38 tokens (")
    # The input's end is an end, too.
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1"))
    main(["chat", f"--model={tiny_model_folder('llama')}", *options, "--strategy=majority_vote", "--strategy.n=3"])
    assert "score " in capsys.readouterr().err


def test_the_plain_format_is_stated(tmp_path, monkeypatch, capsys):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    main(["chat", f"--model={folder}"])
    said = capsys.readouterr().err
    assert (
        "the model has no chat template: turns are written as 'System: ...', 'User: ...' and 'Assistant: ...'" in said
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "chat: no model given"),
        (["--model=m", "--systen=x"], "chat: no option 'systen'; did you mean 'system'?"),
        (["--model=m", "--sampling.top_p=0"], "top_p=0.0 is not allowed"),
        (["--model=m", "--strategy=best_if"], "there is no strategy 'best_if'"),
    ],
)
def test_mistakes(args, message, capsys):
    assert message in refused(capsys, "chat", *args)[1]


@pytest.mark.slow
def test_ctrl_c_in_a_process(tiny_model_folder: Callable[[str], Path]):
    """A signal stops the answer; the next line is answered."""
    command = [sys.executable, "-m", "rlhf_lightning", "chat", f"--model={tiny_model_folder('llama')}"]
    process = subprocess.Popen(
        [*command, "--sampling.max_new_tokens=100", "--sampling.min_new_tokens=100", "--sampling.top_k=20"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"1+1\n")
    process.stdin.flush()
    begun = process.stdout.read1(5)
    assert begun
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.stdin.write(b"/reset\n2+2\n")
    process.stdin.flush()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.decode().splitlines()[0] == "stopped"
    # Of the first answer not all tokens, and all of the second.
    new = int(re.search(r"2 answers: .*, new (\d+) tokens", said.decode())[1])
    assert 100 <= new < 200
    engine = LocalEngine.from_pretrained(tiny_model_folder("llama"))
    params = SamplingParams(max_new_tokens=100, min_new_tokens=100, top_k=20)
    expected = engine.generate(["<user>2+2\n<assistant>"], 1, params, seeds=[[derive_seed(0, 1)]])[0][0].text
    assert (begun + out).decode().endswith(f"\n{expected}\n")
