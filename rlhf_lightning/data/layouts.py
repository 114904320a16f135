"""Layouts that several contracts share: prompts, conversations, Alpaca columns, and the context columns with them.

A function named ``take_...`` removes the columns that it reads, so that the row's other fields are left;
:func:`check_rest` refuses leftover columns that would have changed the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, cast

from .cell_checks import check_verdict, clean, describe_columns, is_list, is_missing, read_structure, short, wrong_type
from .messages import Messages, Text, check_text, check_tools, first_medium, joined_text

# Columns that add to the prompt: rows that differ in one of them have different prompts.
CONTEXT = (
    "system",
    "system_prompt",
    "system_message",
    "history",
    "tools",
    "functions",
    "chat_template_kwargs",
    "enable_thinking",
)
_SYSTEM = CONTEXT[:3]


def check_columns(columns: Mapping[str, Any], wanted: tuple[str, ...], expected: str) -> None:
    """Checks that columns are present (``response`` is accepted for ``completion``).

    Raises:
        ValueError: naming the first that is missing, and the closest name.
    """
    for name in wanted:
        aliased = name == "completion" and columns.get("response") is not None
        if columns.get(name) is None and not aliased:
            raise ValueError(
                f"no column {name!r}{describe_columns(columns, name)}, expected {expected}; "
                "name a column that is called otherwise with columns="
            )


def check_rest(rest: Mapping[str, Any]) -> None:
    """Refuses columns that would change the model's input or target, but that no layout has taken.

    Raises:
        ValueError: naming the first of them.
    """
    if media := first_medium(rest):
        raise ValueError(
            f"the row has {media!r}, and media are not supported: remove the row, or rename a column that holds "
            f"none with columns={{'my_{media}': {media!r}}}"
        )
    for name in (*_SYSTEM, "history"):
        if not is_missing(rest.get(name)):
            raise ValueError(
                f"{name!r} is given without a prompt to put it in front of: write the prompt in its own column, or "
                f"rename one that the model is not to see with columns={{'my_{name}': {name!r}}}"
            )


def has_columns(columns: Mapping[str, Any], names: tuple[str, ...], *, filled: bool) -> bool:
    """Tells whether a row has all of these columns, and (with ``filled``) at least one of them is not empty.

    Example:
        >>> row = {"prompt": "", "completion": "4", "text": ""}
        >>> has_columns(row, ("prompt", "completion"), filled=True), has_columns(row, ("text",), filled=True)
        (True, False)
    """
    there = all(columns.get(name) is not None for name in names)
    return there and not (filled and all(is_missing(columns[name]) for name in names))


def take_completion(rest: dict[str, Any], *names: str) -> Text:
    """Takes the answer from the first of several columns that has one.

    Raises:
        ValueError: for an empty answer, and for two columns with different answers.
    """
    given = [name for name in names if not is_missing(rest.get(name))]
    name = given[0] if given else next(name for name in names if rest.get(name) is not None)
    for other in given[1:]:
        if clean(rest[other]) != clean(rest[name]):
            raise ValueError(f"{name!r} and {other!r} are two different answers: rename one of them with columns=")
    # Aliases that repeat the answer are taken as well: left over, they would look like another target.
    value = rest[name]
    for each in names:
        rest.pop(each, None)
    return check_completion(value, name)


def check_completion(value: Any, name: str) -> Text:
    """Checks that an answer is text or messages, and not empty."""
    text = check_text(value, name)
    if not text:
        raise ValueError(f"{name!r} is empty: write at least one character or message, or remove the row")
    if not isinstance(text, str) and not any(message.get("content") or message.get("tool_calls") for message in text):
        raise ValueError(f"{name!r} has no content: write what the assistant says, or remove the row")
    return text


def take_prompt(rest: dict[str, Any]) -> tuple[Text | None, Messages]:
    """Takes the prompt (``None`` without one), and the messages that :func:`in_context` puts before it."""
    if not is_missing(rest.get("prompt")):
        return check_text(rest.pop("prompt"), "prompt"), take_context(rest)

    # An empty prompt column gives way to the layouts below.
    if not (is_missing(rest.get("messages")) and is_missing(rest.get("conversations"))):
        rest.pop("prompt", None)
        return _take_messages(rest), take_context(rest)
    if not is_missing(rest.get("instruction")):
        rest.pop("prompt", None)
        return take_alpaca(rest)
    prompt = rest.pop("prompt", None)
    return (None, []) if prompt is None else (check_text(prompt, "prompt"), take_context(rest))


def take_conversation(rest: dict[str, Any]) -> Messages:
    """Takes ``messages`` or ``conversations``, with the ``system`` and ``history`` columns before them."""
    messages = _take_messages(rest)
    return cast(Messages, in_context(messages, take_context(rest)))


def take_alpaca(rest: dict[str, Any]) -> tuple[str, Messages]:
    """Takes ``instruction`` and ``input`` as one text, and the context before it (``system``, ``history``)."""
    lines = [rest.pop("instruction"), rest.pop("input", None)]
    lines = ["" if is_missing(line) else line for line in lines]
    for name, line in zip(("instruction", "input"), lines, strict=True):
        if not isinstance(line, str):
            raise wrong_type(line, name, "a string")
    question = "\n".join(line for line in lines if line)
    context = take_context(rest)
    # The newline tells a model that the instruction is over, without adding words; in a conversation the template does.
    return question if context else question + "\n", context


def _take_messages(rest: dict[str, Any]) -> Messages:
    name = "conversations" if is_missing(rest.get("messages")) and rest.get("conversations") is not None else "messages"
    messages = check_text(read_structure(rest.pop(name), name), name)
    if isinstance(messages, str):
        raise wrong_type(messages, name, "a list of messages like {'role': 'user', 'content': '...'}")
    if not messages:
        raise ValueError(f"{name!r} is empty: write at least one message")
    return messages


def take_context(rest: dict[str, Any]) -> Messages:
    """Takes ``system`` and ``history`` as the messages before a prompt; there may be none.

    Raises:
        ValueError: for a system message that is not text, or a history that is not a list of questions with answers.
    """
    system: dict[str, str] = {}
    for name in _SYSTEM:
        value = rest.get(name)
        if is_missing(value):
            continue
        if isinstance(value, str) or is_list(value):
            text = joined_text(clean(rest.pop(name)), repr(name))
        else:
            raise wrong_type(value, name, "a string, the system's message")
        if text.strip():
            system[name] = text
    if len(set(system.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, system))} are two different system messages: write one of them")
    opening = [{"role": "system", "content": text} for text in list(system.values())[:1]]
    return [*opening, *_take_history(rest)]


def _take_history(rest: dict[str, Any]) -> Messages:
    value = rest.get("history")
    if is_missing(value):
        return []
    turns = read_structure(value, "history")
    if not is_list(turns):
        raise wrong_type(value, "history", "a list of earlier [question, answer] pairs")
    del rest["history"]

    # Messages with roles are accepted in place of pairs.
    if turns and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns):
        return cast(Messages, check_text(turns, "history"))
    messages: Messages = []
    for number, turn in enumerate(turns, start=1):
        if not is_list(turn) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise ValueError(f"turn {number} of 'history' is {short(turn)}, expected a [question, answer] pair")
        messages += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), turn, strict=True)]
    return messages


def in_context(prompt: Text, context: Messages) -> Text:
    """Puts a system message and a history before a prompt, which then is a conversation.

    Raises:
        ValueError: where the prompt has another system message, or its own history.
    """
    if not context:
        return prompt
    if isinstance(prompt, str):
        return [*context, {"role": "user", "content": prompt}] if prompt else context

    # Messages may have a system message of their own, which has to agree with the column's.
    opening, history = (context[:1], context[1:]) if context[0]["role"] == "system" else ([], context)
    if history and any(message["role"] == "assistant" for message in prompt):
        raise ValueError(
            "'history' is given together with messages that have earlier answers: write all of them as messages"
        )
    if prompt and prompt[0]["role"] == "system":
        if opening and opening[0]["content"].strip() != prompt[0].get("content", "").strip():
            raise ValueError(
                f"the row has two system messages, {short(opening[0]['content'])} in a column and "
                f"{short(prompt[0].get('content'))} in its messages: write one of them"
            )
        opening, prompt = prompt[:1], prompt[1:]
    return [*opening, *history, *prompt]


def take_template(rest: dict[str, Any]) -> dict[str, Any]:
    """Takes the row's arguments of the chat template: ``tools`` and its own settings.

    ``functions``, the older name of ``tools``, is read where it is a list of functions. Settings are the mapping
    ``chat_template_kwargs`` and the column ``enable_thinking``.
    """
    value = rest.pop("chat_template_kwargs", None)
    settings = {} if is_missing(value) else read_structure(value, "chat_template_kwargs")
    if not isinstance(settings, Mapping):
        raise wrong_type(settings, "chat_template_kwargs", "a mapping of names to values")

    # Qwen's switch as a column of its own; the mapping takes precedence.
    settings = dict(settings)
    if not is_missing(thinking := rest.get("enable_thinking")):
        settings = {"enable_thinking": check_verdict(thinking, "enable_thinking"), **settings}
        del rest["enable_thinking"]

    # `functions` is OpenAI's older name for tools. A column of that name that is not a list of definitions is data.
    tools = check_tools(rest.pop("tools", None))
    functions = rest.get("functions")
    if is_list(functions) and functions and all(isinstance(each, Mapping) and "name" in each for each in functions):
        if tools:
            raise ValueError("'tools' and 'functions' are both given: write only tools")
        tools = [{"type": "function", "function": clean(each)} for each in rest.pop("functions")]
    return settings | ({"tools": tools} if tools else {})


def joined(
    prompt: Text, completions: tuple[Text, ...], context: Messages | None = None
) -> tuple[Text, tuple[Text, ...]]:
    """Brings prompt and completions to one kind, text or messages, and strips the prompt from the completions.

    Args:
        prompt: text or messages.
        completions: text or messages, possibly whole conversations.
        context: messages that come before the prompt; with them, a text prompt becomes the user's message.

    Raises:
        ValueError: where they do not fit together.
    """
    context = context or []
    if all(isinstance(completion, str) for completion in completions):
        if isinstance(prompt, str) and not context:
            return prompt, completions
        # With a chat prompt, a plain answer can only be the assistant's.
        answers = tuple([{"role": "assistant", "content": completion}] for completion in completions)
        return in_context(prompt, context), answers
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
        if all(_prompt_length(completion, prompt) for completion in completions):
            # Whole conversations that repeat the question of the prompt column: the prompt ends with that question.
            length = _prompt_length(completions[0], prompt)
            prompt = cast(Messages, completions[0])[:length]

    # From here on all are messages. Completions may repeat the prompt, which is then cut off.
    if prompt and all(completion[: len(prompt)] == prompt for completion in completions):
        completions = tuple(completion[len(prompt) :] for completion in completions)
    for completion in completions:
        if not completion:
            raise ValueError("a completion ends where the prompt does: add the assistant's message")
        if prompt and cast(Messages, completion)[0]["role"] not in ("assistant", "tool"):
            role = cast(Messages, completion)[0]["role"]
            raise ValueError(f"a completion begins with a message of role {role!r}, expected 'assistant'")
        check_last(cast(Messages, completion))
    return in_context(prompt, context), completions


def _prompt_length(conversation: Text, question: Messages) -> int:
    """Counts the messages up to the question if the conversation opens with it (after a system message); else 0."""
    start = 1 if conversation and cast(Messages, conversation)[0]["role"] == "system" else 0
    return start + 1 if question and list(conversation[start : start + 1]) == question else 0


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, tuple[Text, Text]]:
    """Splits off the common beginning of two completions as their prompt."""
    if isinstance(chosen, str):
        pairs = zip(chosen, rejected, strict=False)
        shared = chosen[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]

        # HH-RLHF writes conversations as text, where an answer begins after the last speaker.
        turn = shared.rfind("\n\nAssistant:")
        if turn >= 0:
            cut = turn + len("\n\nAssistant:")
        else:
            # The space between two words belongs to the second, as in tokenizers.
            cut = max((index for index, letter in enumerate(shared) if letter.isspace()), default=0)
        prompt: Text = chosen[:cut]
    else:
        cut = 0
        # At least one message of each must remain as its answer.
        while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
            cut += 1
        prompt = chosen[:cut]
        for completion in (chosen[cut:], rejected[cut:]):
            role = cast(Messages, completion)[0]["role"]
            if role != "assistant":
                raise ValueError(
                    f"chosen and rejected part at a message of role {role!r}, expected 'assistant': "
                    "both need the same messages before the answer"
                )
        check_last(chosen)
        check_last(cast(Messages, rejected))
    if not chosen[cut:] or not rejected[cut:]:
        raise ValueError("one of chosen and rejected is the beginning of the other: write the prompt in its own column")
    return prompt, (chosen[cut:], rejected[cut:])


def check_last(completion: Messages) -> None:
    """Checks that an answer ends with a message of the assistant."""
    if completion[-1]["role"] != "assistant":
        raise ValueError(f"a completion ends with a message of role {completion[-1]['role']!r}, expected 'assistant'")
