"""Evaluation: samples answers, verifies them, and compares models with intervals and paired tests."""

from __future__ import annotations

from ..metrics.at_k import majority_at_k, pass_at_k
from ..metrics.intervals import Comparison, Interval, mcnemar, mean_interval, paired_bootstrap, wilson_interval
from .divergence import Divergence, divergence, own_samples
from .evaluate import evaluate, run_task
from .report import Report
from .results import PairedResult, PromptResult, SampleResult, TaskResult, compare
from .suite import Suite, Task
from .win_rate import WinRate, win_rate

__all__ = [
    "Comparison",
    "Divergence",
    "Interval",
    "PairedResult",
    "PromptResult",
    "Report",
    "SampleResult",
    "Suite",
    "Task",
    "TaskResult",
    "WinRate",
    "compare",
    "divergence",
    "evaluate",
    "majority_at_k",
    "mcnemar",
    "mean_interval",
    "own_samples",
    "paired_bootstrap",
    "pass_at_k",
    "run_task",
    "wilson_interval",
    "win_rate",
]
