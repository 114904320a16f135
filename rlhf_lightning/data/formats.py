"""Brings rows to one normal form: the columns, aliases and chat formats that each data contract accepts.

Each function here takes a row's columns; its errors say what is wrong with them but not where the row is, which the
caller adds. A column that is ``None`` counts as absent, as in unions of tables; so does an empty cell of an optional
column, since a table of text has no other way to omit one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from .cell_checks import (
    check_number,
    check_verdict,
    describe_columns,
    is_list,
    is_missing,
    read_structure,
    short,
    wrong_type,
)
from .layouts import (
    check_columns,
    check_completion,
    check_last,
    check_rest,
    has_columns,
    in_context,
    joined,
    split_prompt,
    take_alpaca,
    take_completion,
    take_context,
    take_conversation,
    take_prompt,
    take_template,
)
from .messages import Messages, Text, check_text

# Names that other trainers use for the two completions of a pair, and for the verdict on one.
_CHOSEN = ("chosen", "chosen_response", "chosen_conversations")
_REJECTED = ("rejected", "rejected_response", "rejected_conversations", "rejected_messages")
_LABEL = ("label", "kto_tag")
_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
# Columns that say what a row's own answers are, or what they are worth: of other answers to its prompt they are wrong.
OF_ANSWERS = (
    *("completion", "response", "completions", "labels"),
    *(*_CHOSEN, *_REJECTED, *_LABEL),
    *("ratings", "margin", "tie", *_SCORES[0], *_SCORES[1]),
)


@dataclass(frozen=True)
class Row:
    """A row in normal form.

    Args:
        prompt: text or chat messages; without completions it is the whole row.
        completions: continuations of the prompt, in the contract's order (preference: chosen, rejected).
        fields: the columns that the contract did not use, untouched, and the ones it adds (``margin``, ``label``).
        template: settings that the row passes to the chat template (``tools`` and its ``chat_template_kwargs``).
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)


def demonstration(columns: Mapping[str, Any]) -> Row:
    """Reads a demonstration: prompt and completion, a conversation, or text.

    Args:
        columns: ``prompt, completion`` (or ``response``); ``messages``, or ShareGPT ``conversations`` (or ``messages``)
            of ``from``/``value``; Alpaca ``instruction, input, output``, whose prompt becomes the instruction and the
            input, each ended by a newline; ``text``. Of several layouts the first in this order counts.
            ``system`` and ``history`` (earlier pairs of question and answer) come before the prompt, which then is a
            conversation; earlier answers are learned, too.

    Returns:
        A row with one completion, or with none if the prompt is all there is.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> demonstration({"prompt": "2+2=", "response": "4", "level": 1})
        Row(prompt='2+2=', completions=('4',), fields={'level': 1}, template={})
    """
    rest = dict(columns)
    template = take_template(rest)

    # A row that was judged bad would silently be imitated.
    for name in _LABEL:
        if str(columns.get(name)).lower() == "false":
            raise ValueError(
                f"{name!r} is false, so the answer is not one to imitate: remove the row, or train on it with KTO "
                f"(UnpairedDataModule); rename a column that is not a verdict with columns={{'my_{name}': {name!r}}}"
            )

    # Layouts whose columns are all empty come last, so that the error names the empty column.
    for filled in (True, False):
        for answer in ("completion", "response"):
            if has_columns(columns, ("prompt", answer), filled=filled):
                prompt = check_text(rest.pop("prompt"), "prompt")
                return _imitated(prompt, take_completion(rest, "completion", "response"), rest, template)
        if any(has_columns(columns, (name,), filled=filled) for name in ("messages", "conversations")):
            return _row(take_conversation(rest), (), rest, template)
        if has_columns(columns, ("instruction", "output"), filled=filled):
            question, context = take_alpaca(rest)
            return _imitated(question, take_completion(rest, "output"), rest, template, context)
        if has_columns(columns, ("text",), filled=filled):
            return _row(_take_whole_text(rest), (), rest, template)

    wanted = "completion" if columns.get("prompt") is not None else "prompt"
    raise ValueError(
        f"no column {wanted!r}{describe_columns(columns, wanted)}, expected prompt and completion, messages, "
        "conversations, instruction and output, or text; name a column that is called otherwise with columns="
    )


def preference(columns: Mapping[str, Any]) -> Row:
    r"""Reads a pair, the better completion first.

    Args:
        columns: ``chosen, rejected``, and ``prompt`` (or ``messages``, ``conversations`` or Alpaca ``instruction,
            input``). Without a prompt it is the common beginning of both: for conversations the messages they share;
            for text the part up to the last ``"\n\nAssistant:"`` that they share, else up to the last whole word that
            they share. ``margin``, or the difference of ``chosen_score`` and ``rejected_score`` (or ``score_chosen``
            and ``score_rejected``), is stored in the field ``margin`` as a number, and ``tie`` as true or false. With
            ``messages`` (or a prompt and its ``response``), ``rejected_response`` is the worse alternative to the last
            answer, which is the better one. Instead of a pair there may be one rated completion: ``prompt, completion``
            (or ``response``) and ``ratings``, numbers by attribute. ``system`` and ``history`` come before the prompt.

    Returns:
        A row with two completions; or with one, and each rating as a separate field (a missing one is nan).

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> row = preference({"chosen": "The sky is blue.", "rejected": "The sky is black.", "margin": 2})
        >>> row.prompt, row.completions, row.fields
        ('The sky is', (' blue.', ' black.'), {'margin': 2.0})
    """
    rest = dict(columns)
    template = take_template(rest)
    chosen, rejected = _first(columns, _CHOSEN), _first(columns, _REJECTED)

    # One rated completion, for reward models of several attributes.
    if not is_missing(columns.get("ratings")) and chosen is None and rejected is None:
        rest |= _ratings(rest.pop("ratings"))
        check_columns(columns, ("prompt", "completion"), "prompt, completion and ratings")
        prompt = check_text(rest.pop("prompt"), "prompt")
        completion = take_completion(rest, "completion", "response")
        return _row(*joined(prompt, (completion,), take_context(rest)), rest, template)

    # A rejected alternative to an answer; it may repeat the conversation before the answer.
    if rejected not in (None, "rejected") and chosen is None:
        question, better = _take_answered(rest)
        worse = check_completion(rest.pop(rejected), rejected)
        if not isinstance(worse, str) and worse[: len(question)] == question:
            worse = worse[len(question) :]
        return _paired(question, (better, worse), rest, template)

    check_columns(columns, (chosen or "chosen", rejected or "rejected"), "prompt, chosen and rejected")
    pair = (take_completion(rest, *_CHOSEN), take_completion(rest, *_REJECTED))
    return _paired(None, pair, rest, template)


def unpaired(columns: Mapping[str, Any]) -> tuple[Row, ...]:
    """Reads a completion with a verdict, or splits a pair into its two verdicts.

    Args:
        columns: ``prompt, completion`` (or ``response``), ``label`` (or ``kto_tag``: true or false, 1 or 0, desirable
            or undesirable); or ``messages`` (or ``conversations``), whose last answer is judged, or Alpaca
            ``instruction, input, output``, each with a label; or a pair as in :func:`preference`, whose chosen half is
            labelled true and whose rejected half false. ``system`` and ``history`` come before the prompt.

    Returns:
        One row, or two for a pair; the verdict is the field ``label``.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> good, bad = unpaired({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
        >>> good.completions, good.fields["label"], bad.completions, bad.fields["label"]
        (('4',), True, ('5',), False)
    """
    label = next((name for name in _LABEL if not is_missing(columns.get(name))), "label")
    if _first(columns, _REJECTED) is not None and is_missing(columns.get(label)):
        pair = preference(columns)
        pair.fields.pop("margin", None)
        return tuple(
            Row(pair.prompt, (completion,), pair.fields | {"label": verdict}, pair.template)
            for completion, verdict in zip(pair.completions, (True, False), strict=True)
        )

    expected = "prompt, completion and label, messages and label, or prompt, chosen and rejected"
    if not any(has_columns(columns, (name,), filled=True) for name in ("messages", "conversations", "instruction")):
        check_columns(columns, ("prompt", "completion"), expected)
    check_columns(columns, (label,), expected)
    rest = dict(columns)
    template = take_template(rest)

    # Joined tables may have both names, as long as they agree.
    verdicts = {check_verdict(rest.pop(name), name) for name in _LABEL if not is_missing(rest.get(name))}
    if len(verdicts) > 1:
        raise ValueError("'label' and 'kto_tag' disagree: write one of them")
    rest["label"] = verdicts.pop() if verdicts else check_verdict(columns[label], label)
    rest.pop("kto_tag", None)

    prompt, completion = _take_answered(rest)
    return (_row(prompt, (completion,), rest, template),)


def stepwise(columns: Mapping[str, Any]) -> Row:
    """Reads a solution in steps, each with its label.

    Args:
        columns: ``prompt``, ``completions`` (a list of strings, the steps) and ``labels`` (as many: true or false, a
            number from 0 to 1, a class's number from 0 on, or a list of the classes' probabilities). ``system`` and
            ``history`` come before the prompt.

    Returns:
        A row whose completions are the steps and whose field ``labels`` has 1.0 for true and 0.0 for false.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> row = stepwise({"prompt": "1+2+3=?", "completions": ["1+2=3", "3+3=7"], "labels": [True, False]})
        >>> row.completions, row.fields
        (('1+2=3', '3+3=7'), {'labels': [1.0, 0.0]})
    """
    check_columns(columns, ("prompt", "completions", "labels"), "prompt, completions and labels")
    rest = dict(columns)
    template = take_template(rest)
    prompt = in_context(check_text(rest.pop("prompt"), "prompt"), take_context(rest))

    # Labels are matched to steps by position, so a step may be neither missing nor empty.
    steps, labels = (read_structure(rest.pop(name), name) for name in ("completions", "labels"))
    if not is_list(steps) or not all(isinstance(step, str) for step in steps):
        raise wrong_type(steps, "completions", "a list of strings, one per step")
    if not is_list(labels):
        raise wrong_type(labels, "labels", "a list of labels, one per step")
    if len(steps) != len(labels) or not steps:
        raise ValueError(
            f"{len(steps)} completions but {len(labels)} labels: write one label for each of at least one step"
        )
    blank = next((number for number, step in enumerate(steps, start=1) if not step.strip("\r\n")), None)
    if blank is not None:
        raise ValueError(f"step {blank} of 'completions' is empty: remove it and its label")

    rest["labels"] = [_step_label(label, f"label {number}") for number, label in enumerate(labels, start=1)]
    return _row(prompt, tuple(steps), rest, template)


def prompt_only(columns: Mapping[str, Any]) -> Row:
    """Reads a prompt for sampling.

    Args:
        columns: ``prompt`` (or ``messages``, ``conversations`` or Alpaca ``instruction, input``) and whatever the
            reward functions need; the last answers of a conversation are dropped. ``system`` and ``history`` come
            before the prompt.

    Returns:
        A row without completions, whose fields are all other columns and ``prompt`` itself.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> prompt_only({"prompt": "2+2=", "answer": "4"}).fields
        {'answer': '4', 'prompt': '2+2='}
    """
    rest = dict(columns)
    template = take_template(rest)
    prompt, context = take_prompt(rest)
    if prompt is None:
        raise ValueError(
            f"no column 'prompt'{describe_columns(columns, 'prompt')}, expected prompt and any others; "
            "name a column that is called otherwise with columns="
        )
    if not isinstance(prompt, str) and is_missing(columns.get("prompt")):
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    if not prompt:
        raise ValueError("'prompt' is empty: write something to be answered")
    prompt = in_context(prompt, context)
    row = _row(prompt, (), rest, template)
    row.fields["prompt"] = prompt
    return row


def _row(prompt: Text, completions: tuple[Text, ...], rest: dict[str, Any], template: dict[str, Any]) -> Row:
    """Makes a row, after refusing unused columns that would have changed the model's input."""
    check_rest(rest)
    return Row(prompt, completions, rest, template)


def _imitated(
    prompt: Text, completion: Text, rest: dict[str, Any], template: dict[str, Any], context: Messages | None = None
) -> Row:
    """Makes a row of a prompt with its answer, or a whole conversation if the context has answers to learn."""
    context = take_context(rest) if context is None else context
    prompt, completions = joined(prompt, (completion,), context)
    if any(message["role"] == "assistant" for message in context):
        return _row([*cast(Messages, prompt), *cast(Messages, completions[0])], (), rest, template)
    return _row(prompt, completions, rest, template)


def _paired(prompt: Text | None, pair: tuple[Text, Text], rest: dict[str, Any], template: dict[str, Any]) -> Row:
    """Makes a row of a pair; takes the prompt from the columns unless it is given."""
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        if prompt is None:
            raise ValueError("of chosen and rejected one is a string and one is messages: write both in the same form")
        pair = cast(tuple[Text, Text], tuple(_answer(each) for each in pair))
    if pair[0] == pair[1]:
        raise ValueError(f"chosen and rejected are equal ({short(pair[0])}): a pair needs two different completions")
    context: Messages = []
    if prompt is None:
        prompt, context = take_prompt(rest)
    prompt, completions = split_prompt(*pair) if prompt is None else joined(prompt, pair, context)
    _take_margin(rest)
    if not is_missing(tie := rest.pop("tie", None)):
        rest["tie"] = check_verdict(tie, "tie")
    return _row(prompt, completions, rest, template)


def _take_answered(rest: dict[str, Any]) -> tuple[Text, Text]:
    """Takes a prompt and its answer: from separate columns, or from a conversation that ends with the answer."""
    for names in (("completion", "response"), ("output",)):
        if any(rest.get(name) is not None for name in names):
            prompt, context = take_prompt(rest)
            if prompt is None:
                raise ValueError(f"no column 'prompt'{describe_columns(rest, 'prompt')}, expected what is answered")
            prompt, completions = joined(prompt, (take_completion(rest, *names),), context)
            return prompt, completions[0]
    if is_missing(rest.get("messages")) and is_missing(rest.get("conversations")):
        raise ValueError(f"no column 'completion'{describe_columns(rest, 'completion')}, expected the better answer")
    messages = take_conversation(rest)
    check_last(messages)
    return messages[:-1], check_completion(messages[-1:], "the last message")


def _answer(text: Text) -> Messages:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def _first(columns: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if columns.get(name) is not None), None)


def _take_whole_text(rest: dict[str, Any]) -> str:
    text = rest.pop("text")
    if not isinstance(text, str):
        raise wrong_type(text, "text", "a string")
    if not text:
        raise ValueError("'text' is empty: write something to learn")
    return text


def _take_margin(rest: dict[str, Any]) -> None:
    margin = rest.pop("margin", None)
    if margin is not None and margin != "":
        rest["margin"] = check_number(margin, "margin")
        return
    for pair in _SCORES:
        if not any(rest.get(name) is None or rest[name] == "" for name in pair):
            chosen, rejected = (check_number(rest[name], name) for name in pair)
            rest["margin"] = chosen - rejected
            return


def _step_label(label: Any, name: str) -> float | list[float]:
    if is_list(label):
        return [check_number(probability, name) for probability in label]
    if isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in ("true", "false")):
        return float(check_verdict(label, name))
    value = check_number(label, name)
    if value < 0:
        raise ValueError(f"{name!r} is {label}, expected true, false or a number of at least 0")
    return value


def _ratings(value: Any) -> dict[str, float]:
    """Checks ratings by attribute; a missing one becomes nan."""
    ratings = value if isinstance(value, Mapping) else read_structure(value, "ratings")
    if not isinstance(ratings, Mapping) or not ratings:
        raise wrong_type(value, "ratings", "numbers by attribute like {'helpfulness': 4, 'correctness': None}")
    return {
        str(name): math.nan if rating is None or rating == "" else check_number(rating, f"rating {name}")
        for name, rating in ratings.items()
    }
