"""Exports models, as folders and in other programs' formats; an export proves itself before it counts as written."""

from __future__ import annotations

from .folder import FolderExport, export_folder
from .gguf import GGUFExport, export_gguf
from .model_card import ModelCard

__all__ = ["FolderExport", "GGUFExport", "ModelCard", "export_folder", "export_gguf"]
