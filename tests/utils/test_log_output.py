"""Levels of messages, and the file that they are also written to."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from rlhf_lightning import cli
from rlhf_lightning.utils.log_output import is_chosen, log_output, take_log_options

NAMES = ("rlhf_lightning", "lightning.pytorch", "lightning.fabric", "py.warnings")


def levels() -> list[tuple[int, int]]:
    return [(logging.getLogger(name).level, len(logging.getLogger(name).handlers)) for name in NAMES]


def say() -> None:
    own = logging.getLogger("rlhf_lightning.data.filters")
    own.debug("a detail")
    own.info("a fact")
    rank_zero_info("a fact of rank 0")
    warnings.warn("a doubt", UserWarning, stacklevel=1)
    own.error("a fault")


LINES = {
    "debug": ["a detail", "a fact", "a fact of rank 0", "a doubt", "a fault"],
    "info": ["a fact", "a fact of rank 0", "a doubt", "a fault"],
    "warning": ["a doubt", "a fault"],
    "error": ["a fault"],
}


@pytest.mark.parametrize("level", LINES)
def test_a_file_has_each_message_of_the_level_once(level: str, tmp_path: Path) -> None:
    before, file = levels(), tmp_path / "deep" / "run.log"
    with log_output(level, str(file)):
        assert is_chosen()
        say()
    assert not is_chosen()
    assert levels() == before
    lines = [line for line in file.read_text().splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert len(lines) == len(LINES[level])
    for line, text in zip(lines, LINES[level], strict=True):
        assert line.endswith(text)
    with log_output(level, str(file)):
        logging.getLogger("rlhf_lightning").error("more")
    assert file.read_text().count("a fault") == 1
    assert file.read_text().endswith("more\n")


def test_other_ranks_write_no_file_and_say_no_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with log_output("debug", str(tmp_path / "run.log")):
        say()
    assert not (tmp_path / "run.log").exists()
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


def test_without_options_nothing_changes() -> None:
    before = levels()
    with log_output():
        assert levels() == before
        assert not is_chosen()


def test_options_are_taken_from_anywhere_and_the_environment_comes_second() -> None:
    given = {"RLHF_LIGHTNING_LOG_LEVEL": "debug", "RLHF_LIGHTNING_LOG_FILE": "a.log", "OTHER": "x"}
    assert take_log_options(["fit", "--config", "c.yaml"], given) == (
        ["fit", "--config", "c.yaml"],
        {"log_level": "debug", "log_file": "a.log"},
    )
    assert take_log_options(["--log_level", "error", "fit", "--log_file=b=c.log", "log_file"], given) == (
        ["fit", "log_file"],
        {"log_level": "error", "log_file": "b=c.log"},
    )
    with pytest.raises(ValueError, match=r"--log_file has no value: write --log_file=run\.log"):
        take_log_options(["fit", "--log_file"], {})


def ended(capsys: Any, *args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(args))
    assert exit_info.value.code in (1, 2)
    line: str = capsys.readouterr().err.strip().splitlines()[-1]
    return line


def test_errors_are_one_line_and_their_traceback_is_in_the_file(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    command = ("contamination", "--rows", "no.jsonl", "--against", "no.jsonl")
    line = ended(capsys, *command, f"--log_file={file}")
    assert line.startswith("rlhf-lightning: no file, folder or dataset 'no.jsonl'")
    text = file.read_text()
    assert "ERROR rlhf_lightning: the run has failed" in text
    assert "Traceback" in text
    assert "FileNotFoundError: no file, folder or dataset 'no.jsonl'" in text
    assert "log_level is 'loud'; it must be one of debug, info" in ended(capsys, *command, "--log_level=loud")
    assert f"log_file {str(tmp_path)!r} cannot be written (Is a directory)" in ended(
        capsys, *command, f"--log_file={tmp_path}"
    )


@pytest.mark.slow
def test_a_command_prints_each_message_once(tmp_path: Path) -> None:
    """In a process of its own, whose handlers are Lightning's."""
    script = (
        "import logging, warnings\n"
        "from rlhf_lightning.utils.log_output import log_output\n"
        "from tests.utils.test_log_output import say\n"
        f"with log_output('info', {str(tmp_path / 'run.log')!r}):\n"
        "    say()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for text in LINES["info"]:
        assert len(re.findall(rf"{text}$", result.stderr, flags=re.MULTILINE)) == 1, result.stderr
    assert "a detail" not in result.stderr
