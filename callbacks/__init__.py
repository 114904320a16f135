"""Callbacks: accuracy of completions, samples, predictions, checkpoints, exports, guards, averages, merges, rounds."""

from ..loggers import JSONLLogger
from .generation_accuracy import GenerationAccuracy
from .kl_guard import KLGuard
from .model_export import ModelExport
from .model_merging import ModelMerging
from .prediction_writer import PredictionWriter
from .reference_sync import ReferenceSync
from .reward_guard import RewardGuard
from .sample_logger import SampleLogger
from .self_improvement import SelfImprovement
from .throughput import Throughput
from .training_checkpoint import TrainingCheckpoint
from .weight_average import WeightAverage

__all__ = [
    "GenerationAccuracy",
    "JSONLLogger",
    "KLGuard",
    "ModelExport",
    "ModelMerging",
    "PredictionWriter",
    "ReferenceSync",
    "RewardGuard",
    "SampleLogger",
    "SelfImprovement",
    "Throughput",
    "TrainingCheckpoint",
    "WeightAverage",
]
