"""RLHF in PyTorch Lightning: one LightningModule per method, paired with LightningDataModules."""

from .modules import DPOModule, SFTModule

__version__ = "0.1.0"
__all__ = ["DPOModule", "SFTModule", "__version__"]
