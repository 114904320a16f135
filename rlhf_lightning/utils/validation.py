"""Checks of options and arguments; errors are one line with the value, the allowed range and a suggestion."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sized

import torch
from torch import Tensor


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises unless ``value`` is one of ``allowed``; suggests the nearest.

    Example:
        >>> check_choice("loss_type", "sigmod", ("sigmoid", "hinge"))
        Traceback (most recent call last):
        ValueError: loss_type is 'sigmod'; it must be one of sigmoid, hinge; did you mean 'sigmoid'?
    """
    names = list(allowed)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(names)}{hint}")


def _refuse(name: str, value: object, bound: str, instead: str) -> None:
    finite = " and finite" if isinstance(value, float) and not math.isfinite(value) else ""
    raise ValueError(f"{name} is {value!r}; it must be {bound}{finite} ({instead})")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive(name: str, value: float, instead: str) -> None:
    """Raises unless ``value`` is a finite number above 0; ``instead`` suggests a usual value."""
    if not _is_number(value) or not 0 < value < math.inf:
        _refuse(name, value, "above 0", instead)


def check_not_negative(name: str, value: float, instead: str) -> None:
    """Raises unless ``value`` is a finite number of at least 0."""
    if not _is_number(value) or not 0 <= value < math.inf:
        _refuse(name, value, "at least 0", instead)


def check_fraction(name: str, value: float, instead: str) -> None:
    """Raises unless ``value`` is in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        _refuse(name, value, "in [0, 1)", instead)


def check_count(name: str, value: int, instead: str) -> None:
    """Raises unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1 ({instead})")


def check_device(device: str | torch.device | None) -> torch.device:
    """Returns the device that is meant, by default the GPU if there is one.

    Args:
        device: its name, such as ``cpu``, ``cuda`` or ``cuda:1``; ``None`` for the default.

    Raises:
        ValueError: there is no such device here.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # of a name that torch does not know
        raise ValueError(f"device is {device!r}; it must be the name of one, such as cpu, cuda or cuda:1") from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise ValueError(f"device is {str(device)!r}, and torch finds {count} GPUs: write cpu, or leave it out")
    return place


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises unless the rate of flipped labels is in [0, 0.5): from 0.5 on, labels carry no or inverted information."""
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 0.5:
        _refuse("label_smoothing", label_smoothing, "in [0, 0.5)", "0 is off; else the rate of wrong labels")


def check_same_shape(dims: str, **tensors: Tensor | None) -> None:
    """Raises unless all given tensors have the first one's shape, one axis for each of ``dims``: no broadcasting."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, tensor in given.items():
        if tensor.shape != given[first].shape or tensor.ndim != len(dims):
            other = first if name != first else name
            raise ValueError(
                f"{other} has shape {tuple(given[other].shape)} and {name} {tuple(tensor.shape)}: "
                f"give all of {', '.join(given)} the shape ({', '.join(dims)}{',' if len(dims) == 1 else ''})"
            )


def check_finite(name: str, values: object, *, like: Tensor, each: str) -> None:
    """Raises unless a user's loss returned one finite number for each value of ``like``, with its gradient.

    Args:
        name: of the function.
        values: returned by it.
        like: a tensor of one dimension.
        each: thing that the values are of, such as ``pair``.
    """
    shape = tuple(like.shape)
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} returned a {type(values).__name__}: return a tensor of one loss per {each}, {shape}")
    if values.shape != like.shape:
        raise ValueError(f"{name} returned shape {tuple(values.shape)}: return one loss per {each}, {shape}")
    wrong = (~torch.isfinite(values)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        value = float(values[place].detach())
        raise ValueError(f"{name} returned {value} for {each} {place} of {len(values)}: losses must be finite")
    if like.requires_grad and not values.requires_grad and len(values):
        raise ValueError(f"{name} returned losses without gradient: compute them from the policy's log-probs")


def check_same_length(**lists: Sized) -> None:
    """Raises unless all lists have the first one's length.

    Example:
        >>> check_same_length(prompts=["a", "b"], seeds=[0])
        Traceback (most recent call last):
        ValueError: prompts has 2 entries and seeds 1: give one of seeds for each of prompts
    """
    first = next(iter(lists))
    for name, values in lists.items():
        if len(values) != len(lists[first]):
            raise ValueError(
                f"{first} has {len(lists[first])} entries and {name} {len(values)}: give one of {name} for each of "
                f"{first}"
            )
