"""RLHF in PyTorch Lightning: one LightningModule per method, paired with LightningDataModules."""

from .utils import quiet  # noqa: F401, I001  (first: it hides what is said when peft is imported)
from .distributed.strategy import FSDP2Strategy
from .modules import (
    ContextCompressionModule,
    DPOModule,
    GRPOModule,
    KTOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    SFTModule,
    SimPOModule,
)

__version__ = "0.1.0"
__all__ = [
    "ContextCompressionModule",
    "DPOModule",
    "FSDP2Strategy",
    "GRPOModule",
    "KTOModule",
    "PPOModule",
    "ProcessRewardModule",
    "RewardModule",
    "SFTModule",
    "SimPOModule",
    "__version__",
]
