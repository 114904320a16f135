"""Core of all methods: micro-batching, gradients over ranks, checkpoints and resuming, checks, logging."""

from .lr_schedules import WarmupSchedule
from .module import PostTrainingModule
from .reference_policy import ReferencePolicy

__all__ = ["PostTrainingModule", "ReferencePolicy", "WarmupSchedule"]
