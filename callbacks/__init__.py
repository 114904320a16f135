"""Callbacks: what a model writes and how right it is, checkpoints, export, a log, and what guards or moves a policy."""

from .accuracy import GenerationAccuracy
from .checkpoint import TrainingCheckpoint
from .export import ModelExport
from .history import JSONLLogger
from .kl_guard import KLGuard
from .reference_sync import ReferenceSync
from .samples import SampleLogger
from .throughput import Throughput

__all__ = [
    "GenerationAccuracy",
    "JSONLLogger",
    "KLGuard",
    "ModelExport",
    "ReferenceSync",
    "SampleLogger",
    "Throughput",
    "TrainingCheckpoint",
]
