"""Rows keep their meaning, or are refused in one line: every contract, from every kind of file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from rlhf_lightning.data.cell_checks import is_missing
from rlhf_lightning.data.chat_template import ChatTemplate
from rlhf_lightning.data.formats import Row, demonstration, preference, prompt_only, stepwise, unpaired
from rlhf_lightning.data.messages import check_no_tools, check_rendered, check_text
from rlhf_lightning.data.sources import open_source
from rlhf_lightning.datamodules import (
    ExampleDataModule,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    UnpairedDataModule,
)

from ..datamodules.toys import UNMARKED, chars, complaint

# Renders the tools that are offered, and calls by name with their arguments.
AGENT = (
    "{% if tools %}{{ 'T' + (tools | tojson) + eos_token }}{% endif %}{% for m in messages %}"
    "{{ m['role'][0] + ':' + (m['content'] or '') }}{% for c in m['tool_calls'] or [] %}"
    "{{ '!' + c['function']['name'] + (c['function']['arguments'] | tojson) }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)

# Shows what is in a message; and templates that take a call's arguments for text, or for what they are.
KEYS = "{% for m in messages %}{{ m.keys() | sort | join(',') }}{% endfor %}"
CALL = "{% for m in messages %}{% for c in m['tool_calls'] %}{% set f = c['function'] %}CALL{% endfor %}{% endfor %}"
JOINS = CALL.replace("CALL", "{{ f['name'] + f['arguments'] }}")
PRINTS = CALL.replace("CALL", "{{ f['name'] }}{{ f['arguments'] }}")
DUMPS = CALL.replace("CALL", "{{ f['name'] + f['arguments'] | tojson }}")

# Two tools, whose parameters have different keys: a table gives each the keys of the other, with null.
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}
SAY = {"type": "function", "function": {"name": "say", "parameters": {"b": {"enum": ["x", "y"]}}}}
CALLS = {
    "add": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    "say": [{"type": "function", "function": {"name": "say", "arguments": {"b": "x"}}}],
}


def text_of(tokens: Any) -> str:
    """The characters of tokens; ``~`` stands for the end-of-sequence token."""
    return "".join(chars().convert_ids_to_tokens([int(token) for token in tokens])).replace("<eos>", "~")


def blocks(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]


def conversation(name: str) -> list[dict[str, Any]]:
    """A question in blocks, a call, and what the tool says."""
    return [
        {"role": "user", "content": blocks(f"q {name}")},
        {"role": "assistant", "content": [], "tool_calls": CALLS[name]},
        {"role": "tool", "content": blocks("7")},
    ]


def shown(tool: dict[str, Any], name: str, call: str) -> str:
    """The rendering of a conversation, by hand."""
    return f"T[{json.dumps(tool)}]~u:q {name}~a:!{name}{call}~t:7~a:"


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": blocks(text)}


def rows_of(contract: str) -> list[dict[str, Any]]:
    made = []
    for name, tool in (("add", ADD), ("say", SAY)):
        row: dict[str, Any] = {"tools": [tool], "images": []}
        if contract == "sft":
            row |= {"messages": [*conversation(name), answer("ok")]}
        elif contract == "preference":
            row |= {"prompt": conversation(name), "chosen": [answer("ok")], "rejected": [answer("no")]}
        elif contract == "unpaired":
            row |= {"messages": [*conversation(name), answer("ok")], "label": "desirable"}
        elif contract == "stepwise":
            row |= {"prompt": conversation(name), "completions": ["ok", "so"], "labels": [True, False]}
        else:
            row |= {"prompt": conversation(name)}
        made.append(row)
    return made


CONTRACTS: dict[str, tuple[type[ExampleDataModule], list[str]]] = {
    "sft": (SFTDataModule, ["ok~"]),
    "preference": (PreferenceDataModule, ["ok~", "no~"]),
    "unpaired": (UnpairedDataModule, ["ok~"]),
    "stepwise": (StepwiseDataModule, ["ok\nso\n"]),
    "prompts": (PromptDataModule, [""]),
}


def as_json_lines(rows: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_json_list(rows: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def as_csv(rows: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            kept = {name: "" if value == [] else value for name, value in row.items()}
            writer.writerow({n: v if isinstance(v, str) else json.dumps(v) if v else v for n, v in kept.items()})
    return str(path)


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def as_parquet_with_json(rows: list[dict[str, Any]], folder: Path) -> str:
    """As Glaive has it: the tools are a text."""
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "tools": json.dumps(row["tools"])} for row in rows]), path)
    return str(path)


def as_arrow(rows: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "rows.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def as_dataset(rows: list[dict[str, Any]], folder: Path) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def as_pandas_records(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """As ``pandas.read_parquet(...).to_dict("records")`` gives them: lists are numpy's."""
    return [{n: np.array(v, object) if isinstance(v, list) else v for n, v in row.items()} for row in rows]


DOORS = [as_json_lines, as_json_list, as_csv, as_parquet, as_parquet_with_json, as_arrow, as_dataset, as_pandas_records]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("contract", CONTRACTS)
def test_tools_blocks_and_nulls_read_the_same_way_from_every_source(
    contract: str, door: Callable[..., Any], streaming: bool, tmp_path: Path
) -> None:
    cls, endings = CONTRACTS[contract]
    source = door(rows_of(contract), tmp_path)
    options = {"partners": False} if contract == "unpaired" else {}
    data = cls(train=source, tokenizer=chars(AGENT), shuffle=False, streaming=streaming, **options)
    examples = [example for batch in data.train_dataloader() for example in batch]
    read = [
        [text_of([token for part in path for token in part.tokens]) for path in example.root.paths()]
        for example in examples
    ]
    prompts = [shown(ADD, "add", '{"a": 1}'), shown(SAY, "say", '{"b": "x"}')]
    assert read == [[prompt + ending for ending in endings] for prompt in prompts]


# Layouts of other trainers.

SYSTEM, Q = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
A, B = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
Q1, A1 = {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}
DO = {"role": "user", "content": "do\nit"}
HISTORY = [["q1", "a1"]]
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # LLaMA-Factory's Alpaca: earlier answers are learned as well.
        ({"instruction": "do", "input": "it", "output": "a", "system": "s"}, Row([SYSTEM, DO], ([A],))),
        (
            {"instruction": "do", "input": "it", "output": "a", "system": "s", "history": HISTORY},
            Row([SYSTEM, Q1, A1, DO, A]),
        ),
        ({"instruction": "do", "input": "it", "output": "a", "history": HISTORY}, Row([Q1, A1, DO, A])),
        ({"instruction": "do", "output": "a", "system": "", "history": [], "input": None}, Row("do\n", ("a",))),
        ({"instruction": "do", "output": "a", "system": float("nan"), "history": ""}, Row("do\n", ("a",))),
        ({"instruction": "do", "output": "a", "history": "[]", "tools": "[]"}, Row("do\n", ("a",))),
        ({"prompt": "q", "response": "a", "system": "s", "history": json.dumps(HISTORY)}, Row([SYSTEM, Q1, A1, Q, A])),
        ({"prompt": "q", "response": "a", "history": [Q1, A1]}, Row([Q1, A1, Q, A])),
        # OpenOrca, and messages with a column for the system.
        ({"prompt": "q", "response": "a", "system_prompt": "s"}, Row([SYSTEM, Q], ([A],))),
        ({"messages": [Q, A], "system": "s"}, Row([SYSTEM, Q, A])),
        ({"messages": [SYSTEM, Q, A], "system": "s"}, Row([SYSTEM, Q, A])),
        ({"prompt": [Q], "completion": [A], "system_message": blocks("s")}, Row([SYSTEM, Q], ([A],))),
        # A table of texts with rows of two layouts.
        ({"prompt": "", "completion": "", "messages": json.dumps([Q, A]), "text": ""}, Row([Q, A])),
        ({"prompt": "q", "completion": "a", "messages": "", "text": ""}, Row("q", ("a",))),
        # verl's and OpenAI's older names.
        ({"messages": [Q, A], "enable_thinking": False}, Row([Q, A], (), {}, {"enable_thinking": False})),
        (
            {"messages": [Q, A], "functions": [{"name": "add", "description": None}]},
            Row([Q, A], (), {}, {"tools": [{"type": "function", "function": {"name": "add"}}]}),
        ),
        # Settings of a template, as tables keep them.
        (
            {"messages": [Q, A], "chat_template_kwargs": {"think": None, "style": {"a": None, "b": 1}}},
            Row([Q, A], (), {}, {"style": {"b": 1}}),
        ),
        ({"messages": [Q, A], "chat_template_kwargs": '{"think": true}'}, Row([Q, A], (), {}, {"think": True})),
        # Speakers by other names.
        ({"messages": [{"role": "human", "content": "q"}, {"role": "GPT", "value": "a"}]}, Row([Q, A])),
        # Chats in a cell of text.
        ({"prompt": json.dumps([Q]), "completion": json.dumps(A)}, Row([Q], ([A],))),
        ({"prompt": '[{"a": 1}]', "completion": '{"role": "x"}'}, Row('[{"a": 1}]', ('{"role": "x"}',))),
    ],
)
def test_demonstrations_of_other_trainers(columns: dict[str, Any], expected: Row) -> None:
    read = demonstration(columns)
    kept = {name: value for name, value in read.fields.items() if not (is_missing(value) or value == [])}
    assert (read.prompt, read.completions, kept, read.template) == (
        expected.prompt,
        expected.completions,
        expected.fields,
        expected.template,
    )


PAIR = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": "do", "input": "it", "system": "s", **PAIR}, Row([SYSTEM, DO], ([A], [B]))),
        ({"prompt": "q", "system": "s", "history": HISTORY, **PAIR}, Row([SYSTEM, Q1, A1, Q], ([A], [B]))),
        ({"prompt": "q", "system": "s", "chosen": [Q, A], "rejected": [Q, B]}, Row([SYSTEM, Q], ([A], [B]))),
        (
            {"prompt": "q", "system": "s", "chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]},
            Row([SYSTEM, Q], ([A], [B])),
        ),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}, "system": "s"},
            Row([SYSTEM, Q], ([A], [B])),
        ),
        # ms-swift and axolotl.
        ({"messages": [SYSTEM, Q, A], "rejected_response": "b"}, Row([SYSTEM, Q], ([A], [B]))),
        ({"messages": [Q1, A1, Q, A], "rejected_response": "b", "system": "s"}, Row([SYSTEM, Q1, A1, Q], ([A], [B]))),
        ({"messages": [Q, A], "rejected_messages": [Q, B]}, Row([Q], ([A], [B]))),
        ({"prompt": "q", "response": "a", "rejected_response": "b"}, Row("q", ("a", "b"))),
        ({"instruction": "do", "chosen_response": "a", "rejected_response": "b"}, Row("do\n", ("a", "b"))),
        # Cells that were left empty.
        ({"prompt": "q", **PAIR, "margin": "", "system": ""}, Row("q", ("a", "b"))),
        ({"prompt": "q", **PAIR, "margin": "", "chosen_score": "3", "rejected_score": ""}, Row("q", ("a", "b"))),
    ],
)
def test_pairs_of_other_trainers(columns: dict[str, Any], expected: Row) -> None:
    read = preference(columns)
    assert (read.prompt, read.completions) == (expected.prompt, expected.completions)
    assert "margin" not in read.fields
    halves = unpaired(columns)
    assert [(half.prompt, half.completions, half.fields["label"]) for half in halves] == [
        (expected.prompt, (expected.completions[0],), True),
        (expected.prompt, (expected.completions[1],), False),
    ]


@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        ({"messages": [Q1, A1, Q, A]}, [Q1, A1, Q], [A]),
        ({"conversations": [HUMAN, GPT], "system": "s"}, [SYSTEM, Q], [A]),
        ({"prompt": "q", "messages": [Q, A]}, [Q], [A]),
        ({"instruction": "do", "input": "it", "output": "a"}, "do\nit\n", "a"),
        ({"instruction": "do", "input": "it", "output": "a", "system": "s"}, [SYSTEM, DO], [A]),
        ({"prompt": "q", "completion": "a", "history": HISTORY}, [Q1, A1, Q], [A]),
        ({"messages": [Q], "completion": "a"}, [Q], [A]),
        ({"prompt": "q", "response": "a", "chosen": None, "rejected": ""}, "q", "a"),
    ],
)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("verdict", [("true", True), ("undesirable", False), (0, False), (np.True_, True)])
def test_verdicts_of_other_trainers(
    columns: dict[str, Any], prompt: Any, completion: Any, column: str, verdict: tuple[Any, bool]
) -> None:
    [row] = unpaired({**columns, column: verdict[0]})
    assert (row.prompt, row.completions, row.fields["label"]) == (prompt, (completion,), verdict[1])
    assert "kto_tag" not in row.fields


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "q", "system": "s"}, [SYSTEM, Q]),
        ({"instruction": "do", "input": "it", "history": HISTORY}, [Q1, A1, DO]),
        ({"messages": [Q, A], "system": "s"}, [SYSTEM, Q]),
        ({"prompt": "", "messages": [Q]}, [Q]),
    ],
)
def test_prompts_of_other_trainers(columns: dict[str, Any], prompt: Any) -> None:
    row = prompt_only({**columns, "answer": 4})
    assert row == Row(prompt, (), {"answer": 4, "prompt": prompt})
    if columns.get("prompt"):
        steps = stepwise({**columns, "completions": '["x"]', "labels": '["true"]'})
        assert (steps.prompt, steps.completions, steps.fields["labels"]) == (prompt, ("x",), [1.0])


READERS = {
    "sft": (demonstration, {"prompt": "q", "completion": "a"}),
    "preference": (preference, {"prompt": "q", "chosen": "a", "rejected": "b"}),
    "unpaired": (unpaired, {"prompt": "q", "completion": "a", "label": True}),
    "stepwise": (stepwise, {"prompt": "q", "completions": ["a"], "labels": [1]}),
    "prompts": (prompt_only, {"prompt": "q"}),
}
IMAGE = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "cat.png"}}]


@pytest.mark.parametrize("contract", READERS)
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"images": ["cat.png"]}, "the row has 'images', and media are not supported: remove the row"),
        ({"image": {"path": "cat.png"}}, "the row has 'image', and media"),
        ({"videos": np.array(["cat.mp4"])}, "the row has 'videos', and media"),
        ({"audio": "miaow.wav"}, "the row has 'audio', and media"),
        (
            {"prompt": [{"role": "user", "content": IMAGE}]},
            "the content of message 1 of 'prompt' has a block of type 'image_url'",
        ),
        (
            {"prompt": [{"role": "user", "content": "q", "images": ["cat.png"]}]},
            "message 1 of 'prompt' has 'images', and media are not supported",
        ),
        ({"tools": "a calculator"}, "'tools' is str ('a calculator'), expected a list of functions"),
        (
            {"tools": "[{'name': 'add'}]"},
            "'tools' is \"[{'name': 'add'}]\", which is not JSON (Expecting property name",
        ),
        ({"tools": 3}, "'tools' is int (3), expected a list of functions"),
        ({"system": 3}, "'system' is int (3), expected a string, the system's message"),
        ({"system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' are two different system messages"),
        (
            {"prompt": [SYSTEM, Q], "system": "other"},
            "the row has two system messages, 'other' in a column and 's' in its messages: write one of them",
        ),
        ({"history": "yes"}, "'history' is str ('yes'), expected a list of earlier [question, answer] pairs"),
        ({"history": [["q1"]]}, "turn 1 of 'history' is ['q1'], expected a [question, answer] pair"),
        (
            {"prompt": "[{'role': 'user', 'content': 'q'}]"},
            "'prompt' is \"[{'role': 'user', 'content': 'q'}]\", messages as Python prints them",
        ),
        ({"prompt": [{**Q, "weight": 0.5}]}, "message 1 of 'prompt' has 'weight' 0.5, expected 0 or 1"),
        ({"prompt": [{**Q, "train_detail": [{"train": False}]}]}, "message 1 of 'prompt' has 'train_detail', and"),
        (
            {"prompt": [{**Q, "weight": 0, "train": True}]},
            "message 1 of 'prompt' is marked as learned by one of weight, tr",
        ),
        ({"chat_template_kwargs": "fast"}, "'chat_template_kwargs' is str ('fast'), expected a mapping"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_every_contract(contract: str, extra: dict[str, Any], message: str) -> None:
    read, columns = READERS[contract]
    assert complaint(read, {**columns, **extra}).startswith(message)


@pytest.mark.parametrize(
    ("read", "columns", "message"),
    [
        (demonstration, {"text": "t", "system": "s"}, "'system' is given without a prompt to put it in front of"),
        (preference, {"chosen": "x a", "rejected": "x b", "system": "s"}, "'system' is given without a prompt"),
        (demonstration, {"messages": [Q, A], "label": False}, "'label' is false, so the answer is not one to imitate"),
        (demonstration, {"messages": [Q, A], "kto_tag": "False"}, "'kto_tag' is false"),
        (
            demonstration,
            {"prompt": "q", "completion": "a", "response": "b"},
            "'completion' and 'response' are two diff",
        ),
        (
            unpaired,
            {"messages": [Q], "label": True},
            "a completion ends with a message of role 'user', expected 'assis",
        ),
        (unpaired, {"instruction": "q", "label": True}, "no column 'completion' (found: instruction, label)"),
        (unpaired, {"messages": [Q, A], "label": True, "kto_tag": False}, "'label' and 'kto_tag' disagree"),
        (preference, {"response": "a", "rejected_response": "b"}, "no column 'prompt' (found: response, rejected_res"),
        (demonstration, {"messages": [Q, {**A, "value": "b"}]}, "message 2 of 'messages' has both a value and a conte"),
        (demonstration, {"messages": [Q1, A1, Q, A], "history": HISTORY}, "'history' is given together with messages"),
    ],
)
def test_contradictions_are_refused(read: Callable[..., Any], columns: dict[str, Any], message: str) -> None:
    assert complaint(read, columns).startswith(message)


# Columns that are there twice.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "prompt,completion,prompt\na,b,c\n",
            "'a.csv' has two columns 'prompt': rename or delete one of them",
        ),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "a.jsonl:1: the key 'prompt' appears twice in one object"),
        ("a.jsonl", '{"x": [{"y": 1, "y": 1}]}\n', "a.jsonl:1: the key 'y' appears twice in one object"),
        ("a.json", '[{"x": 1}, {"x": {"y": 1, "y": 2}}]', "a.json:2: the key 'y' appears twice in one object"),
    ],
)
def test_a_column_that_is_there_twice_is_refused(
    name: str, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    assert complaint(lambda: list(open_source(name))).startswith(message)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        said = complaint(lambda name=name: list(open_source(str(tmp_path / name))))
        assert said.endswith("has two columns 'prompt': rename or delete one of them")


# Messages.


@pytest.mark.parametrize(
    ("key", "value", "learned"),
    [
        ("weight", 0, False),
        ("weight", 1, True),
        ("weight", 0.0, False),
        ("weight", None, True),
        ("train", False, False),
        ("training", True, True),
        ("loss", False, False),
        ("masked", True, False),
        ("masked", False, True),
    ],
)
@pytest.mark.parametrize("message", [A, GPT])
def test_weights_of_messages(message: dict[str, Any], key: str, value: Any, learned: bool) -> None:
    [read] = check_text([{**message, key: value}], "messages")
    assert read == (A if learned else {**A, "weight": 0})
    assert ChatTemplate(chars(KEYS)).render([read]) == "content,role"  # type: ignore[list-item]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": CALLS["add"]},
        {"role": "assistant", "tool_calls": json.dumps(CALLS["add"])},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": None}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_calls_are_read_the_same_way(message: dict[str, Any]) -> None:
    [read] = check_text([message], "messages")
    assert isinstance(read, dict)
    assert read["role"] == "assistant"
    assert not read.get("content")
    [call] = read["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 1}}
    for template in (JOINS, PRINTS, DUMPS):
        assert ChatTemplate(chars(template)).render([read]) == 'add{"a": 1}'


def test_calls_without_arguments_are_read_the_same_way() -> None:
    """Whichever row comes first says nothing about the ones after it."""
    calls = [
        {"function": {"name": "add", "arguments": arguments}} for arguments in ({}, {"a": 1}, {"b": None, "c": "x"})
    ]
    for template in (JOINS, PRINTS, DUMPS):
        renderer = ChatTemplate(chars(template))
        found = [renderer.render([{"role": "assistant", "content": "", "tool_calls": [call]}]) for call in calls]
        assert found == ["add{}", 'add{"a": 1}', 'add{"b": null, "c": "x"}']


def test_text_of_a_function_call_that_is_no_call_stays_text() -> None:
    assert check_text([{"from": "function_call", "value": "add(1)"}], "messages") == [
        {"role": "assistant", "content": "add(1)"}
    ]


@pytest.mark.parametrize(
    ("messages", "template", "text", "message"),
    [
        ([Q, A], {}, "u:q a:a", None),
        ([{"role": "user", "content": " a\nb "}], {}, "u:a b", None),
        ([{"role": "tool", "content": 'say "x"'}], {}, 't:"say \\"x\\""', None),
        ([{"role": "assistant", "content": "earlier reasoning"}], {}, "a:", None),
        ([Q], {"tools": [ADD]}, "T add u:q", None),
        ([SYSTEM, Q], {}, "u:q", "the chat template drops message 1, of role 'system'"),
        (
            [{"role": "observation", "content": "7"}],
            {},
            "u:",
            "the chat template drops message 1, of role 'observ",
        ),
        (
            [{"role": "assistant", "tool_calls": CALLS["say"]}],
            {},
            "a:",
            "the chat template drops the call of 'say' in message 1",
        ),
        ([Q], {"tools": [SAY]}, "u:q", "the chat template drops the tool 'say'"),
        ([Q], {"tools": [{"name": "add"}]}, "u:q", "the chat template drops the tool 'add'"),
    ],
)
def test_what_a_template_drops(messages: Any, template: Any, text: str, message: str | None) -> None:
    if message is None:
        check_rendered(messages, template, text)
    else:
        assert complaint(check_rendered, messages, template, text).startswith(message)


def test_tools_with_text() -> None:
    check_no_tools({"tools": []})
    assert complaint(check_no_tools, {"tools": [ADD]}).startswith("'tools' are given with a prompt that is text")


# Steps.


@pytest.mark.parametrize(
    ("separator", "steps"),
    [
        ("\n", ["ok\n", "so"]),
        ("\n", ["ok", "so\r\n"]),
        ("\n", ["ok\n\n", "so\n"]),
        ("; ", ["ok; ", "so"]),
        ("\n\n", ["ok\n", "so\n\n"]),
    ],
)
def test_steps_end_with_one_separator(separator: str, steps: list[str]) -> None:
    row = {"prompt": "q", "completions": steps, "labels": [1, 0]}
    [made] = StepwiseDataModule(tokenizer=chars(UNMARKED), step_separator=separator).make_examples("rows:1", row)
    [child] = made.root.children
    assert text_of(child.tokens) == f"ok{separator}so{separator}"
    assert child.weights is not None
    assert np.flatnonzero(child.weights).tolist() == [1 + len(separator), 3 + 2 * len(separator)]


def test_a_step_of_line_ends_alone_is_empty() -> None:
    row = {"prompt": "q", "completions": ["a", "\n"], "labels": [1, 0]}
    assert complaint(stepwise, row) == "step 2 of 'completions' is empty: remove it and its label"


# Pairs of rated rows.


def test_rated_rows_of_different_systems_are_no_pair() -> None:
    rows = [
        {"prompt": "q", "completion": "a", "good": 1, "system": "s"},
        {"prompt": "q", "completion": "b", "good": 2, "system": "s"},
        {"prompt": "q", "completion": "c", "good": 3, "system": "other"},
    ]
    data = PreferenceDataModule(train=rows, tokenizer=chars(UNMARKED), pair_by={"good": 1.0}, shuffle=False)
    [[pair]] = data.train_dataloader()
    assert pair.row_id == "memory:1+2"
    assert text_of(pair.root.tokens) == "s:s~\nu:q~\na:"
