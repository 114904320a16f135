"""Modules: one LightningModule per method, on one core."""

from .base import PostTrainingModule
from .dpo import DPOModule
from .grpo import GRPOModule
from .kto import KTOModule
from .model_rewards import ProcessModelReward, ProcessModelSteps, RewardModelReward
from .ppo import PPOModule
from .process_reward import ProcessRewardModule
from .referenced import ReferencedModule
from .reward import RewardModule
from .schedules import WarmupSchedule
from .sft import SFTModule
from .simpo import SimPOModule

__all__ = [
    "DPOModule",
    "GRPOModule",
    "KTOModule",
    "PPOModule",
    "PostTrainingModule",
    "ProcessModelReward",
    "ProcessModelSteps",
    "ProcessRewardModule",
    "ReferencedModule",
    "RewardModelReward",
    "RewardModule",
    "SFTModule",
    "SimPOModule",
    "WarmupSchedule",
]
