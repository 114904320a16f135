"""Methods: one LightningModule per method, based on ``rlhf_lightning.core``."""

from .context_compression import ContextCompressionModule
from .dpo import DPOModule
from .grpo import GRPOModule
from .kto import KTOModule
from .ppo import PPOModule
from .process_reward import ProcessRewardModule
from .reward import RewardModule
from .sft import SFTModule
from .simpo import SimPOModule

__all__ = [
    "ContextCompressionModule",
    "DPOModule",
    "GRPOModule",
    "KTOModule",
    "PPOModule",
    "ProcessRewardModule",
    "RewardModule",
    "SFTModule",
    "SimPOModule",
]
