"""Callbacks: accuracy, samples, checkpoints, exports, logs, guards, gates, rounds, averages, merges, penalties."""

from ..loggers import JSONLLogger
from .capability_gate import CapabilityGate
from .elastic_weight_consolidation import ElasticWeightConsolidation
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
    "CapabilityGate",
    "ElasticWeightConsolidation",
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
