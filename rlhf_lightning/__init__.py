"""RLHF in PyTorch Lightning: one LightningModule per method, paired with LightningDataModules."""

from .utils import quiet  # noqa: F401, I001  (first: it hides what is said when peft is imported)
from . import modules
from .distributed.strategy import FSDP2Strategy
from .modules import *  # noqa: F403  (what modules.__all__ lists)

__version__ = "0.1.0"
__all__ = ["FSDP2Strategy", "__version__"]
__all__ += modules.__all__
