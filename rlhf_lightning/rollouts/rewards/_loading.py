"""Finding what a dotted path names."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_attribute(path: str) -> Any:
    """What a dotted path names: ``package.module.name``."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is not a dotted path: write package.module.name")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ValueError(f"cannot import {path!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"module {module!r} has nothing called {name!r}: check the spelling of {path!r}") from error
