"""Imports objects by dotted path."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def find_own_modules() -> None:
    """Makes modules of the current folder importable, after all others.

    Python does this for a script or ``python -m``, but not for an installed command.
    """
    # Appended, so that a user's file cannot shadow an installed package.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def load_attribute(path: str) -> Any:
    """Imports the object that a dotted path names, ``package.module.name``, also from the current folder."""
    find_own_modules()
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"{path!r} is not a dotted path: write package.module.name, or pass the function itself (of one that no "
            "module holds, a checkpoint keeps the name alone: load_from_checkpoint(path, rewards=[function]))"
        )
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ValueError(f"cannot import {path!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"module {module!r} has nothing called {name!r}: check the spelling of {path!r}") from error
