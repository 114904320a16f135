"""Staged runs: stages start from what earlier ones exported; what is finished and unchanged is not done again."""

from .config import Pipeline, load_pipeline
from .runner import run_pipeline

__all__ = ["Pipeline", "load_pipeline", "run_pipeline"]
