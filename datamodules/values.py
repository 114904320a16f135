"""Checks of what stands in a row: texts, chat messages, numbers, verdicts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def describe_columns(row: Mapping[str, Any], wanted: str) -> str:
    """The columns of a row for a message about one that is missing (or ``None``), the closest name first.

    Example:
        >>> describe_columns({"promt": "2+2=", "answer": "4"}, "prompt")
        " (found: promt, answer; did you mean 'promt'?)"
    """
    names = [str(name) for name, value in row.items() if value is not None]
    found = ", ".join(names) or "none"
    close = difflib.get_close_matches(wanted, names, n=1)
    return f" (found: {found}; did you mean {close[0]!r}?)" if close else f" (found: {found})"


def check_text(value: Any, name: str) -> Text:
    """Checks that a value is a string or messages; turns ShareGPT's into role and content."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    expected = "a string or a list of messages like {'role': 'user', 'content': '...'}"
    if not is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise wrong_type(value, name, expected)
    return [_message(message, f"message {number} of {name!r}") for number, message in enumerate(messages, start=1)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Tables fill the keys that other rows have with None.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise ValueError(f"{where} is from {message['from']!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
        message = {"role": role, "content": message.get("value", "")}
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no role{describe_columns(message, 'role')}, expected role and content")
    if content is None and "tool_calls" not in message:
        raise ValueError(f"{where} has no content{describe_columns(message, 'content')}, expected role and content")
    if content is not None and not isinstance(content, str) and not is_list(content):
        raise ValueError(f"the content of {where} is {type(content).__name__} ({short(content)}), expected a string")
    return message


def check_verdict(value: Any, name: str) -> bool:
    """Reads true or false, as tables of all kinds write them."""
    verdict = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(str(value).lower())
    if verdict is None:
        raise ValueError(f"{name!r} is {short(value)}, expected true or false")
    return verdict


def check_number(value: Any, name: str) -> float:
    """Reads a finite number, which a table of text may have as a string; true and false are none."""
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
    """The error for a value that is not what its column should have."""
    return ValueError(f"{name!r} is {type(value).__name__} ({short(value)}), expected {expected}")


def one_line(text: str) -> str:
    r"""A message as it can be shown anywhere: what is not printable is written as in a Python string.

    Example:
        >>> one_line("no column 'a\nb'")
        "no column 'a\\nb'"
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_encodable(text: str) -> str:
    """Returns a text that has an encoding; JSON can write halves of characters (lone surrogates), which have none.

    Raises:
        ValueError: which half, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = repr(text[error.start])
        raise ValueError(
            f"character {error.start + 1} of a text is {half}, half of a surrogate pair: write the whole character, or "
            "leave it out"
        ) from None
    return text


def short(value: Any, limit: int = 40) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
