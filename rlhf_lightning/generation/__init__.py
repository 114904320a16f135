"""Answers of a model to many prompts, and a conversation with it: the commands ``generate`` and ``chat``."""

from .options import ChatOptions, EngineOptions, GenerateOptions
from .run import generate_rows

__all__ = ["ChatOptions", "EngineOptions", "GenerateOptions", "generate_rows"]
