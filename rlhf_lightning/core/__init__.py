"""Core of all methods: micro-batching, gradients over ranks, checkpoints and resuming, checks, logging."""

from .headed_module import HeadedModule
from .lr_schedules import WarmupSchedule
from .module import PostTrainingModule
from .reference_policy import ReferencePolicy

__all__ = ["HeadedModule", "PostTrainingModule", "ReferencePolicy", "WarmupSchedule"]
