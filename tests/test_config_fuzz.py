"""Anything at all in a configuration: a module, a datamodule and a trainer, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning import cli

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = {file.parent.name: yaml.safe_load(file.read_text()) for file in sorted(CONFIGS.glob("*/tiny.yaml"))}
# Other values that a file may well have.
MORE: dict[str, dict[str, Any]] = {
    "model": {
        "lora": {"r": 4},
        "quantization": "nf4",
        "micro_batch_tokens": 100,
        "layout": "auto",
        "max_grad_norm": 1.0,
        "tokenizer": None,
        "lr_scheduler": {"class_path": "rlhf_lightning.core.WarmupSchedule", "init_args": {"warmup_steps": 3}},
    },
    "data": {"max_length": 64, "columns": {"prompt": "p"}, "on_bad_row": "skip", "seed": 1, "streaming": True},
    "trainer": {"max_epochs": 1, "precision": "32-true", "val_check_interval": 0.5, "limit_train_batches": 2},
}


def bounded(examples: int) -> settings:
    """So many examples, the same ones every time."""
    unfixed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=unfixed
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in an empty folder; everything is built as for a run, and left."""
    real = cli.PostTrainingCLI
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(cli, "PostTrainingCLI", lambda args: real(args[1:], run=False))


def attempt(*args: str) -> str | None:
    """Runs a command line: None if it can be built, else what it says, which is one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main(["fit", *args])
    except SystemExit as stop:
        code = stop.code
    else:
        return None
    assert code in (1, 2)
    lines = [line for line in said.getvalue().split("\n") if line]
    complaints = [line for line in lines if line.startswith("rlhf-lightning: ")]
    assert len(complaints) == 1, said.getvalue()
    assert lines[-1] == complaints[0], said.getvalue()
    assert "Traceback" not in said.getvalue()
    message = complaints[0].removeprefix("rlhf-lightning: ")
    assert message.isprintable(), repr(message)
    assert 3 < len(message) <= 1000
    return message


# Values that are in the wrong place nearly anywhere.

NUMBERS = [0, -1, 1, 2**40, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", " ", "-1", "1e999", "null", "yes", "ünï→", "a\nb", "\u202e", "${x}", "~", "../..", "x" * 300, "\x7f"]
LISTS: list[Any] = [[], [1], ["a", None]]
TREES: list[Any] = [
    {},
    {"a": 1},
    {"class_path": "x"},
    {"class_path": "os.getcwd"},
    {"init_args": {"x": 1}},
    {"class_path": "torch.optim.SGD", "init_args": {"lr": "much"}},
    {"class_path": None},
    {"class_path": ["a"]},
]
odd = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *LISTS, *TREES])
words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=6)
methods = st.sampled_from(sorted(TINY))


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a configuration."""
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(value, (*path, key))


def misspelt(draw: st.DrawFn, key: str) -> str:
    """A key with a letter too many, too few, or two in the wrong order."""
    place = draw(st.integers(0, len(key) - 1))
    return draw(
        st.sampled_from(
            [
                key[:place] + key[place + 1 :],
                key[:place] + key[place] + key[place:],
                key[:place] + key[place : place + 2][::-1] + key[place + 2 :],
                key.upper(),
                key + "s",
            ]
        )
    )


@st.composite
def changed(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """A tiny configuration with one to three changes, and the names of what was changed."""
    content = copy.deepcopy(TINY[draw(methods)])
    for section in draw(st.lists(st.sampled_from(sorted(MORE)), unique=True)):
        options = content[section].get("init_args", content[section])
        key = draw(st.sampled_from(sorted(MORE[section])))
        options[key] = copy.deepcopy(MORE[section][key])
    touched: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths(content), key=str) or [("model",)]))
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        key = path[-1]
        touched += [str(part) for part in path]
        kind = draw(st.sampled_from(["value", "value", "value", "misspelt", "dropped", "added"]))
        if kind == "value" or isinstance(place, list):
            place[key] = draw(odd)
        elif kind == "misspelt" and isinstance(key, str) and key and key in place:
            name = misspelt(draw, key)
            place[name] = place.pop(key)
            touched.append(name)
        elif kind == "dropped":
            place.pop(key, None)
        else:
            name = draw(words)
            place[name] = draw(odd)
            touched.append(name)
    return content, touched


@bounded(30)
@given(change=changed())
def test_any_change(tmp_path: Path, change: tuple[dict[str, Any], list[str]]) -> None:
    content, touched = change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    said = attempt(f"--config={file}")
    if said is not None:
        # Without its class_path, a section's options are what nobody knows.
        assert said.startswith("no option '") or any(name in said for name in touched), (said, touched)


pieces = st.sampled_from(
    [b"\t", b"{", b"]", b"- ", b": ", b"&a *a", b"*b", b"!!python/name:os.system", b"\x00", b"\xff"]
)


@bounded(12)
@given(method=methods, where=st.floats(0, 1), piece=pieces, cut=st.integers(0, 9))
def test_any_text(tmp_path: Path, method: str, where: float, piece: bytes, cut: int) -> None:
    text = (CONFIGS / method / "tiny.yaml").read_bytes()
    place = int(where * len(text))
    file = tmp_path / "mine.yaml"
    file.write_bytes(text[:place] + piece + text[place + cut :])
    attempt(f"--config={file}")


@bounded(12)
@given(
    method=methods,
    key=st.sampled_from(
        ["model", "model.beta", "data.train", "data", "trainer.max_steps", "trainer", "seed_everything"]
    )
    | words,
    value=words | st.sampled_from([str(number) for number in NUMBERS]),
)
def test_any_option(method: str, key: str, value: str) -> None:
    attempt(f"--config={CONFIGS / method / 'tiny.yaml'}", f"--{key}={value}")


@pytest.mark.parametrize("value", [None, 3, True, ["a"], {"a": 1}])
@pytest.mark.parametrize("section", ["model", "data"])
def test_a_class_path_that_is_no_text(tmp_path: Path, section: str, value: Any) -> None:
    content = copy.deepcopy(TINY["dpo"])
    content[section]["class_path"] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    said = attempt(f"--config={file}")
    assert said is not None
    assert "class_path" in said


def test_what_is_wrong_inside_of_a_class_is_reported(tmp_path: Path) -> None:
    content = copy.deepcopy(TINY["dpo"])
    content["trainer"]["logger"]["init_args"] = [1]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    said = attempt(f"--config={file}")
    assert said is not None
    assert not said.endswith(":"), said


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("trainer.enable_checkpointing", "yes", "'yes' is not allowed: expected bool or null"),
        ("trainer.limit_train_batches", "on", "'on' is not allowed: expected int or float or null"),
        ("trainer.max_steps", "yes", "'yes' is not allowed: expected int"),
        ("trainer.max_steps", "12:30", "'12:30' is not allowed: expected int"),
        ("model.share_prefix", "no", "'no' is not allowed: expected bool"),
    ],
)
def test_texts_where_yaml_once_had_other_values(tmp_path: Path, option: str, value: str, words: str) -> None:
    """In a file and on the command line: the text as it is written, and what is allowed."""
    section, key = option.split(".")
    inner = f"init_args: {{{key}: '{value}'}}" if section == "model" else f"{key}: '{value}'"
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}: {{{inner}}}\n")
    for argument in (f"--config={file}", f"--{option}={value}"):
        said = attempt(f"--config={CONFIGS / 'dpo' / 'tiny.yaml'}", argument)
        assert said is not None
        assert said.endswith(f"{key}: {words}"), (argument, said)
