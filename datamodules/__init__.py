"""Datamodules: rows from any source as batches of token trees, one class per data contract."""

from ..data.loaders import BatchLoader, ExampleLoader, StreamLoader
from ..data.sources import open_source
from .base import ExampleDataModule
from .contexts import ContextDataModule
from .preference import PreferenceDataModule
from .prompts import PromptDataModule
from .sft import SFTDataModule
from .stepwise import StepwiseDataModule
from .unpaired import UnpairedDataModule

__all__ = [
    "BatchLoader",
    "ContextDataModule",
    "ExampleDataModule",
    "ExampleLoader",
    "PreferenceDataModule",
    "PromptDataModule",
    "SFTDataModule",
    "StepwiseDataModule",
    "StreamLoader",
    "UnpairedDataModule",
    "open_source",
]
