"""Callbacks: what a model writes and how right it is, export, a plain log, and what guards or moves a policy."""

from .accuracy import GenerationAccuracy
from .export import ModelExport
from .history import JSONLLogger
from .kl_guard import KLGuard
from .reference_sync import ReferenceSync
from .samples import SampleLogger

__all__ = ["GenerationAccuracy", "JSONLLogger", "KLGuard", "ModelExport", "ReferenceSync", "SampleLogger"]
