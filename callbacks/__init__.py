"""Callbacks: accuracy of what the model writes, export of the best model, and a plain log of metrics."""

from .accuracy import GenerationAccuracy
from .export import ModelExport
from .history import JSONLLogger

__all__ = ["GenerationAccuracy", "JSONLLogger", "ModelExport"]
