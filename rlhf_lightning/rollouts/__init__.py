"""Generation: engines that sample completions, and the settings that they sample with."""

from __future__ import annotations

from .completion import Completion
from .generation import Engine, LocalEngine
from .remote import RemoteEngine
from .sampling import SamplingParams, derive_seed

__all__ = ["Completion", "Engine", "LocalEngine", "RemoteEngine", "SamplingParams", "derive_seed"]
