"""Evaluation: samples answers, verifies them, and compares models with intervals and paired tests."""

from __future__ import annotations

from ..metrics.at_k import majority_at_k, pass_at_k
from ..metrics.intervals import Comparison, Interval, mcnemar, mean_interval, paired_bootstrap, wilson_interval
from .contamination import Contamination, Overlap, contamination
from .divergence import Divergence, divergence, own_samples
from .evaluate import evaluate
from .harness import HarnessModel, harness_model
from .history import HistoryEntry, read_history
from .report import Report
from .results import PairedResult, TaskResult, compare
from .row_tasks import FirstErrorTask, PreferenceTask
from .running import run_task
from .samples import PromptResult, SampleResult
from .suite import Suite
from .tasks import Task
from .win_rate import WinRate, win_rate

__all__ = [
    "Comparison",
    "Contamination",
    "Divergence",
    "FirstErrorTask",
    "HarnessModel",
    "HistoryEntry",
    "Interval",
    "Overlap",
    "PairedResult",
    "PreferenceTask",
    "PromptResult",
    "Report",
    "SampleResult",
    "Suite",
    "Task",
    "TaskResult",
    "WinRate",
    "compare",
    "contamination",
    "divergence",
    "evaluate",
    "harness_model",
    "majority_at_k",
    "mcnemar",
    "mean_interval",
    "own_samples",
    "paired_bootstrap",
    "pass_at_k",
    "read_history",
    "run_task",
    "wilson_interval",
    "win_rate",
]
