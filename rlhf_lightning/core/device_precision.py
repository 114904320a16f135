"""The precision of a trainer that names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from lightning.pytorch.accelerators import CUDAAccelerator

# Strategies that fork a process, which must not have used CUDA before.
_FORKING = ("ddp_fork", "ddp_notebook")


def default_precision(trainer: Mapping[str, Any]) -> str | None:
    """Returns the precision of a trainer that names none: ``bf16-mixed`` where it runs on CUDA devices that have it.

    TF32 stays off for what is left in fp32 (rotary angles, routers, scalar heads), since that is what must not be
    rounded: TF32 holds positions exactly only up to 2048.

    Args:
        trainer: the trainer's options.

    Returns:
        ``None`` if the options name a precision, as a plugin or a strategy may, or if Lightning's default applies.

    Example:
        >>> default_precision({"accelerator": "cpu"}) is None
        True
    """
    plugins, strategy = trainer.get("plugins") or [], trainer.get("strategy")
    plugins = plugins if isinstance(plugins, list) else [plugins]
    named = any(isinstance(plugin, Precision) for plugin in plugins) or getattr(strategy, "_precision_plugin", None)
    if trainer.get("precision") is not None or named or strategy in _FORKING:
        return None
    accelerator = trainer.get("accelerator") or "auto"
    on_cuda = isinstance(accelerator, CUDAAccelerator) or accelerator in ("auto", "gpu", "cuda")
    if not on_cuda or not CUDAAccelerator.is_available():
        return None
    # Cards before Ampere emulate it, many times slower than fp32.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else None
