"""Callbacks: what a model writes and how right it is, checkpoints, export, a log; guards, and what moves weights."""

from .accuracy import GenerationAccuracy
from .checkpoint import TrainingCheckpoint
from .ema import WeightAverage
from .export import ModelExport
from .history import JSONLLogger
from .kl_guard import KLGuard
from .prediction_writer import PredictionWriter
from .reference_sync import ReferenceSync
from .reward_guard import RewardGuard
from .samples import SampleLogger
from .throughput import Throughput

__all__ = [
    "GenerationAccuracy",
    "JSONLLogger",
    "KLGuard",
    "ModelExport",
    "PredictionWriter",
    "ReferenceSync",
    "RewardGuard",
    "SampleLogger",
    "Throughput",
    "TrainingCheckpoint",
    "WeightAverage",
]
