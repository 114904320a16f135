"""Reads values of YAML and of the command line as they were written: a string stays a string.

jsonargparse parses every string again as YAML, even one that is quoted in a file, wherever an option may have any
value: ``"yes"`` becomes True, ``"4"`` 4, ``"Note: x"`` a mapping. The parser mode ``MODE`` has a loader that marks
ambiguous strings (:class:`Text`), so that they are not parsed again, and a dumper that quotes them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _typehints
from jsonargparse.typing import register_type

from .imports import DottedPath

MODE = "as_written"

# Numbers and booleans of YAML 1.2. YAML 1.1, that of PyYAML, has more: yes, on, 12:30, 0777, 1_000, dates.
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")
_TAG = "tag:yaml.org,2002:"
_YAML_1_1 = yaml.resolver.Resolver()
# An unambiguous name or path. It stays a plain string: jsonargparse looks for configuration files under plain strings
# only.
_NAME = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.-]*[A-Za-z_/]|[A-Za-z_/.]")


class Text(str):
    """A string that has been parsed and must not be parsed again."""

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> Text:
        return self


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping and refuses repeated keys, where PyYAML would silently keep the last one."""
        seen: set[Any] = set()
        for key_node in (
            key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge"
        ):
            key = self.construct_object(key_node)
            if isinstance(key, str | int | float | None):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping",
                        node.start_mark,
                        f"found the key {key!r} twice",
                        key_node.start_mark,
                    )
                seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Builds a string, marked if it is ambiguous."""
        return _mark(self.construct_scalar(node))

    def construct_real(self, node: yaml.ScalarNode) -> float:
        """Builds a number, also from one that is a string in YAML 1.1, such as 1e-5."""
        value = self.construct_scalar(node).lower()
        return float(value.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile("<<"), "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"(?:{_pattern.pattern})$"), list(_first))
_Loader.add_constructor(f"{_TAG}str", _Loader.construct_text)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_real)


class _Dumper(yaml.SafeDumper):
    """Writes strings so that both versions of YAML read them as strings."""


# The dumper has YAML 1.1's rules; these are the loader's additional ones.
_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
# LightningCLI dumps with plain PyYAML.
yaml.SafeDumper.add_representer(Text, yaml.representer.SafeRepresenter.represent_str)
# Lightning's Timer has an enumeration as a default.
_Dumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
_Dumper.add_representer(Text, yaml.representer.SafeRepresenter.represent_str)


def load(text: str, path: str = "") -> Any:
    """Reads YAML from a file, or from a value of the command line.

    A single line that is not from a file is a scalar unless it begins with a brace, bracket or quote: ``Note: x``,
    ``- x``, ``# x`` and ``~`` are strings.

    Args:
        text: the YAML.
        path: the file that it comes from.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping has a key twice.

    Example:
        >>> load("12:30"), load("yes"), load("1e3"), load("Note: x"), load("{a: '4'}")
        ('12:30', 'yes', 1000.0, 'Note: x', {'a': '4'})
    """
    found = yaml.load(text, Loader=_Loader)
    if path or "\n" in text or text.lstrip()[:1] in tuple("{['\""):
        return found
    return _mark(text) if isinstance(found, str | list | dict | None) and text.strip() not in ("", "null") else found


def dump(value: Any) -> str:
    """Writes YAML that :func:`load` and PyYAML read back as the same value.

    Example:
        >>> print(dump({"a": "1e3", "b": ["yes", 2]}), end="")
        a: '1e3'
        b:
        - 'yes'
        - 2
    """
    written: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return written


def flow(text: str) -> str:
    """Converts the ``repr`` of a list, a mapping or None to YAML of one line; returns any other text unchanged.

    jsonargparse passes on the value of a nested option (``--model.lora.bias=null``) in this form.

    Example:
        >>> flow("None"), flow("['a', None]"), flow("it's")
        ('null', '[a, null]', "it's")
    """
    if text[:1] not in tuple("N[{"):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if not isinstance(value, list | dict | None) or repr(value) != text:
        return text
    written: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return written.removesuffix("\n").removesuffix("\n...")


def plain(value: Any) -> Any:
    """Converts the marked strings of a configuration back to plain ones."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, jsonargparse.Namespace):
        for key, item in vars(value).items():
            setattr(value, key, plain(item))
        return value
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(item) for item in value)
    return value


def with_plain_arguments(instantiate: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that builds an object, so that it is passed plain strings instead of marked ones."""

    @wraps(instantiate)
    def call(*args: Any, **kwargs: Any) -> Any:
        return instantiate(*plain(args), **plain(kwargs))

    return call


def _mark(text: str) -> str:
    tag = _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return text if _NAME.fullmatch(text) and tag == f"{_TAG}str" else Text(text)


register_type(DottedPath, serializer=str, deserializer=DottedPath)
register_type(Text, serializer=Text, deserializer=Text)
jsonargparse.set_loader(MODE, load, (yaml.YAMLError,))
jsonargparse.set_dumper(MODE, dump)
# A text that is given to an option of a plain type is parsed once more: by this loader, and not by PyYAML, which
# reads `yes` as True and no text of a subclass.
_typehints.basic_json_or_yaml_load = lambda text: load(str(text))  # type: ignore[attr-defined]
