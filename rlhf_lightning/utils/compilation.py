"""torch.compile: whether it works here, and how often it may compile one function."""

from __future__ import annotations

import torch
import torch._dynamo.config
from torch import Tensor

_COMPILATIONS = 128  # of one function that torch allows in one process, at least


def allow_compilations() -> None:
    """Lets torch compile one function as often as a run has kinds of layers; after 8 it would stop without an error."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)


def check_compiler(device: torch.device) -> None:
    """Compiles a small function and runs it on a device.

    Args:
        device: of the run.

    Raises:
        ValueError: torch cannot compile for it here.
    """
    try:
        torch.compile(_tried, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever compilers, linkers and loaders raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
        said = lines[0] if lines else type(error).__name__
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler and Python's header files"
        packages = "triton, gcc" if device.type == "cuda" else "g++, python3-dev"
        raise ValueError(
            f"compile is true, and torch cannot compile for {device.type} here ({said[:160]}): it needs {needs} "
            f"({packages}); install them, or set compile to false"
        ) from error


def _tried(values: Tensor) -> Tensor:
    return (values * 2).sin().sum()
