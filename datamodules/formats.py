"""What rows may look like: columns, aliases and chat formats of each data contract, brought to one normal form.

A function here takes a row's columns and says what is wrong with them without saying where the row is; whoever reads
the rows adds that. A column that is ``None`` counts as absent, as unions of tables have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, cast

from .values import (
    Messages,
    Text,
    check_number,
    check_text,
    check_verdict,
    describe_columns,
    is_list,
    short,
    wrong_type,
)


@dataclass(frozen=True)
class Row:
    """A row in normal form.

    Args:
        prompt: what comes first, as text or chat messages; without completions it is the whole row.
        completions: what may follow it, in the contract's order (preference: chosen, rejected).
        fields: the columns that the contract did not use, untouched, and those it adds (``margin``, ``label``).
        template: what the row hands to the chat template (``tools`` and its ``chat_template_kwargs``).
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)


def demonstration(columns: Mapping[str, Any]) -> Row:
    """Reads what is to be imitated: prompt and completion, a conversation, or text.

    Args:
        columns: ``prompt, completion`` (or ``response``); ``messages``, or ShareGPT ``conversations`` (or ``messages``)
            of ``from``/``value``; Alpaca ``instruction, input, output``, whose prompt becomes the instruction, the
            input and a line's end, each on its line; ``text``. Where several are there, the first in this order counts.

    Returns:
        A row with one completion, or with none if the prompt is all there is.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> demonstration({"prompt": "2+2=", "response": "4", "level": 1})
        Row(prompt='2+2=', completions=('4',), fields={'level': 1}, template={})
    """
    rest = dict(columns)
    template = _take_template(rest)
    has = {name for name, value in columns.items() if value is not None}
    if "prompt" in has and has & {"completion", "response"}:
        return _answered(rest, template)
    if "messages" in has or "conversations" in has:
        return Row(_take_conversation(rest), (), rest, template)
    if {"instruction", "output"} <= has:
        prompt = _take_alpaca(rest)
        completion = _completion(rest.pop("output"), "output")
        return Row(*_joined(prompt, (completion,)), rest, template)
    if "text" in has:
        text = rest.pop("text")
        if not isinstance(text, str):
            raise wrong_type(text, "text", "a string")
        if not text:
            raise ValueError("'text' is empty: write something to learn")
        return Row(text, (), rest, template)
    wanted = "completion" if "prompt" in has else "prompt"
    raise ValueError(
        f"no column {wanted!r}{describe_columns(columns, wanted)}, expected prompt and completion, messages, "
        "conversations, instruction and output, or text; name a column that is called otherwise with columns="
    )


def preference(columns: Mapping[str, Any]) -> Row:
    r"""Reads a pair, the better completion first.

    Args:
        columns: ``chosen, rejected``, and ``prompt`` (or ``messages``, ``conversations`` or Alpaca ``instruction,
            input``). Without a prompt it is what both begin with: for conversations the messages they share; for text
            the part up to the last ``"\n\nAssistant:"`` that they share, else up to the last whole word that they
            share. ``margin``, or the difference of ``chosen_score`` and ``rejected_score`` (or ``score_chosen`` and
            ``score_rejected``), ends up in the field ``margin`` as a number. Instead of a pair there may be one rated
            completion: ``prompt, completion`` (or ``response``) and ``ratings``, numbers by attribute.

    Returns:
        A row with two completions; or with one, and each rating as a field of its own (a missing one is not-a-number).

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> row = preference({"chosen": "The sky is blue.", "rejected": "The sky is black.", "margin": 2})
        >>> row.prompt, row.completions, row.fields
        ('The sky is', (' blue.', ' black.'), {'margin': 2.0})
    """
    rest = dict(columns)
    template = _take_template(rest)
    if columns.get("ratings") is not None and columns.get("chosen") is None and columns.get("rejected") is None:
        rest |= _ratings(rest.pop("ratings"))
        _check_columns(columns, ("prompt", "completion"), "prompt, completion and ratings")
        return _answered(rest, template)
    _check_columns(columns, ("chosen", "rejected"), "prompt, chosen and rejected")
    pair = (_completion(rest.pop("chosen"), "chosen"), _completion(rest.pop("rejected"), "rejected"))
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise ValueError("of chosen and rejected one is a string and one is messages: write both alike")
    if pair[0] == pair[1]:
        raise ValueError(f"chosen and rejected are equal ({short(pair[0])}): a pair needs two different completions")
    prompt = _take_prompt(rest)
    prompt, pair = _implicit_prompt(*pair) if prompt is None else cast(Any, _joined(prompt, pair))
    _take_margin(rest)
    return Row(prompt, pair, rest, template)


def unpaired(columns: Mapping[str, Any]) -> tuple[Row, ...]:
    """Reads a completion with a verdict, or splits a pair into its two verdicts.

    Args:
        columns: ``prompt, completion`` (or ``response``), ``label`` (true or false, 1 or 0); or a pair as in
            :func:`preference`, whose chosen half is labelled true and whose rejected half false.

    Returns:
        One row, or two for a pair; the verdict is the field ``label``.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> good, bad = unpaired({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
        >>> good.completions, good.fields["label"], bad.completions, bad.fields["label"]
        (('4',), True, ('5',), False)
    """
    if columns.get("chosen") is not None and columns.get("rejected") is not None and columns.get("label") is None:
        pair = preference(columns)
        pair.fields.pop("margin", None)
        return tuple(
            Row(pair.prompt, (completion,), pair.fields | {"label": label}, pair.template)
            for completion, label in zip(pair.completions, (True, False), strict=True)
        )
    expected = "prompt, completion and label, or prompt, chosen and rejected"
    _check_columns(columns, ("prompt", "completion", "label"), expected)
    rest = dict(columns)
    template = _take_template(rest)
    rest["label"] = check_verdict(rest["label"], "label")
    return (_answered(rest, template),)


def stepwise(columns: Mapping[str, Any]) -> Row:
    """Reads a solution in steps, each with its label.

    Args:
        columns: ``prompt``, ``completions`` (a list of strings, the steps) and ``labels`` (as many: true or false, a
            number from 0 to 1, a class's number from 0 on, or a list of the classes' probabilities).

    Returns:
        A row whose completions are the steps and whose field ``labels`` has 1.0 for true and 0.0 for false.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> row = stepwise({"prompt": "1+2+3=?", "completions": ["1+2=3", "3+3=7"], "labels": [True, False]})
        >>> row.completions, row.fields
        (('1+2=3', '3+3=7'), {'labels': [1.0, 0.0]})
    """
    _check_columns(columns, ("prompt", "completions", "labels"), "prompt, completions and labels")
    rest = dict(columns)
    template = _take_template(rest)
    prompt = check_text(rest.pop("prompt"), "prompt")
    steps, labels = rest.pop("completions"), rest.pop("labels")
    if not is_list(steps) or not all(isinstance(step, str) for step in steps):
        raise wrong_type(steps, "completions", "a list of strings, one per step")
    if not is_list(labels):
        raise wrong_type(labels, "labels", "a list of labels, one per step")
    if len(steps) != len(labels) or not steps:
        raise ValueError(
            f"{len(steps)} completions but {len(labels)} labels: write one label for each of at least one step"
        )
    if "" in steps:
        raise ValueError(f"step {list(steps).index('') + 1} of 'completions' is empty: leave it out, with its label")
    rest["labels"] = [_step_label(label, f"label {number}") for number, label in enumerate(labels, start=1)]
    return Row(prompt, tuple(steps), rest, template)


def prompt_only(columns: Mapping[str, Any]) -> Row:
    """Reads a prompt to be answered.

    Args:
        columns: ``prompt`` (or ``messages``, ``conversations`` or Alpaca ``instruction, input``) and whatever the
            reward functions want; a conversation's last answers are taken off it.

    Returns:
        A row without completions, whose fields are all other columns and ``prompt`` itself.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> prompt_only({"prompt": "2+2=", "answer": "4"}).fields
        {'answer': '4', 'prompt': '2+2='}
    """
    rest = dict(columns)
    template = _take_template(rest)
    prompt = _take_prompt(rest)
    if prompt is None:
        raise ValueError(
            f"no column 'prompt'{describe_columns(columns, 'prompt')}, expected prompt and any others; "
            "name a column that is called otherwise with columns="
        )
    if not isinstance(prompt, str) and columns.get("prompt") is None:
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    if not prompt:
        raise ValueError("'prompt' is empty: write something to be answered")
    rest["prompt"] = prompt
    return Row(prompt, (), rest, template)


def _check_columns(columns: Mapping[str, Any], wanted: tuple[str, ...], expected: str) -> None:
    for name in wanted:
        aliased = name == "completion" and columns.get("response") is not None
        if columns.get(name) is None and not aliased:
            raise ValueError(
                f"no column {name!r}{describe_columns(columns, name)}, expected {expected}; "
                "name a column that is called otherwise with columns="
            )


def _answered(rest: dict[str, Any], template: dict[str, Any]) -> Row:
    """Takes prompt and completion (or response) out of a row that has them."""
    name = "completion" if rest.get("completion") is not None else "response"
    prompt, completions = _joined(check_text(rest.pop("prompt"), "prompt"), (_completion(rest.pop(name), name),))
    if name == "response":
        rest.pop("completion", None)
    return Row(prompt, completions, rest, template)


def _take_prompt(rest: dict[str, Any]) -> Text | None:
    if rest.get("prompt") is not None:
        return check_text(rest.pop("prompt"), "prompt")
    if rest.get("messages") is not None or rest.get("conversations") is not None:
        return _take_conversation(rest)
    if rest.get("instruction") is not None:
        return _take_alpaca(rest)
    rest.pop("prompt", None)
    return None


def _take_conversation(rest: dict[str, Any]) -> Messages:
    name = "messages" if rest.get("messages") is not None else "conversations"
    messages = check_text(rest.pop(name), name)
    if isinstance(messages, str):
        raise wrong_type(messages, name, "a list of messages like {'role': 'user', 'content': '...'}")
    if not messages:
        raise ValueError(f"{name!r} is empty: write at least one message")
    system = rest.get("system")
    if isinstance(system, str) and system and name == "conversations" and messages[0]["role"] != "system":
        del rest["system"]
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _take_alpaca(rest: dict[str, Any]) -> str:
    lines = [rest.pop("instruction"), rest.pop("input", None) or ""]
    for name, line in zip(("instruction", "input"), lines, strict=True):
        if not isinstance(line, str):
            raise wrong_type(line, name, "a string")
    # The end of the line is what tells a model that the instruction is over; no other words are put in its mouth.
    return "\n".join(line for line in lines if line) + "\n"


def _take_template(rest: dict[str, Any]) -> dict[str, Any]:
    settings = rest.pop("chat_template_kwargs", None) or {}
    if not isinstance(settings, Mapping):
        raise wrong_type(settings, "chat_template_kwargs", "a mapping of names to values")
    tools = rest.get("tools")
    return dict(settings) | ({"tools": rest.pop("tools")} if is_list(tools) and tools else {})


def _take_margin(rest: dict[str, Any]) -> None:
    margin = rest.pop("margin", None)
    if margin is not None:
        rest["margin"] = check_number(margin, "margin")
        return
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if rest.get(chosen) is not None and rest.get(rejected) is not None:
            rest["margin"] = check_number(rest[chosen], chosen) - check_number(rest[rejected], rejected)
            return


def _joined(prompt: Text, completions: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """Makes prompt and completions of one kind, and completions what comes after the prompt."""
    if all(isinstance(completion, str) for completion in completions):
        if isinstance(prompt, str):
            return prompt, completions
        # A chat prompt with plain answers leaves one reading: the answer is the assistant's.
        return prompt, tuple([{"role": "assistant", "content": completion}] for completion in completions)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
        if all(_prompt_length(completion, prompt) for completion in completions):
            # Whole conversations beside a column with their question: the question is where they part from it.
            length = _prompt_length(completions[0], prompt)
            prompt = cast(Messages, completions[0])[:length]
    if prompt and all(completion[: len(prompt)] == prompt for completion in completions):
        completions = tuple(completion[len(prompt) :] for completion in completions)
    for completion in completions:
        if not completion:
            raise ValueError("a completion ends where the prompt does: add the assistant's message")
        if prompt and cast(Messages, completion)[0]["role"] not in ("assistant", "tool"):
            role = cast(Messages, completion)[0]["role"]
            raise ValueError(f"a completion begins with a message of role {role!r}, expected 'assistant'")
        _check_last(cast(Messages, completion))
    return prompt, completions


def _prompt_length(conversation: Text, question: Messages) -> int:
    """The number of messages up to the question, if the conversation opens with it (after a system message); else 0."""
    start = 1 if conversation and cast(Messages, conversation)[0]["role"] == "system" else 0
    return start + 1 if question and list(conversation[start : start + 1]) == question else 0


def _implicit_prompt(chosen: Text, rejected: Text) -> tuple[Text, tuple[Text, Text]]:
    """Splits off what two completions begin with."""
    if isinstance(chosen, str):
        pairs = zip(chosen, rejected, strict=False)
        shared = chosen[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]
        turn = shared.rfind("\n\nAssistant:")
        if turn >= 0:
            cut = turn + len("\n\nAssistant:")
        else:
            # The blank between two words goes with the second, as tokenizers have it.
            cut = max((index for index, letter in enumerate(shared) if letter.isspace()), default=0)
        prompt: Text = chosen[:cut]
    else:
        cut = 0
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
        _check_last(chosen)
        _check_last(cast(Messages, rejected))
    if not chosen[cut:] or not rejected[cut:]:
        raise ValueError("one of chosen and rejected is the beginning of the other: write the prompt in its own column")
    return prompt, (chosen[cut:], rejected[cut:])


def _check_last(completion: Messages) -> None:
    if completion[-1]["role"] != "assistant":
        raise ValueError(f"a completion ends with a message of role {completion[-1]['role']!r}, expected 'assistant'")


def _completion(value: Any, name: str) -> Text:
    text = check_text(value, name)
    if not text:
        raise ValueError(f"{name!r} is empty: write at least one character or message, or leave the row out")
    if not isinstance(text, str) and not any(message.get("content") or message.get("tool_calls") for message in text):
        raise ValueError(f"{name!r} has no content: write what the assistant says, or leave the row out")
    return text


def _step_label(label: Any, name: str) -> float | list[float]:
    if is_list(label):
        return [check_number(probability, name) for probability in label]
    value = float(label) if isinstance(label, bool) else check_number(label, name)
    if value < 0:
        raise ValueError(f"{name!r} is {label}, expected true, false or a number of at least 0")
    return value


def _ratings(value: Any) -> dict[str, float]:
    """Checks ratings by attribute; one that is missing becomes not-a-number."""
    if not isinstance(value, Mapping) or not value:
        raise wrong_type(value, "ratings", "numbers by attribute like {'helpfulness': 4, 'correctness': None}")
    return {
        str(name): math.nan if rating is None else check_number(rating, f"rating {name}")
        for name, rating in value.items()
    }
