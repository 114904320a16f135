"""Lines of metrics, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.loggers import tensorboard

from rlhf_lightning import cli
from rlhf_lightning.callbacks import JSONLLogger
from rlhf_lightning.loggers import read_history


def test_lines_are_appended_and_read_back(tmp_path):
    logger = JSONLLogger(str(tmp_path / "deep/history.jsonl"))
    logger.log_metrics({"train/loss": torch.tensor(0.5), "n": 3}, step=7)
    logger.log_metrics({"bad": float("nan"), "worse": float("inf")}, step=8)
    JSONLLogger(str(tmp_path / "deep/history.jsonl")).log_metrics({"x": 1.0})
    assert read_history(tmp_path / "deep/history.jsonl") == [
        {"step": 7, "train/loss": 0.5, "n": 3.0},
        {"step": 8, "bad": None, "worse": None},
        {"step": None, "x": 1.0},
    ]
    assert logger.save_dir == str(tmp_path / "deep")
    assert logger.name == "history"


def test_no_file_is_no_history(tmp_path):
    assert read_history(tmp_path / "none.jsonl") == []


def test_a_line_that_was_cut_off_is_skipped(tmp_path):
    path = tmp_path / "history.jsonl"
    JSONLLogger(str(path)).log_metrics({"a": 1.0}, step=1)
    with path.open("a") as file:
        file.write('{"step": 2, "a"')
    again = JSONLLogger(str(path))
    again.log_metrics({"a": 2.5}, step=2)
    again.log_metrics({"a": 3.0}, step=3)
    assert read_history(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.5}, {"step": 3, "a": 3.0}]


def test_steps_that_a_resumed_run_made_again_are_there_once(tmp_path):
    path = tmp_path / "history.jsonl"
    first = JSONLLogger(str(path))
    for step in (0, 1, 2, 2, 3):
        first.log_metrics({"first": 1.0}, step=step)
    second = JSONLLogger(str(path))
    for step in (1, 2, 3, 4):
        second.log_metrics({"second": 1.0}, step=step)
    found = [(row["step"], "first" if "first" in row else "second") for row in read_history(path)]
    assert found == [(0, "first"), (1, "second"), (2, "second"), (3, "second"), (4, "second")]


def test_tensorboard_that_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    configs = ("configs/sft/tiny.yaml", "configs/logger/tensorboard.yaml")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["fit", *(f"--config={file}" for file in configs)])
    assert exit_info.value.code in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "rlhf-lightning: TensorBoardLogger needs tensorboard: pip install 'rlhf-lightning[tensorboard]'"
    assert not list(Path(tmp_path).iterdir())
