"""Exports models to other programs' formats; an export proves itself before it counts as written."""

from __future__ import annotations

from .gguf import GGUFExport, export_gguf

__all__ = ["GGUFExport", "export_gguf"]
