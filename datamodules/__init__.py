"""Datamodules: rows from anywhere as batches of token trees, one class per data contract."""

from .base import ExampleDataModule
from .loader import BatchLoader, ExampleLoader, StreamLoader
from .preference import PreferenceDataModule
from .prompts import PromptDataModule
from .sft import SFTDataModule
from .sources import open_source
from .stepwise import StepwiseDataModule
from .unpaired import UnpairedDataModule

__all__ = [
    "BatchLoader",
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
