"""One-line refusals shared by the loss families."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from torch import Tensor


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a value that is not among those allowed, and names the closest that is."""
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {name} {value!r}{hint}: use one of {', '.join(allowed)}")


def check_positive(name: str, value: float, *, usual: float) -> None:
    """Refuses what is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} is not a finite number above 0: {usual} is usual")


def check_not_negative(name: str, value: float, *, usual: float) -> None:
    """Refuses what is not a finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} is not a finite number of at least 0: {usual} is usual")


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuses a rate of flipped labels at which labels say nothing or the opposite."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 0.5): use 0, or the rate of wrong labels")


def check_same_shape(dims: str, **tensors: Tensor | None) -> None:
    """Refuses tensors that would broadcast: all given must have the shape of the first, of as many axes as ``dims``."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, tensor in given.items():
        if tensor.shape != given[first].shape or tensor.ndim != len(dims):
            other = first if name != first else name
            raise ValueError(
                f"{other} has shape {tuple(given[other].shape)} and {name} {tuple(tensor.shape)}: "
                f"give all of {', '.join(given)} the shape ({', '.join(dims)}{',' if len(dims) == 1 else ''})"
            )
