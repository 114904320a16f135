"""Merges models: methods by their conventions, streamed from disk to disk, with a manifest."""

from __future__ import annotations

from .manifest import verify
from .merge import merge

__all__ = ["merge", "verify"]
