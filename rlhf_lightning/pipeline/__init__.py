"""Staged runs: stages start from the exports of earlier ones; finished and unchanged stages are not run again."""

from .config import Pipeline, load_pipeline
from .runner import run_pipeline

__all__ = ["Pipeline", "load_pipeline", "run_pipeline"]
