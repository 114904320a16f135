"""Staged runs: each stage starts from what an earlier one exported; what is finished and unchanged is not done again."""

from .config import Pipeline, load_pipeline
from .runner import run_pipeline

__all__ = ["Pipeline", "load_pipeline", "run_pipeline"]
