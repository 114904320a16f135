"""Runs untrusted programs, isolated by the operating system and judged from outside."""

from .isolation import Isolation, IsolationChoice, resolve_isolation
from .runs import Judge, run_script

__all__ = ["Isolation", "IsolationChoice", "Judge", "resolve_isolation", "run_script"]
