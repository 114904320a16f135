"""Modules: one LightningModule per method, on one core."""

from .base import PostTrainingModule
from .dpo import DPOModule
from .schedules import WarmupSchedule
from .sft import SFTModule

__all__ = ["DPOModule", "PostTrainingModule", "SFTModule", "WarmupSchedule"]
