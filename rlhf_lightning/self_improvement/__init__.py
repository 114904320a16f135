"""Self-improvement: candidates are accepted by a paired test, or rejected."""

from .gate import CapabilityCriteria, Decision, decide

__all__ = ["CapabilityCriteria", "Decision", "decide"]
