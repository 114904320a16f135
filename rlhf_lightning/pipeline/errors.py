"""Names the stage of an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..utils.messages import UsageError
from .row_files import NoRowsError


@contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Adds the stage's name to errors."""
    try:
        yield
    except (UsageError, NoRowsError) as error:
        raise type(error)(f"stage {name!r}: {error}") from error
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"stage {name!r}: {error}") from error
    except torch.OutOfMemoryError:  # the command line knows what helps
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"stage {name!r}: {what} (--debug shows where)") from error
