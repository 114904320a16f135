"""Imports objects by dotted path."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


class DottedPath(str):
    """The text of a dotted path, ``package.module.name``: the type of options that name a user's object.

    Raises:
        ValueError: the text has no dot between names.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> DottedPath:
        """Checks the text."""
        names = text.split(".") if isinstance(text, str) else []
        if len(names) < 2 or not all(name.isidentifier() for name in names):
            raise ValueError(f"{text!r} is not a dotted path, package.module.name")
        return super().__new__(cls, text)


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


def dotted_path(value: Any) -> str:
    """Returns the path by which ``load_attribute`` finds a function or class; of one that no module holds, its name.

    Example:
        >>> dotted_path(load_attribute), dotted_path(lambda: None)
        ('rlhf_lightning.utils.imports.load_attribute', '<lambda>')
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    importable = module not in (None, "__main__") and name and "<" not in name
    if importable and (inspect.isfunction(value) or inspect.isclass(value)):
        return f"{module}.{name}"
    inner = getattr(value, "func", value)  # of a functools.partial
    return str(getattr(inner, "__name__", None) or type(inner).__name__)
