"""Generation: engines that sample completions, and sampling settings."""

from __future__ import annotations

from .completion import Completion
from .engine import Engine, LocalEngine
from .remote_engine import RemoteEngine
from .sampling import SamplingParams, derive_seed

__all__ = ["Completion", "Engine", "LocalEngine", "RemoteEngine", "SamplingParams", "derive_seed"]
