"""Brings chat messages and tools, as data sets write them, to the one form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .cell_checks import (
    clean,
    describe_columns,
    is_list,
    is_missing,
    is_printed,
    read_object,
    read_structure,
    short,
    wrong_type,
)

Messages = list[dict[str, Any]]
Text = str | Messages

# Columns, and keys of messages, that hold media; they are refused, since only text is supported.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")

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
# Other names of the two speakers that every template knows; other roles are left to the template.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN_ROLES = {*_SHAREGPT_ROLES, "developer"}
_TEXT_BLOCKS = ("text", "input_text", "output_text")
# Keys by which other trainers mark whether a message is learned; torchtune's `masked` is inverted.
_LEARNED = {"weight": True, "train": True, "training": True, "loss": True, "masked": False}
_PARTLY_LEARNED = ("train_detail", "training_detail")


def check_text(value: Any, name: str) -> Text:
    """Checks that a value is a string or messages, and brings messages to one form.

    A message of that form has a ``role`` and a ``content`` that is one string (a call of tools may have none), no key
    that is null at any depth, calls as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, and the
    key ``weight``, 0, where it is not learned. Also accepted are ``from`` and ``value`` (ShareGPT), a list of text
    blocks as content, the calls' arguments as JSON text, and the keys ``weight``, ``train``, ``training``, ``loss`` or
    ``masked`` of other trainers. A string that is the JSON of messages is parsed.

    Raises:
        ValueError: for anything else, such as an image among the blocks.

    Example:
        >>> check_text([{"from": "gpt", "value": [{"type": "text", "text": "4"}], "weight": 0}], "messages")
        [{'role': 'assistant', 'content': '4', 'weight': 0}]
    """
    if isinstance(value, str):
        messages = _written_messages(value, name)
        if messages is None:
            return value
    else:
        messages = clean([value] if isinstance(value, Mapping) else value)
    if not is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise wrong_type(value, name, "a string or a list of messages like {'role': 'user', 'content': '...'}")
    return [_message(message, f"message {number} of {name!r}") for number, message in enumerate(messages, start=1)]


def joined_text(content: Any, where: str) -> str:
    """Concatenates a content of text blocks.

    Args:
        content: a string, a list of blocks like ``{"type": "text", "text": "..."}``, or one block.
        where: its name in error messages.

    Raises:
        ValueError: for a block that holds anything but text.

    Example:
        >>> joined_text([{"type": "text", "text": "2+2"}, {"type": "text", "value": "="}], "the content")
        '2+2='
    """
    if isinstance(content, str):
        return content
    blocks = [content] if isinstance(content, Mapping) else content
    if not is_list(blocks):
        raise ValueError(f"{where} is {type(content).__name__} ({short(content)}), expected a string")
    return "".join(_block_text(block, where) for block in blocks)


def check_tools(value: Any) -> list[dict[str, Any]]:
    """Reads the column ``tools``: a list of functions, or the JSON text of one.

    Returns:
        The functions as described, without null keys; an empty list without any.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_tools('[{"name": "add", "parameters": {"a": null, "b": {"type": "number"}}}]')
        [{'name': 'add', 'parameters': {'b': {'type': 'number'}}}]
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return []
    tools = read_structure(value, "tools")
    tools = [tools] if isinstance(tools, Mapping) and tools else tools
    if isinstance(tools, Mapping):
        return []
    if is_list(tools):
        tools = [read_structure(tool, "tools") for tool in tools]
    if not is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise wrong_type(value, "tools", "a list of functions like {'type': 'function', 'function': {'name': ...}}")
    return [dict(tool) for tool in tools]


# Checks of messages in that form during tokenization.


def check_rendered(messages: Messages, template: Mapping[str, Any], text: str) -> None:
    """Checks that a chat template has dropped nothing of a row.

    Every message of a user, a system or a tool must appear in the rendering (ignoring whitespace, as text or as JSON),
    and so must the name of each function that is called or offered. Messages of the assistant may be cut: templates
    drop its earlier reasoning.

    Args:
        messages: in the form of :func:`check_text`.
        template: the row's arguments of the template, such as ``tools``.
        text: the rendering.

    Raises:
        ValueError: saying what is missing.
    """
    seen = _spaceless(text)
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls") or ():
            name = _function_name(call)
            if name and name not in text:
                raise ValueError(
                    f"the chat template drops the call of {name!r} in message {number}: use one that renders "
                    "tool_calls, or write the call as content"
                )
        # Templates may strip blanks and escape content, so that forms are compared without blanks.
        said = message.get("content") or ""
        if message["role"] != "assistant" and not any(form in seen for form in _forms(said)):
            raise ValueError(
                f"the chat template drops message {number}, of role {message['role']!r}: use one that renders it, "
                "or remove the message"
            )
    for tool in template.get("tools") or ():
        name = _function_name(tool)
        if name and name not in text:
            raise ValueError(
                f"the chat template drops the tool {name!r}: use one that renders tools, or remove the column"
            )


def check_no_tools(template: Mapping[str, Any]) -> None:
    """Refuses tools with a prompt that is text: no template would show them to the model."""
    if template.get("tools"):
        raise ValueError(
            "'tools' are given with a prompt that is text, where no chat template shows them to the model: write the "
            "prompt as messages (transform: rlhf_lightning.data.transforms.chat_prompt), or remove the column"
        )


# One message.


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    message = dict(message)

    # ShareGPT: the speaker is `from`, the text is `value`.
    if "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise ValueError(f"{where} is from {message['from']!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
        calls = message.pop("from") == "function_call"
        message = {"role": role, "content": message.pop("value", message.pop("content", "")), **message}
        if calls:
            message = _with_written_calls(message)
    # OpenAI's form, with other trainers' names of the speakers.
    elif isinstance(message.get("role"), str):
        message["role"] = _ROLES.get(message["role"].lower(), message["role"])
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no role{describe_columns(message, 'role')}, expected role and content")
    if "value" in message:
        raise ValueError(f"{where} has both a value and a content: write one of them")

    # A message has a content, calls, or both.
    _take_calls(message, where)
    if "content" in message:
        message["content"] = joined_text(message["content"], f"the content of {where}")
    elif "tool_calls" not in message:
        raise ValueError(f"{where} has no content{describe_columns(message, 'content')}, expected role and content")
    if media := first_medium(message):
        raise ValueError(f"{where} has {media!r}, and media are not supported: remove the row")
    return _weighed(message, where)


def first_medium(columns: Mapping[str, Any]) -> str | None:
    """Returns the first column (or key of a message) that holds media and is not empty.

    Example:
        >>> first_medium({"prompt": "q", "images": ["cat.png"], "videos": []})
        'images'
    """
    for name in MEDIA:
        value: Any = columns.get(name)
        if not is_missing(value) and not (hasattr(value, "__len__") and not len(value)):
            return name
    return None


def _weighed(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Replaces other trainers' keys for a message's weight by ``weight: 0``; a message to be learned has no key."""
    for name in _PARTLY_LEARNED:
        if message.pop(name, None):
            raise ValueError(
                f"{where} has {name!r}, and a message is learned completely or not at all: remove the key, or write "
                "'weight': 0 or 1"
            )

    # Several keys may mark a message, as long as they agree.
    learned = {}
    for name, means_learned in _LEARNED.items():
        if name in message:
            value = message.pop(name)
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise ValueError(f"{where} has {name!r} {short(value)}, expected 0 or 1: it is learned or it is not")
            learned[name] = bool(value) == means_learned
    if len(set(learned.values())) > 1:
        raise ValueError(f"{where} is marked as learned by one of {', '.join(learned)} and not by another: write one")
    return message if all(learned.values()) else {**message, "weight": 0}


def _block_text(block: Any, where: str) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Mapping) and block.get("type", "text") in _TEXT_BLOCKS:
        text = block.get("text", block.get("value"))
        text = text.get("value") if isinstance(text, Mapping) else text
        if isinstance(text, str):
            return text
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    raise ValueError(
        f"{where} has a block of type {kind!r} ({short(block)}), expected text, as in {{'type': 'text', 'text': '...'}}"
    )


def _written_messages(text: str, name: str) -> list[Any] | None:
    """Parses a string that is the JSON of messages; ``None`` for any other string."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(text, object_pairs_hook=read_object)
    except (ValueError, RecursionError):
        # Only what looks like messages is an error: any other text in brackets is a prompt of its own.
        if is_printed(text) and any(f"'{key}'" in text for key in ("role", "from")):
            raise ValueError(
                f"{name!r} is {short(text)}, messages as Python prints them: write a list of messages, or JSON"
            ) from None
        return None
    messages = found if isinstance(found, list) else [found]
    return list(clean(messages)) if messages and all(_is_written_message(message) for message in messages) else None


def _is_written_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    spoken = message.get("role", message.get("from"))
    said = message.keys() & {"content", "value", "tool_calls"}
    return isinstance(spoken, str) and spoken.lower() in _KNOWN_ROLES and bool(said)


# Calls of tools.


def _take_calls(message: dict[str, Any], where: str) -> None:
    """Brings a message's calls to one form."""
    # OpenAI's older key for a single call.
    if isinstance(message.get("function_call"), Mapping):
        message["tool_calls"] = [message.pop("function_call"), *message.get("tool_calls", ())]
    if "tool_calls" not in message:
        return
    calls = read_structure(message.pop("tool_calls"), f"tool_calls of {where}")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if is_missing(calls) or (is_list(calls) and not calls):
        return
    if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise wrong_type(calls, f"tool_calls of {where}", "a list like [{'function': {'name': ..., 'arguments': {}}}]")
    message["tool_calls"] = [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    # The function may be bare or wrapped.
    call = dict(call) if isinstance(call.get("function"), Mapping) else {"type": "function", "function": dict(call)}
    function = dict(call["function"])
    arguments = function.get("arguments")

    # Templates print arguments in a notation of their own and need a mapping; text that is not JSON stays text.
    if isinstance(arguments, str):
        try:
            read = clean(json.loads(arguments or "{}"))
        except (ValueError, RecursionError):
            read = None
        function["arguments"] = read if isinstance(read, dict) else arguments
    return {**call, "function": function}


def _with_written_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Parses the calls that ShareGPT's ``function_call`` holds as JSON text; any other text stays the content."""
    try:
        calls = json.loads(message["content"])
    except (TypeError, ValueError, RecursionError):
        return message
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return message
    return {**message, "content": "", "tool_calls": clean(calls)}


# Forms that some templates need.


def in_blocks(message: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a content that is text a list of one block."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Returns the arguments of a call, whether or not its function is wrapped."""
    return call.get("function", call).get("arguments")


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the arguments of a message's calls as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    written = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        written.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": written}


def as_lines(messages: Sequence[Mapping[str, Any]]) -> str:
    """Writes a conversation as text, one message after the other: its content, and its calls as JSON.

    Example:
        >>> call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
        >>> print(as_lines([{"role": "user", "content": "2+2=?"}, {"role": "assistant", "tool_calls": [call]}]))
        user: 2+2=?
        assistant: {"name": "add", "arguments": {"a": 2}}
    """
    lines = []
    for message in messages:
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
        said = [message.get("content") or ""] if message.get("content") or not calls else []
        lines.append(f"{message['role']}: {' '.join([*said, *calls])}")
    return "\n".join(lines)


# Texts that a rendering must contain.


def _function_name(described: Mapping[str, Any]) -> str:
    inner = described.get("function")
    name = (inner if isinstance(inner, Mapping) else described).get("name")
    return name if isinstance(name, str) else ""


def _forms(said: str) -> Sequence[str]:
    written = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
    return [_spaceless(form) for form in written]


def _spaceless(text: str) -> str:
    return "".join(text.split())
