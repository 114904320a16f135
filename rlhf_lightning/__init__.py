"""RLHF in PyTorch Lightning: one LightningModule per method, paired with LightningDataModules."""

from . import _noise  # noqa: F401  (first: it hides what is said when peft is imported)
from .modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    SFTModule,
    SimPOModule,
)
from .strategies import FSDP2Strategy

__version__ = "0.1.0"
__all__ = [
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
