"""Lines of metrics, read back."""

from __future__ import annotations

import torch

from rlhf_lightning.callbacks import JSONLLogger
from rlhf_lightning.callbacks.history import read_history


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
