"""Callbacks: generation accuracy, samples, predictions, checkpoints, exports, logs, guards, and averaged weights."""

from ..loggers import JSONLLogger
from .generation_accuracy import GenerationAccuracy
from .kl_guard import KLGuard
from .model_export import ModelExport
from .prediction_writer import PredictionWriter
from .reference_sync import ReferenceSync
from .reward_guard import RewardGuard
from .sample_logger import SampleLogger
from .throughput import Throughput
from .training_checkpoint import TrainingCheckpoint
from .weight_average import WeightAverage

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
