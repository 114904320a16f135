"""Option groups: frozen dataclasses of options, given as an object or as a mapping.

A group does the work that its options describe (a loss is called, a sampler makes settings), and checks them when it is
built. ``--model.loss.epsilon=0.3``, ``loss: {epsilon: 0.3}`` in YAML and ``loss={"epsilon": 0.3}`` or
``loss=PolicyLoss(epsilon=0.3)`` in Python are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .imports import dotted_path, load_attribute
from .keywords import advise
from .validation import check_choice

Group = TypeVar("Group", bound="OptionGroup")


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base class of option groups: checks the types of all fields.

    A subclass that defines ``__post_init__`` calls ``super().__post_init__()`` first, and then checks ranges.

    Attributes:
        group: the option that takes the group, which errors name.

    Raises:
        TypeError: a field has a value of another type; the message names the field, the value and the allowed types.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for field in fields(self):
            _check_type(self.full_name(field.name), getattr(self, field.name), hints[field.name])

    @classmethod
    def full_name(cls, name: str) -> str:
        """Returns the name of an option with that of its group: ``loss.epsilon``."""
        return f"{cls.group}.{name}" if cls.group else name

    @classmethod
    @contextmanager
    def naming_group(cls) -> Iterator[None]:
        """Names the group in errors of functions that know an option by its own name: ``loss.epsilon=2.0 is outside``.

        Raises:
            ValueError: that of the function, with the group in front.
        """
        try:
            yield
        except ValueError as error:
            raise ValueError(cls.full_name(str(error))) from None


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a group's fields; resolving them takes longer than all checks."""
    return get_type_hints(cls)


def build_group(value: Any, cls: type[Group]) -> Group:
    """Builds an option group, unless it is one already.

    Args:
        value: a group, or a mapping of its options; of a subclass, a mapping with ``class_path`` and ``init_args``.
        cls: its class.

    Raises:
        TypeError: something else, or an option that does not exist.
        ValueError: an option out of range, or a ``class_path`` that names no subclass.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Loss(OptionGroup):
        ...     group: ClassVar[str] = "loss"
        ...     epsilon: float = 0.2
        >>> build_group({"epsilon": 0.3}, Loss).epsilon
        0.3
        >>> build_group({"epsilonn": 0.3}, Loss)
        Traceback (most recent call last):
        TypeError: loss has no option 'epsilonn'; did you mean 'epsilon'?
    """
    name = cls.group
    if isinstance(value, cls):
        _check_savable(value)
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} is {value!r}; it must be a {cls.__name__} or a mapping of its options, such as "
            f"{name}={{{fields(cls)[0].name!r}: ...}}"
        )
    if "class_path" in value:
        found = load_attribute(value["class_path"])
        if not inspect.isclass(found) or not issubclass(found, cls):
            raise ValueError(f"{name} is {value['class_path']!r}; it must name a subclass of {cls.__name__}")
        return build_group(value.get("init_args") or {}, found)
    allowed = [field.name for field in fields(cls)]
    for key in value:
        if key not in allowed:
            raise TypeError(f"{name} has no option {key!r}{advise(str(key), allowed)}")
    return cls(**value)


def plain_group(value: OptionGroup, cls: type[OptionGroup]) -> dict[str, Any]:
    """Converts an option group to the mapping that ``build_group`` reads, of values that a checkpoint can hold.

    Args:
        value: the group.
        cls: the class that ``build_group`` will be given.

    Returns:
        Its options, functions among them by their dotted paths; of a subclass, its ``class_path`` and ``init_args``. A
        function or subclass that no module holds is known by its name alone, with which it cannot be built.
    """
    options = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return options if type(value) is cls else {"class_path": dotted_path(type(value)), "init_args": options}


def _check_savable(value: OptionGroup) -> None:
    """Refuses a class whose options are not its dataclass fields: a checkpoint could not restore them."""
    for cls in type(value).__mro__:
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls) and cls is not object:
            raise TypeError(
                f"{cls.__name__} defines __init__, whose arguments a checkpoint cannot restore: make it a "
                "@dataclass(frozen=True) and write its options as fields"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return dotted_path(value) if inspect.isfunction(value) or inspect.isclass(value) else value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def _check_type(name: str, value: object, hint: Any) -> None:
    """Raises if a value is not of its type; types other than those of plain values are not checked."""
    if _fits(value, hint):
        return
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        check_choice(name, value, [*choices, *(["null"] if NoneType in kinds else [])])
    raise TypeError(f"{name} is {value!r}; it must be {' or '.join(map(_type_name, kinds))}")


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint) if hint in _NAMES else True


def _type_name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list, each {_type_name(get_args(hint)[0])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
