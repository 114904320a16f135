"""On every template and contract, what is trained is what the assistant is to write where it is to write it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from rlhf_lightning.datamodules import (
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    UnpairedDataModule,
)
from rlhf_lightning.sequences import Example, pack
from tests.templates import FAMILIES, family_tokenizer, spell

Message = dict[str, Any]
EVERY = pytest.mark.parametrize("name", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore:the chat template's generation prompt opens")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **rest: Any) -> Message:
    return {"role": "assistant", "content": content, **rest}


def context(name: str, messages: list[Message], **settings: Any) -> str:
    """Returns the prompt of generation, rendered by transformers itself."""
    if name == "blocks":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    tokenizer = family_tokenizer(name)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings))


def learnt(name: str, example: Example) -> list[list[tuple[str, str]]]:
    """Per sequence, what is scored after which context, as the packed batch has it: each run of scored tokens."""
    tokenizer, batch = family_tokenizer(name), pack([example])
    paths = batch.path_index.split(batch.lengths.tolist())
    found: list[list[tuple[str, str]]] = [[] for _ in range(batch.num_sequences)]
    for number, flat in enumerate(paths):
        tokens = batch.input_ids[flat].tolist()
        own = batch.source_path == number
        places = (batch.source_depth[own] + 1).tolist()
        assert [tokens[place] for place in places] == batch.target_ids[own].tolist()
        runs = np.split(places, [n for n in range(1, len(places)) if places[n] != places[n - 1] + 1])
        sequence = int(batch.path_sequence[number])
        found[sequence] += [
            (spell(tokenizer, tokens[: run[0]]), spell(tokenizer, tokens[run[0] : run[-1] + 1]))
            for run in runs
            if len(run)
        ]
    return found


def examples(cls: Any, name: str, rows: list[dict[str, Any]], **options: Any) -> list[Example]:
    data = cls(train=rows, tokenizer=family_tokenizer(name), shuffle=False, **options)
    data.setup("fit")
    return [example for batch in data.train_dataloader() for example in batch]


CHAT = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6!"), user("5+5?"), assistant("10")]


def turns(name: str, messages: list[Message], start: int = 0, **settings: Any) -> list[tuple[str, str]]:
    answer = FAMILIES[name].answer
    return [
        (context(name, messages[:n], **settings), answer.format(messages[n]["content"]))
        for n in range(start, len(messages))
        if messages[n]["role"] == "assistant"
    ]


@EVERY
def test_conversations(name: str) -> None:
    with_system = [{"role": "system", "content": "Be brief."}, *CHAT]
    rows = [{"messages": CHAT}, {"messages": with_system}]
    made = examples(SFTDataModule, name, rows)
    for example, messages in zip(made, (CHAT, with_system), strict=True):
        (found,) = learnt(name, example)
        assert sorted(found) == sorted(turns(name, messages))
        # Each token of each turn counts once.
        assert sum(map(len, example.weights_per_sequence())) == sum(
            len(family_tokenizer(name)(answer, add_special_tokens=False)["input_ids"]) for _, answer in found
        )


@EVERY
def test_the_last_turn_alone(name: str) -> None:
    (example,) = examples(SFTDataModule, name, [{"messages": CHAT}], turns="last")
    assert learnt(name, example) == [turns(name, CHAT)[-1:]]


@EVERY
def test_prompts_with_completions_of_one_turn_and_of_several(name: str) -> None:
    for start in (1, 3):
        row = {"prompt": CHAT[:start], "completion": CHAT[start:]}
        (example,) = examples(SFTDataModule, name, [row])
        (found,) = learnt(name, example)
        assert sorted(found) == sorted(turns(name, CHAT, start))


@EVERY
def test_pairs_and_labelled_answers_of_several_turns(name: str) -> None:
    chosen, rejected = CHAT[3:], [assistant("7"), user("Really?"), assistant("Yes.")]
    pair = {"prompt": CHAT[:3], "chosen": chosen, "rejected": rejected}
    expected = [turns(name, CHAT[:3] + answer, 3) for answer in (chosen, rejected)]
    (example,) = examples(PreferenceDataModule, name, [pair])
    assert [sorted(found) for found in learnt(name, example)] == list(map(sorted, expected))
    split = examples(UnpairedDataModule, name, [pair], partners=False)
    assert [sorted(found) for e in split for found in learnt(name, e)] == list(map(sorted, expected))


@EVERY
def test_prompts_and_steps_begin_where_an_answer_begins(name: str) -> None:
    tokenizer = family_tokenizer(name)
    (prompt,) = examples(PromptDataModule, name, [{"prompt": CHAT[:3]}])
    (steps,) = examples(StepwiseDataModule, name, [{"prompt": CHAT[:3], "completions": ["a", "b"], "labels": [1, 0]}])
    for example in (prompt, steps):
        assert spell(tokenizer, example.root.tokens.tolist()) == context(name, CHAT[:3])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reasoned])
@pytest.mark.parametrize("apart", [False, True], ids=["in the content", "apart"])
def test_reasoning_is_learnt_in_its_own_turn_and_gone_from_later_ones(name: str, apart: bool) -> None:
    family = FAMILIES[name]
    assert family.reasoned is not None
    if apart and name != "qwen3":
        pytest.skip("the template reads reasoning from the content")

    def thoughtful(thought: str, content: str) -> Message:
        return (
            assistant(content, reasoning_content=thought) if apart else assistant(f"<think>{thought}</think>{content}")
        )

    chat = [user("2+2?"), thoughtful("easy", "4"), user("3+3?"), thoughtful("hm", "6")]
    (example,) = examples(SFTDataModule, name, [{"messages": chat}])
    (found,) = learnt(name, example)
    expected = [
        (context(name, chat[:n]), family.reasoned.format(thought, content))
        for n, thought, content in ((1, "easy", "4"), (3, "hm", "6"))
    ]
    if name == "nemotron":  # whose template shows the tag as it was written
        expected = [(before, answer) for before, answer in expected]
    assert sorted(found) == sorted(expected)
    assert "easy" not in expected[1][0]


def test_a_prefix_preserving_template_gives_the_one_sequence_of_the_whole_rendering() -> None:
    tokenizer = family_tokenizer("chatml")
    (example,) = examples(SFTDataModule, "chatml", [{"messages": CHAT}])
    whole = str(tokenizer.apply_chat_template(CHAT, tokenize=False)).removesuffix("\n")
    assert spell(tokenizer, example.root.tokens.tolist()) == whole
    assert not example.root.children


def test_paths_share_their_longest_common_prefix() -> None:
    """The computed tokens are the distinct ones of the turns' paths, counted here by a set of prefixes."""
    for name in ("qwen3", "channels", "r1", "phi3"):
        (example,) = examples(SFTDataModule, name, [{"messages": CHAT}])
        tokens = [
            tuple(token for segment in path for token in segment.tokens.tolist()) for path in example.root.paths()
        ]
        assert example.root.num_tokens == len({path[:n] for path in tokens for n in range(1, len(path) + 1)})
        assert pack([example]).num_tokens == example.root.num_tokens


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("name", "calling", "final"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>', "It is 7.<|im_end|>"),
        (
            "qwen3",
            "<think>\nlook\n</think>\n\n<tool_call>f</tool_call><|im_end|>",
            "<think>\n\n</think>\n\nIt is 7.<|im_end|>",
        ),
        (
            "channels",
            "<|channel|>analysis<|message|>look<|end|><|start|>assistant to=f<|channel|>commentary<|message|>"
            '{"x": 1}<|call|>',
            "<|channel|>final<|message|>It is 7.<|return|>",
        ),
    ],
)
def test_calls_of_tools_and_answers_after_their_results(name: str, calling: str, final: str) -> None:
    thought = {} if name == "hermes" else {"reasoning_content": "look"}
    chat = [
        user("f?"),
        assistant("", tool_calls=[CALL], **thought),
        {"role": "tool", "content": "7"},
        assistant("It is 7."),
    ]
    aliased = [{**m, "thinking": "look"} if m.get("tool_calls") and thought else m for m in chat]
    (example,) = examples(SFTDataModule, name, [{"messages": chat, "tools": TOOLS}])
    (found,) = learnt(name, example)
    expected = [(context(name, aliased[:1], tools=TOOLS), calling), (context(name, aliased[:3], tools=TOOLS), final)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_settings_of_the_template_reach_every_contract_and_a_rows_own_win(name: str) -> None:
    settings = FAMILIES[name].settings
    own = {key: not value if isinstance(value, bool) else "1 Jan 2000" for key, value in settings.items()}
    question, answer = CHAT[:1], CHAT[1:2]
    contracts: list[tuple[Any, dict[str, Any]]] = [
        (SFTDataModule, {"messages": [*question, *answer]}),
        (SFTDataModule, {"prompt": question, "completion": answer}),
        (PreferenceDataModule, {"prompt": question, "chosen": answer, "rejected": [assistant("5")]}),
        (UnpairedDataModule, {"prompt": question, "completion": answer, "label": True}),
        (StepwiseDataModule, {"prompt": question, "completions": ["4"], "labels": [1]}),
        (PromptDataModule, {"prompt": question}),
    ]
    for cls, row in contracts:
        for given, effective in (({}, settings), ({"chat_template_kwargs": own}, own)):
            (example,) = examples(cls, name, [row | given], chat_template_kwargs=settings)
            text = spell(family_tokenizer(name), next(example.root.paths())[0].tokens.tolist())
            assert text.startswith(context(name, question, **effective)), cls
            if cls is PromptDataModule:
                assert example.fields["chat_template_kwargs"] == effective


@EVERY
def test_a_begun_answer_continues(name: str) -> None:
    if name == "qwen3":
        pytest.skip("tested below: the template shows an empty reasoning before it")
    answer = FAMILIES[name].answer.format("It is 4.")
    head = answer.partition("It is")[0]
    prompt = [user("2+2?"), assistant("It is")]
    # The words stand where the finished turn has them, and so does what follows them.
    finished = context(name, prompt[:1]).replace("<think>\n", "") + head + "It is"
    for row in ({"prompt": prompt, "completion": " 4."}, {"prompt": prompt, "completion": [assistant(" 4.")]}):
        (example,) = examples(SFTDataModule, name, [row])
        assert learnt(name, example) == [[(finished, answer.partition("It is")[2])]]
    (example,) = examples(PromptDataModule, name, [{"prompt": prompt}])
    assert spell(family_tokenizer(name), example.root.tokens.tolist()) == finished


def test_a_begun_answer_continues_after_an_empty_reasoning() -> None:
    row = {"prompt": [user("2+2?"), assistant("It is")], "completion": " 4."}
    (example,) = examples(SFTDataModule, "qwen3", [row])
    before = context("qwen3", [user("2+2?")]) + "<think>\n\n</think>\n\nIt is"
    assert learnt("qwen3", example) == [[(before, " 4.<|im_end|>")]]


def test_begun_reasoning_that_no_rendering_shows_continues_where_it_would_be_generated() -> None:
    row = {"prompt": [user("2+2?"), assistant("<think>\nsum</think>It is")], "completion": " 4."}
    (example,) = examples(SFTDataModule, "r1", [row])
    assert learnt("r1", example) == [[("<bos><|User|>2+2?<|Assistant|><think>\nsum</think>It is", " 4.<eos>")]]


@EVERY
def test_a_message_of_weight_0_is_context(name: str) -> None:
    chat = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:4]]
    (example,) = examples(SFTDataModule, name, [{"messages": chat}])
    assert learnt(name, example) == [turns(name, CHAT[:4])[1:]]


def test_answers_after_an_open_tag_are_named_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples(SFTDataModule, "r1", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    said = [str(w.message) for w in caught if "answers do not close it" in str(w.message)]
    assert len(said) == 1
    assert "'<think>'" in said[0]
    assert "'</think>'" in said[0]
