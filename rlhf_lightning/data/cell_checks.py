"""Checks of the value in a cell of a row: numbers, verdicts, structures, and the forms that storage gives them."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Spellings of true and false verdicts in tables.
_VERDICTS = {
    **dict.fromkeys(("true", "yes", "y", "t", "1", "1.0", "+", "+1"), True),
    **dict.fromkeys(("desirable", "good", "positive", "pos", "chosen", "accepted", "correct", "right"), True),
    **dict.fromkeys(("up", "upvote", "thumbs_up", "thumbs up", "like"), True),
    **dict.fromkeys(("false", "no", "n", "f", "0", "0.0", "-", "-1", "-1.0"), False),
    **dict.fromkeys(("undesirable", "bad", "negative", "neg", "rejected", "incorrect", "wrong"), False),
    **dict.fromkeys(("down", "downvote", "thumbs_down", "thumbs down", "dislike"), False),
}
# A list of dictionaries as Python prints it, the form it takes in a table of text.
_PRINTED = re.compile(r"\s*\[?\s*\{\s*'\w+'\s*:")


class RepeatedKeys(dict[str, Any]):
    """A JSON object that has a key twice, which is refused.

    Args:
        pairs: its keys and values as they were read.
    """

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.key = next(name for name in names if names.count(name) > 1)


def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dictionary of a JSON object's pairs; a repeated key makes it a :class:`RepeatedKeys`.

    Example:
        >>> type(json.loads('{"a": 1, "a": 2}', object_pairs_hook=read_object)).__name__
        'RepeatedKeys'
    """
    row = dict(pairs)
    return row if len(row) == len(pairs) else RepeatedKeys(pairs)


def clean(value: Any) -> Any:
    """Returns a value without artifacts of storage: drops null keys at any depth, makes lists of numpy arrays.

    A table gives every dictionary of a column the keys of all others, with null for missing ones; a template would
    render them. Nulls in lists are kept, since no table adds those.

    Raises:
        ValueError: for a JSON object that has a key twice.

    Example:
        >>> clean({"a": {"type": "string", "enum": None}, "b": None, "c": [None]})
        {'a': {'type': 'string'}, 'c': [None]}
    """
    # Parquet readers return lists as numpy arrays.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, RepeatedKeys):
        raise ValueError(f"the key {value.key!r} appears twice in one object: keep one of them")
    if isinstance(value, Mapping):
        return {key: clean(inner) for key, inner in value.items() if inner is not None}
    return [clean(inner) for inner in value] if is_list(value) else value


def is_missing(value: Any) -> bool:
    """Tells whether a cell is empty, in any way that tables have: null, no characters, not-a-number.

    Example:
        >>> [is_missing(value) for value in (None, "", float("nan"), 0, [], " ")]
        [True, True, True, False, False, False]
    """
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def read_structure(value: Any, name: str) -> Any:
    """Reads a cell that should hold a list or a mapping: as such, or as JSON text in a table.

    Returns:
        The list or mapping; any other value as it came, for the caller to refuse.

    Raises:
        ValueError: for a text that begins like JSON but is not valid JSON.

    Example:
        >>> read_structure('["a", {"b": null}]', "tools"), read_structure("a", "tools")
        (['a', {}], 'a')
    """
    # Plain text is a value of its own, not JSON.
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return clean(value)
    try:
        read = json.loads(value, object_pairs_hook=read_object)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else "too deep"
        hint = "as json.dumps writes it" if is_printed(value) else "or a list"
        raise ValueError(f"{name!r} is {short(value)}, which is not JSON ({reason}): write JSON, {hint}") from error
    return clean(read)


def is_printed(text: str) -> bool:
    """Tells whether a text looks like a list of dictionaries that Python has printed into a cell.

    Example:
        >>> is_printed("[{'role': 'user', 'content': 'q'}]"), is_printed("[1] {x: 2}")
        (True, False)
    """
    return _PRINTED.match(text) is not None


def describe_columns(row: Mapping[str, Any], wanted: str) -> str:
    """Lists the columns of a row for a message about a missing one, and suggests the closest name.

    Example:
        >>> describe_columns({"promt": "2+2=", "answer": "4"}, "prompt")
        " (found: promt, answer; did you mean 'promt'?)"
    """
    names = [str(name) for name, value in row.items() if value is not None]
    found = ", ".join(names) or "none"
    close = difflib.get_close_matches(wanted, names, n=1)
    return f" (found: {found}; did you mean {close[0]!r}?)" if close else f" (found: {found})"


def check_verdict(value: Any, name: str) -> bool:
    """Reads true or false, as tables of all kinds write them.

    Raises:
        ValueError: for any other value.

    Example:
        >>> check_verdict("Desirable", "label"), check_verdict(0, "label"), check_verdict("thumbs_down", "label")
        (True, False, False)
    """
    verdict = _VERDICTS.get(str(value).strip().lower())
    if verdict is None:
        raise ValueError(
            f"{name!r} is {short(value)}, expected true or false (or 1 and 0, yes and no, good and bad, desirable and "
            "undesirable, chosen and rejected)"
        )
    return verdict


def check_number(value: Any, name: str) -> float:
    """Reads a finite number, which a table of text may hold as a string; true and false are refused."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name!r} is {short(value)}, expected a finite number")
    return number


def is_list(value: Any) -> bool:
    """Tells whether a value is a sequence of values."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def wrong_type(value: Any, name: str, expected: str) -> ValueError:
    """Builds the error for a value whose type is not the expected one."""
    return ValueError(f"{name!r} is {type(value).__name__} ({short(value)}), expected {expected}")


def one_line(text: str) -> str:
    r"""Escapes the unprintable characters of a message as a Python string literal does.

    Example:
        >>> one_line("no column 'a\nb'")
        "no column 'a\\nb'"
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def end_step(step: str, separator: str) -> str:
    r"""Ends a step of a solution with one separator, whether or not it brings its own.

    Where the separator is blank (line ends), all line ends that the step brings are replaced by it.

    Example:
        >>> end_step("1+2=3", "\n"), end_step("1+2=3\r\n", "\n"), end_step("1+2=3 #", " #")
        ('1+2=3\n', '1+2=3\n', '1+2=3 #')
    """
    bare = step.removesuffix(separator) if separator.strip() else step.rstrip("\r\n" + separator)
    return bare + separator


def short(value: Any, limit: int = 40) -> str:
    """Returns the ``repr`` of a value for a message, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
