"""Merges models: methods by their conventions, streamed from disk to disk, with a manifest."""

from __future__ import annotations

from ..inference import EnsemblePolicy
from .conflicts import conflict_report
from .manifest import verify
from .merge import merge
from .soups import greedy_soup, uniform_soup

__all__ = ["EnsemblePolicy", "conflict_report", "greedy_soup", "merge", "uniform_soup", "verify"]
