"""The precision of a trainer that names none, and the one that its precision multiplies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from lightning.pytorch.accelerators import CUDAAccelerator

# Strategies that fork a process, which must not have used CUDA before.
_FORKING = ("ddp_fork", "ddp_notebook")
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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


def autocast_dtype(trainer: Any) -> torch.dtype | None:
    """Returns the dtype that a trainer's autocast multiplies in; ``None`` where its precision has no autocast.

    Example:
        >>> autocast_dtype(lightning.Trainer(precision="bf16-mixed"))  # doctest: +SKIP
        torch.bfloat16
    """
    return None if trainer is None else _MIXED.get(str(trainer.precision))


def frozen_dtype(module: Any) -> torch.dtype | None:
    """Returns the half precision in which frozen models next to a module compute: bf16, where it is trained so on CUDA.

    ``None`` on other devices and in other precisions: fp16 has too few exponents for a model that was trained without.
    """
    trainer = getattr(module, "_trainer", None)
    half = trainer is not None and str(trainer.precision) in ("bf16-mixed", "bf16-true")
    return torch.bfloat16 if half and module.device.type == "cuda" else None
