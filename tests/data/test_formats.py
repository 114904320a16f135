"""Every column layout that is accepted, and every complaint about one that is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_lightning.data.formats import Row, demonstration, preference, prompt_only, stepwise, unpaired

from ..datamodules.toys import complaint

SYSTEM = {"role": "system", "content": "s"}
Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, Row("q", ("a",))),
        ({"prompt": "q", "response": "a"}, Row("q", ("a",))),
        ({"prompt": "q", "completion": None, "response": "a"}, Row("q", ("a",))),
        ({"prompt": "", "completion": "a"}, Row("", ("a",))),
        ({"prompt": "q", "completion": "a", "level": 3, "note": None}, Row("q", ("a",), {"level": 3, "note": None})),
        ({"prompt": [Q], "completion": [A]}, Row([Q], ([A],))),
        ({"prompt": [Q], "completion": A}, Row([Q], ([A],))),
        ({"prompt": [Q], "completion": "a"}, Row([Q], ([A],))),
        ({"prompt": "q", "completion": [A]}, Row([Q], ([A],))),
        ({"prompt": [Q], "completion": [Q, A]}, Row([Q], ([A],))),
        ({"prompt": "q", "completion": [SYSTEM, Q, A]}, Row([SYSTEM, Q], ([A],))),
        ({"prompt": [Q], "completion": [{"role": "assistant", "content": "a", "tool_calls": None}]}, Row([Q], ([A],))),
        ({"messages": [Q, A]}, Row([Q, A])),
        ({"prompt": "ignored", "messages": [Q, A]}, Row([Q, A], (), {"prompt": "ignored"})),
        ({"messages": [HUMAN, GPT]}, Row([Q, A])),
        ({"conversations": [HUMAN, GPT]}, Row([Q, A])),
        ({"conversations": [HUMAN, GPT], "system": "s"}, Row([SYSTEM, Q, A])),
        (
            {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": ""},
            Row([SYSTEM, Q, A], (), {"system": ""}),
        ),
        (
            {"conversations": [HUMAN, {"from": "observation", "value": "7"}, GPT]},
            Row([Q, {"role": "tool", "content": "7"}, A]),
        ),
        ({"text": "a b"}, Row("a b")),
        ({"instruction": "do", "input": "it", "output": "a"}, Row("do\nit\n", ("a",))),
        ({"instruction": "do", "input": "", "output": "a"}, Row("do\n", ("a",))),
        ({"instruction": "do", "output": "a", "text": "template"}, Row("do\n", ("a",), {"text": "template"})),
        (
            {"prompt": "q", "completion": "a", "tools": [{"name": "calc"}]},
            Row("q", ("a",), {}, {"tools": [{"name": "calc"}]}),
        ),
        ({"messages": [Q, A], "chat_template_kwargs": {"x": 1}}, Row([Q, A], (), {}, {"x": 1})),
    ],
)
def test_demonstrations(columns: dict[str, Any], expected: Row) -> None:
    before = dict(columns)
    assert demonstration(columns) == expected
    assert columns == before, "the row itself is left alone"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"promt": "q", "completion": "a"},
            "no column 'prompt' (found: promt, completion; did you mean 'promt'?), expected prompt and completion, "
            "messages, conversations, "
            "instruction and output, or text; name a column that is called otherwise with columns=",
        ),
        (
            {"prompt": "q", "answer": "a"},
            "no column 'completion' (found: prompt, answer), expected prompt and completion",
        ),
        ({}, "no column 'prompt' (found: none)"),
        (
            {"prompt": 3, "completion": "a"},
            "'prompt' is int (3), expected a string or a list of messages like {'role': ",
        ),
        ({"prompt": "q", "completion": ["a"]}, "'completion' is list (['a']), expected a string or a list of messages"),
        ({"prompt": "q", "completion": ""}, "'completion' is empty: write at least one character or message"),
        ({"prompt": "q", "response": ""}, "'response' is empty"),
        ({"prompt": [Q], "completion": []}, "'completion' is empty"),
        ({"prompt": [Q], "completion": [{"role": "assistant", "content": ""}]}, "'completion' has no content"),
        ({"prompt": [Q], "completion": [Q]}, "a completion ends where the prompt does: add the assistant's message"),
        (
            {"prompt": [SYSTEM, Q], "completion": [Q]},
            "a completion begins with a message of role 'user', expected 'assistant'",
        ),
        (
            {"prompt": [Q], "completion": [A, Q]},
            "a completion ends with a message of role 'user', expected 'assistant'",
        ),
        ({"messages": "q"}, "'messages' is str ('q'), expected a list of messages"),
        ({"messages": []}, "'messages' is empty: write at least one message"),
        (
            {"messages": [{"content": "q"}]},
            "message 1 of 'messages' has no role (found: content), expected role and content",
        ),
        ({"messages": [Q, {"role": "assistant"}]}, "message 2 of 'messages' has no content (found: role)"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "the content of message 1 of 'messages' is int (3), expected a string",
        ),
        (
            {"conversations": [{"from": "moon", "value": "q"}]},
            "message 1 of 'conversations' is from 'moon', expected one of",
        ),
        ({"text": 3}, "'text' is int (3), expected a string"),
        ({"text": ""}, "'text' is empty: write something to learn"),
        ({"instruction": 3, "output": "a"}, "'instruction' is int (3), expected a string"),
        ({"messages": [Q, A], "chat_template_kwargs": 3}, "'chat_template_kwargs' is int (3), expected a mapping"),
    ],
)
def test_demonstrations_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(demonstration, columns).startswith(message)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Row("q", ("a", "b"))),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, Row([Q], ([A], [B]))),
        ({"prompt": [Q], "chosen": "a", "rejected": "b"}, Row([Q], ([A], [B]))),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, Row([Q], ([A], [B]))),
        ({"prompt": "q", "chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]}, Row([SYSTEM, Q], ([A], [B]))),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, Row([Q], ([A], [B]))),
        ({"chosen": [Q, A], "rejected": [Q, B]}, Row([Q], ([A], [B]))),
        ({"chosen": [A], "rejected": [B]}, Row([], ([A], [B]))),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, Row([Q, A, Q], ([A], [B]))),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]}, Row([Q], ([A, Q, A], [B, Q, B]))),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}}, Row([Q], ([A], [B]))),
        ({"messages": [Q], "chosen": "a", "rejected": "b"}, Row([Q], ([A], [B]))),
        ({"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"}, Row("do\nit\n", ("a", "b"))),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, Row("The sky is", (" blue", " black"))),
        ({"chosen": "a b c", "rejected": "a b"}, Row("a", (" b c", " b"))),
        ({"chosen": "yes", "rejected": "no"}, Row("", ("yes", "no"))),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: I do", "rejected": "\n\nHuman: q\n\nAssistant: I do not"},
            Row("\n\nHuman: q\n\nAssistant:", (" I do", " I do not")),
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "0.5"}, Row("q", ("a", "b"), {"margin": 0.5})),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 5, "rejected_score": 1.5},
            Row("q", ("a", "b"), {"chosen_score": 5, "rejected_score": 1.5, "margin": 3.5}),
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 1, "margin": None},
            Row("q", ("a", "b"), {"score_chosen": 5, "score_rejected": 1, "margin": 4.0}),
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 5, "rejected_score": 1, "margin": 2},
            Row("q", ("a", "b"), {"chosen_score": 5, "rejected_score": 1, "margin": 2.0}),
        ),
    ],
)
def test_pairs(columns: dict[str, Any], expected: Row) -> None:
    assert preference(columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            "no column 'rejected' (found: prompt, chosen), expected prompt, chosen and rejected",
        ),
        (
            {"prompt": "q", "chosn": "a", "rejected": "b"},
            "no column 'chosen' (found: prompt, chosn, rejected; did you mean 'chosn'?)",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            "chosen and rejected are equal ('a'): a pair needs two different",
        ),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "'chosen' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": [B]}, "of chosen and rejected one is a string and one is messages"),
        (
            {"prompt": "q", "chosen": "a", "rejected": 3},
            "'rejected' is int (3), expected a string or a list of messages",
        ),
        (
            {"chosen": [Q, A], "rejected": [SYSTEM, Q, B]},
            "chosen and rejected part at a message of role 'user', expected 'assistant'",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"},
            "'margin' is 'big', expected a finite number",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")},
            "'margin' is nan, expected a finite number",
        ),
        (
            {"chosen": "q\n\nAssistant:", "rejected": "q\n\nAssistant: a"},
            "one of chosen and rejected is the beginning of the other",
        ),
    ],
)
def test_pairs_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(preference, columns).startswith(message)


def test_ratings() -> None:
    columns = {"prompt": "q", "response": "a", "ratings": {"helpful": 4, "right": "0.5", "brief": None}, "id": 1}
    row = preference(columns)
    assert (row.prompt, row.completions) == ("q", ("a",))
    assert math.isnan(row.fields.pop("brief"))
    assert row.fields == {"helpful": 4.0, "right": 0.5, "id": 1}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "ratings": 3}
    assert preference(pair) == Row("q", ("a", "b"), {"ratings": 3}), "next to a pair it is a field like any other"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "q", "ratings": {"a": 1}},
            "no column 'completion' (found: prompt, ratings), expected prompt, completion and",
        ),
        (
            {"prompt": "q", "response": "a", "ratings": 4},
            "'ratings' is int (4), expected numbers by attribute like {'helpfulness",
        ),
        ({"prompt": "q", "response": "a", "ratings": {"a": "x"}}, "'rating a' is 'x', expected a finite number"),
    ],
)
def test_ratings_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(preference, columns).startswith(message)


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_verdicts(label: Any) -> None:
    assert unpaired({"prompt": "q", "completion": "a", "label": label}) == (Row("q", ("a",), {"label": True}),)


def test_verdicts_of_pairs_and_aliases() -> None:
    assert unpaired({"prompt": "q", "response": "a", "label": "false"}) == (Row("q", ("a",), {"label": False}),)
    assert unpaired({"chosen": [Q, A], "rejected": [Q, B], "id": 7, "margin": 1}) == (
        Row([Q], ([A],), {"id": 7, "label": True}),
        Row([Q], ([B],), {"id": 7, "label": False}),
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "q", "completion": "a"},
            "no column 'label' (found: prompt, completion), expected prompt, completion and label",
        ),
        ({"completion": "a", "label": True}, "no column 'prompt'"),
        ({"prompt": "q", "label": True}, "no column 'completion'"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "'label' is 'maybe', expected true or false"),
        ({"prompt": "q", "completion": "a", "label": 0.5}, "'label' is 0.5, expected true or false"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ],
)
def test_verdicts_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(unpaired, columns).startswith(message)


def test_steps() -> None:
    row = stepwise({"prompt": [Q], "completions": ["x", "y"], "labels": [True, 0.25], "answer": 3})
    assert row == Row([Q], ("x", "y"), {"labels": [1.0, 0.25], "answer": 3})
    classes = stepwise({"prompt": "q", "completions": ["x", "y"], "labels": [2, [0.1, 0.2, 0.7]]})
    assert classes.fields == {"labels": [2.0, [0.1, 0.2, 0.7]]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "q", "completion": ["x"], "labels": [1]},
            "no column 'completions' (found: prompt, completion, labels; did you",
        ),
        (
            {"prompt": "q", "completions": "xy", "labels": [1, 0]},
            "'completions' is str ('xy'), expected a list of strings",
        ),
        (
            {"prompt": "q", "completions": ["x", 3], "labels": [1, 0]},
            "'completions' is list (['x', 3]), expected a list of strings",
        ),
        (
            {"prompt": "q", "completions": ["x"], "labels": 1},
            "'labels' is int (1), expected a list of labels, one per step",
        ),
        (
            {"prompt": "q", "completions": ["x", "y"], "labels": [1]},
            "2 completions but 1 labels: write one label for each",
        ),
        ({"prompt": "q", "completions": [], "labels": []}, "0 completions but 0 labels"),
        ({"prompt": "q", "completions": ["x", ""], "labels": [1, 0]}, "step 2 of 'completions' is empty"),
        (
            {"prompt": "q", "completions": ["x"], "labels": [-1]},
            "'label 1' is -1, expected true, false or a number of at least 0",
        ),
        ({"prompt": "q", "completions": ["x"], "labels": [[0.5, "b"]]}, "'label 1' is 'b', expected a finite number"),
        ({"prompt": "q", "completions": ["x"], "labels": ["+"]}, "'label 1' is '+', expected a finite number"),
    ],
)
def test_steps_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(stepwise, columns).startswith(message)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "answer": "a"}, Row("q", (), {"answer": "a", "prompt": "q"})),
        ({"prompt": [Q], "completion": "a"}, Row([Q], (), {"completion": "a", "prompt": [Q]})),
        ({"messages": [Q, A, Q, A]}, Row([Q, A, Q], (), {"prompt": [Q, A, Q]})),
        ({"conversations": [HUMAN, GPT]}, Row([Q], (), {"prompt": [Q]})),
        ({"instruction": "do", "input": "it"}, Row("do\nit\n", (), {"prompt": "do\nit\n"})),
        ({"prompt": [Q, A]}, Row([Q, A], (), {"prompt": [Q, A]})),
    ],
)
def test_prompts(columns: dict[str, Any], expected: Row) -> None:
    assert prompt_only(columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "q"}, "no column 'prompt' (found: question), expected prompt and any others"),
        ({"prompt": ""}, "'prompt' is empty: write something to be answered"),
        ({"messages": [A]}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' is int (3)"),
    ],
)
def test_prompts_that_cannot_be_used(columns: dict[str, Any], message: str) -> None:
    assert complaint(prompt_only, columns).startswith(message)


@pytest.mark.parametrize(
    ("tie", "fields"),
    [("false", {"tie": False}), ("0", {"tie": False}), (1.0, {"tie": True}), (math.nan, {}), ("", {}), (None, {})],
)
def test_ties_are_verdicts(tie: Any, fields: dict[str, Any]) -> None:
    assert preference({"prompt": "q", "chosen": "a", "rejected": "b", "tie": tie}).fields == fields


def test_a_tie_that_is_no_verdict_is_refused() -> None:
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "tie": "perhaps"}
    assert complaint(preference, columns).startswith("'tie' is 'perhaps', expected true or false")


@pytest.mark.parametrize(("cell", "expected"), [("false", False), (0, False), (1.0, True), ("True", True)])
def test_the_switch_of_thoughts_may_be_text_or_a_number(cell: Any, expected: bool) -> None:
    row = demonstration({"messages": [Q, A], "enable_thinking": cell})
    assert row.template == {"enable_thinking": expected}
    assert row.fields == {}
