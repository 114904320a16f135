"""Rewrites a parser's errors as one line: the key, its value, the allowed values, the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .keywords import advise
from .packaged_configs import nearest_config

_LIMIT = 1000
# Lines that jsonargparse repeats for each allowed type that the value does not resemble.
_COMMONPLACES = (
    "Expected an? |Not of type DottedPath|Does not validate against|Not a valid subclass|a class path|a dict"
)


class UsageError(Exception):
    """Raised for a mistake on the command line or in a YAML file."""


def one_line(text: object, limit: int = _LIMIT) -> str:
    """Joins the lines of a text, and cuts it to ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns ``"; did you mean 'beta'?"``, or an empty text.

    Example:
        >>> did_you_mean("betta", ["beta", "gamma"])
        "; did you mean 'beta'?"
    """
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def explain(
    message: str,
    options: Iterable[str] = (),
    classes: Iterable[type] = (),
    *,
    group: str = "",
    values: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Summarises an error of jsonargparse in one line; any other message is joined to one line.

    Args:
        message: the error's message.
        options: the parser's options, to suggest the nearest for an unknown one.
        classes: classes that can be named without their path, for the same purpose.
        group: the option group whose options the parser knows by their own names alone.
        values: options by the values that they may have, to suggest one for a value that stands in place of a class.

    Example:
        >>> explain("Option 'betta' is not accepted", ["beta"])
        "no option 'betta'; did you mean 'beta'?"
    """
    if group:
        message, options = _with_group(message, group), [f"{group}.{name}" for name in options]
    if "Neither `tensorboard` nor `tensorboardX` is available" in message:
        return "TensorBoardLogger needs tensorboard: pip install 'rlhf-lightning[tensorboard]'"
    if text := _about_classes(message, classes, values) or _about_groups(message):
        return text

    # Values that no type accepts; the message lists a cause for each type.
    causes = re.findall(rf"^ *- (?!{_COMMONPLACES})(.*)", message, flags=re.MULTILINE)
    if causes and "Union subtypes" in message:  # one of the allowed types came close
        rest = message.partition(causes[0])[2].strip() if causes[0].endswith(":") else ""
        return one_line(f"{causes[0]} {explain(rest, options, classes)}" if rest else causes[0])
    if re.search(r"^argument of type '\w+' is not iterable|^unhashable type: ", message):
        return "expected the name of a class after class_path, such as class_path: DPOModule; got plain text"

    if text := _unknown_option(message, options):
        return text

    # Missing files and values.
    if found := re.search(r"File does not exist: (.*)", message):
        return f"there is no file {found[1]}{nearest_config(found[1].strip(chr(39)))}"
    if found := re.search(r"Path is not a file: (.*)", message):
        return f"{found[1]} is not a file: give --config with a YAML file"
    if found := re.search(r"argument (?:-\w/)?(--[\w.+-]+): expected one argument", message):
        return f"{found[1]} has no value: write {found[1]}=VALUE"
    if found := re.search(r"arguments are required: (.*)", message):
        # An option may be listed with its short form: `-c/--config`.
        missing = [name.split("/")[-1].lstrip("-").split(".")[-1] for name in found[1].split(", ")]
        if "config" in missing:
            return "no configuration is given: pass --config with a file"
        return f"no {' and no '.join(missing)} given: pass --config with a file, or --{missing[0]}=..."
    return _wrong_value(message) or one_line(message)


def _with_group(message: str, group: str) -> str:
    """Puts a group's name in front of the option that a message is about."""
    return re.sub(r"(\bOption '|Parser key \")(?=\w)", rf"\g<1>{group}.", message, count=1)


def _unknown_option(message: str, options: Iterable[str]) -> str | None:
    """Describes an option that does not exist, with the nearest one; ``None`` for other errors."""
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.+-]+)'", message):
        return f"no option '{found[1]}.{found[2]}'{advise(f'{found[1]}.{found[2]}', options)}"
    if found := re.search(r"[Oo]ption '([\w.+-]+)'(?: is not accepted|$)", message.partition("\n")[0]):
        return f"no option {found[1]!r}{advise(found[1], options)}"
    if found := re.search(r"unrecognized arguments: (?:--)?([\w.+-]+)", message, flags=re.IGNORECASE):
        return f"no option {found[1]!r}{advise(found[1], options)}"
    return None


def _about_classes(message: str, classes: Iterable[type], values: Mapping[str, str]) -> str | None:
    """Describes a class that cannot be found or is of the wrong kind; ``None`` for other errors."""
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        near = did_you_mean(found[1], (cls.__name__ for cls in classes))
        if found[1] in values:
            near = f"; did you mean {values[found[1]]}: {found[1]}?"
        instead = near or ": write the path of a class, package.module.CLASS, or options, NAME: VALUE"
        return f"{_key(message)}no class {found[1]!r}{instead}"
    if found := re.search(r"Multiple subclasses with name (\S+)\. .*?ambiguity: (.*)", message):
        choices = found[2].rstrip(".").split(", ")
        return f"{_key(message)}several classes are called {found[1]}: write {' or '.join(choices)}"
    if found := re.search(r"class_path '([^']+)':\s*(No module named .*|.* is available\..*)", message):
        return f"{_key(message)}cannot import {found[1]!r}: {found[2]}"
    if found := re.search(r"class_path '([^']+)':\s*module '([^']+)' has no attribute '([^']+)'", message):
        return f"{_key(message)}cannot import {found[1]!r}: {found[2]} has nothing called {found[3]!r}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"{_key(message)}{found[1]!r} is not allowed: expected a subclass of {found[2]}"
    if found := re.search(r"Subclasses are disabled for (\w+), thus '([^']+)'", message):
        return f"{_key(message)}{found[2]!r} is not allowed: {found[1]} has no subclasses, write its options directly"
    return None


def _about_groups(message: str) -> str | None:
    """Describes a value that stands where options should, one by one; ``None`` for other errors."""
    if found := re.search(r"Not a valid subclass of (\w+)\. Got value: (.*)", message):
        return f"{_key(message)}{found[2]} is not allowed: expected options of {found[1]}, NAME: VALUE, or a class_path"
    if found := re.search(r"Unable to load config [\"'](.*?)[\"']", message):
        return f"{_key(message)}{found[1]!r} is not allowed: expected a group of options, NAME: VALUE"
    if "argument after ** must be a mapping, not NoneType" in message:
        return "a group of options is null: leave it out, or write its options, NAME: VALUE"
    if re.search(r"[Oo]ption '(?:\w+\.)*class_path' is not accepted", message):
        return f"{_key(message)}class_path stands next to other options: write them below init_args"
    return None


def _wrong_value(message: str) -> str | None:
    """Describes a value of the wrong type: the key, the value, the allowed types; ``None`` for other errors."""
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    expected = re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", message, flags=re.MULTILINE)
    if value is None or not expected:
        return None
    allowed: list[str] = []
    hint = ""
    for kind in expected:
        choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        names = re.findall(r"'([^']*)'", choices[1]) if choices else []
        hint = hint or did_you_mean(value[1], names)
        name = f"one of {', '.join(names)}" if names else _type_name(kind)
        if name not in allowed:
            allowed.append(name)
    if "Not of type DottedPath" in message:
        allowed.append("the dotted path of a function")
    return one_line(f"{_key(message)}{value[1]!r} is not allowed: expected {' or '.join(allowed)}{hint}")


def _type_name(kind: str) -> str:
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind)
    return {"NoneType": "null", "tuple": "a list"}.get(kind, kind.replace("typing.", ""))


def _key(message: str) -> str:
    keys = re.findall(r'Parser key "([^"]+)"', message)
    return f"{keys[-1]}: " if keys else ""
