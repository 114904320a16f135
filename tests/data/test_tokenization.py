"""Rows in normal form become exactly the tokens and weights that are expected, written out by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rlhf_lightning.data.formats import Row
from rlhf_lightning.data.tokenization import RowTokenizer, TooLongError, fit_to_length, longest
from rlhf_lightning.sequences.example import Example, Segment

from ..datamodules.toys import (
    BOS,
    ENDLESS,
    EOS,
    FORGETFUL,
    MARKED,
    STRICT,
    THINKING,
    UNMARKED,
    WORDS_MARKED,
    chars,
    complaint,
    ids,
    merging,
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def spelt(segment: Segment) -> tuple[str, str]:
    """A segment's text with ``~`` for the end of sequence, and its weights as digits (``-`` for none)."""
    text = "".join({EOS: "~", BOS: "^", 4: "\n"}.get(token, chr(token + 27)) for token in segment.tokens.tolist())
    weights = "-" if segment.weights is None else "".join(str(int(weight)) for weight in segment.weights)
    return text, weights


def test_the_toys_are_what_they_say() -> None:
    assert list(chars()("2+2=\n")["input_ids"]) == ids("2+2=\n") == [23, 16, 23, 34, 4]
    assert list(chars(opening=True)("a")["input_ids"]) == [BOS, *ids("a")]


@pytest.mark.parametrize(
    ("opening", "prompt", "completion", "expected"),
    [
        (False, "2+2=", "4", [("2+2=", "-"), ("4~", "11")]),
        (False, "", "4", [("^", "-"), ("4~", "11")]),
        (True, "2+2=", "4", [("^2+2=", "-"), ("4~", "11")]),
        (True, "<bos>2+2=", "4", [("^2+2=", "-"), ("4~", "11")]),
        (True, "", "4", [("^", "-"), ("4~", "11")]),
        (False, "2+2=", "4<eos>", [("2+2=", "-"), ("4~", "11")]),
        (False, "2+2=", "<eos>", [("2+2=", "-"), ("~", "1")]),
    ],
)
def test_strings(opening: bool, prompt: str, completion: str, expected: list[tuple[str, str]]) -> None:
    root = RowTokenizer(chars(opening=opening)).answers(Row(prompt, (completion,)))
    assert [spelt(root), *map(spelt, root.children)] == expected


def test_an_empty_prompt_is_the_end_of_sequence_token_where_there_is_no_beginning() -> None:
    root = RowTokenizer(chars(bos_token=None)).answers(Row("", ("4",)))
    assert spelt(root) == ("~", "-")


def test_the_prompt_is_scored_from_its_second_token_if_asked() -> None:
    root = RowTokenizer(chars(opening=True)).answers(Row("2+2=", ("4", "5")), prompt_loss=True)
    assert [spelt(root), *map(spelt, root.children)] == [("^2+2=", "01111"), ("4~", "11"), ("5~", "11")]


@pytest.mark.parametrize(("opening", "expected"), [(False, ("a b~", "0111")), (True, ("^a b~", "01111"))])
def test_a_text_scores_all_but_its_first_token(opening: bool, expected: tuple[str, str]) -> None:
    tokenizer = RowTokenizer(chars(opening=opening))
    assert spelt(tokenizer.whole(Row("a b"))) == expected
    assert spelt(tokenizer.whole(Row("a b<eos>"))) == expected


def test_prompt_and_completion_are_tokenised_apart() -> None:
    """A prompt that ends in a blank loses it to the completion when both are tokenised together: none of them match."""
    inner = merging()
    tokenizer = RowTokenizer(inner)
    joint_is_different = 0
    for number in range(10):
        prompt, completion = "sum: ", f"{number}"
        root = tokenizer.answers(Row(prompt, (completion,)))
        alone = list(inner(prompt)["input_ids"])
        assert root.tokens.tolist() == alone, "the prompt is what generation is given"
        assert root.children[0].tokens.tolist() == [*inner(completion)["input_ids"], 0]
        joint = list(inner(prompt + completion)["input_ids"])
        joint_is_different += joint[: len(alone)] != alone
    assert joint_is_different == 10
    assert [len(inner(text)["input_ids"]) for text in ("sum: ", "sum: 4", "4")] == [5, 5, 1]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, WORDS_MARKED])
def test_chat(template: str) -> None:
    line = "\n" if template is UNMARKED else ""
    tokenizer = RowTokenizer(chars(template, opening=True))
    root = tokenizer.answers(Row([user("2+2")], ([assistant("4")], [assistant("5")])))
    assert spelt(root) == (f"u:2+2~{line}a:", "-"), "the template writes what comes first, not the tokenizer"
    assert [spelt(child) for child in root.children] == [("4~", "11"), ("5~", "11")]


def test_chat_whose_template_knows_no_end_is_ended() -> None:
    root = RowTokenizer(chars(ENDLESS)).answers(Row([user("2+2")], ([assistant("4")],)))
    assert [spelt(root), spelt(root.children[0])] == [("u:2+2|a:", "-"), ("4|~", "111")]


def test_chat_without_a_prompt_starts_from_a_token_of_its_own() -> None:
    root = RowTokenizer(chars(UNMARKED)).answers(Row([], ([assistant("4")],)))
    assert [spelt(root), spelt(root.children[0])] == [("^", "-"), ("a:4~", "1111")]


def test_a_prompt_that_ends_with_the_assistant_is_continued() -> None:
    root = RowTokenizer(chars(UNMARKED)).answers(Row([user("2+2"), assistant("It")], ([assistant("4")],)))
    assert spelt(root) == ("u:2+2~\na:It", "-")


def test_a_chat_whose_joint_tokens_differ_from_the_prompts_is_tokenised_apart() -> None:
    inner = merging()
    inner.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    )
    root = RowTokenizer(inner).answers(Row([user("1")], ([assistant("4")],)))
    assert root.tokens.tolist() == list(inner("u: 1a: ")["input_ids"])
    assert root.children[0].tokens.tolist() == [*inner("4")["input_ids"], 0]


def test_an_answer_stands_after_the_generation_prompt_whatever_the_finished_conversation_looks_like() -> None:
    row = Row([user("1"), assistant("2"), user("3")], ([assistant("4")],))
    root = RowTokenizer(chars(FORGETFUL)).answers(row)
    assert [spelt(root), spelt(root.children[0])] == [("u:1~a:^~u:3~a:".replace("^", "~"), "-"), ("4~", "11")]
    with pytest.warns(UserWarning, match="opens '<think>', and answers do not close it"):
        root = RowTokenizer(chars(THINKING)).answers(row)
    assert [spelt(root), spelt(root.children[0])] == [("u:1~\na:2~\nu:3~\na:<think>", "-"), ("4~", "11")]


CONVERSATION = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3"), assistant("4")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, ("s:s~u:1~a:2~u:3~a:4~", "00000000001100000011")),
        (WORDS_MARKED, ("s:s~u:1~a:2~u:3~a:4~", "00000000001100000011")),
        (UNMARKED, ("s:s~\nu:1~\na:2~\nu:3~\na:4~", "000000000000110000000011")),
    ],
)
def test_a_conversation_scores_what_the_assistant_says(template: str, expected: tuple[str, str]) -> None:
    tokenizer = RowTokenizer(chars(template))
    assert spelt(tokenizer.whole(Row(CONVERSATION))) == expected
    # A question without an answer cannot change a loss, and is not computed.
    assert spelt(tokenizer.whole(Row([*CONVERSATION, user("5")]))) == expected


def test_each_turn_is_ended_where_the_template_knows_no_end() -> None:
    """The model has to end its first answer, too: that end is a leaf, since the conversation continues without it."""
    tokenizer = RowTokenizer(chars(ENDLESS))
    for messages in (CONVERSATION, [*CONVERSATION, user("5")]):
        root = tokenizer.whole(Row(messages))
        assert [spelt(root), *map(spelt, root.children)] == [
            ("s:s|u:1|a:2|", "000000000011"),
            ("~", "1"),
            ("u:3|a:4|~", "000000111"),
        ]
        assert [child.continued for child in root.children] == [True, False]


def test_a_conversation_scores_all_but_the_first_token_if_asked() -> None:
    tokenizer = RowTokenizer(chars(UNMARKED))
    assert spelt(tokenizer.whole(Row([user("1"), assistant("2")]), assistant_only=False)) == ("u:1~\na:2~", "011111111")


def test_a_conversation_that_begins_with_the_assistant_is_scored_from_its_second_token() -> None:
    assert spelt(RowTokenizer(chars(UNMARKED)).whole(Row([assistant("2")]))) == ("a:2~", "0111")


def test_a_completion_of_several_messages_scores_the_assistants() -> None:
    tool = {"role": "tool", "content": "7"}
    row = Row([user("1")], ([assistant("c"), tool, assistant("4")],))
    for template, text, weights in (
        (MARKED, "c~t:7~a:4~", "1100000011"),
        (UNMARKED, "c~\nt:7~\na:4~", "110000000011"),
    ):
        tokenizer = RowTokenizer(chars(template))
        assert spelt(tokenizer.answers(row).children[0]) == (text, weights)
        assert spelt(tokenizer.answers(row, assistant_only=False).children[0]) == (text, "1" * len(text))


def test_what_a_row_hands_to_the_template_arrives() -> None:
    template = UNMARKED.replace("{% for", "{{ mood }}{{ tools[0]['name'] if tools else '' }}{% for", 1)
    row = Row([user("1")], ([assistant("2")],), template={"mood": "glad", "tools": [{"name": "calc"}]})
    assert spelt(RowTokenizer(chars(template)).answers(row))[0] == "gladcalcu:1~\na:"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [user("1"), assistant("2")], "the row holds chat messages but the tokenizer has no chat template"),
        (STRICT, CONVERSATION, "the chat template refuses the row: no system here"),
        (MARKED, [user("1")], "no token to learn from: expected a message of role 'assistant'"),
    ],
)
def test_conversations_that_cannot_be_used(template: str | None, messages: list[Any], message: str) -> None:
    assert complaint(RowTokenizer(chars(template)).whole, Row(messages)).startswith(message)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    assert complaint(RowTokenizer, chars(eos_token=None)).startswith("the tokenizer has no end-of-sequence token: set")


def test_steps() -> None:
    root = RowTokenizer(chars()).steps(Row("1+2+3=?", ("1+2=3", "3+3=6")), "\n")
    assert [spelt(root), *map(spelt, root.children)] == [("1+2+3=?", "-"), ("1+2=3\n3+3=6\n", "000001000001")]


# Lengths.


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    children = tuple(Segment(np.array(ids(text)), np.ones(len(text))) for text in (chosen, rejected))
    return Example("rows:1", Segment(np.array(ids(prompt)), None, children))


@pytest.mark.parametrize(
    ("max_length", "policy", "expected"),
    [
        (8, "drop", ["1234", "ab~", "cdef"]),
        (7, "drop", None),
        (7, "truncate_start", ["234", "ab~", "cdef"]),
        (5, "truncate_start", ["4", "ab~", "cdef"]),
        (4, "truncate_start", None),
        (7, "truncate_end", ["1234", "ab~", "cde"]),
        (6, "truncate_end", ["1234", "ab", "cd"]),
        (5, "truncate_end", ["1234", "a", "c"]),
        (4, "truncate_end", None),
        (None, "drop", ["1234", "ab~", "cdef"]),
    ],
)
def test_pairs_are_brought_within_a_length(max_length: int | None, policy: Any, expected: list[str] | None) -> None:
    example = pair("1234", "ab~", "cdef")
    assert longest(example.root) == 8
    fitted, cut = fit_to_length(example, max_length, policy)
    assert cut == (expected is not None and max_length in (5, 6, 7))
    if expected is None:
        assert fitted is None
    else:
        assert fitted is not None
        assert [spelt(fitted.root)[0], *(spelt(child)[0] for child in fitted.root.children)] == expected
        assert fitted.row_id == "rows:1"


def test_a_pair_that_a_cut_makes_equal_is_dropped() -> None:
    assert fit_to_length(pair("12", "abc", "abd"), 4, "truncate_end") == (None, False)


def test_the_first_token_of_a_cut_prompt_is_not_scored() -> None:
    text = Example("rows:1", Segment(np.array(ids("abcd")), np.array([0, 1, 1, 1])))
    for policy, expected in (("truncate_start", ("bcd", "011")), ("truncate_end", ("abc", "011"))):
        fitted, cut = fit_to_length(text, 3, policy)  # type: ignore[arg-type]
        assert cut
        assert fitted is not None
        assert spelt(fitted.root) == expected


def test_what_a_cut_leaves_without_scored_tokens_is_dropped() -> None:
    late = Example("rows:1", Segment(np.array(ids("abcd")), np.array([0, 0, 0, 1])))
    assert fit_to_length(late, 3, "truncate_end") == (None, False)
    early = Example("rows:1", Segment(np.array(ids("abcd")), np.array([0, 1, 0, 0])))
    assert fit_to_length(early, 2, "truncate_start") == (None, False)


def test_prompts_alone_may_be_cut_though_nothing_of_them_is_scored() -> None:
    fitted, cut = fit_to_length(Example("rows:1", Segment(np.array(ids("abcd")))), 3, "truncate_start")
    assert cut
    assert fitted is not None
    assert spelt(fitted.root) == ("bcd", "-")


def test_too_long_can_be_an_error() -> None:
    message = "8 tokens, expected at most max_length=7: raise it, shorten the row or set on_too_long"
    with pytest.raises(TooLongError, match=re.escape(message)):
        fit_to_length(pair("1234", "ab~", "cdef"), 7, "error")


def test_a_cut_prompt_keeps_its_beginning_of_sequence_token() -> None:
    bos, wide = ids("^"), Example("rows:1", pair("^12345", "ab~", "cd~").root, {"n": 1})
    fitted, cut = fit_to_length(wide, 7, "truncate_start", bos)
    assert cut
    assert fitted is not None
    assert fitted.root.tokens.tolist() == ids("^345")
    assert fitted.fields == {"n": 1}
    assert fit_to_length(wide, 4, "truncate_start", bos) == (None, False), "of the prompt itself nothing would be left"
    # A text with another beginning has nothing to keep.
    fitted, _ = fit_to_length(pair("12345", "ab~", "cd~"), 7, "truncate_start", bos)
    assert fitted is not None
    assert fitted.root.tokens.tolist() == ids("2345")


def test_a_cut_text_keeps_its_beginning_of_sequence_token_and_its_weights() -> None:
    text = Example("rows:1", Segment(np.array(ids("^abcde")), np.array([0, 1, 0, 1, 1, 0])))
    fitted, _ = fit_to_length(text, 4, "truncate_start", ids("^"))
    assert fitted is not None
    assert fitted.root.tokens.tolist() == ids("^cde")
    assert fitted.root.weights is not None
    assert fitted.root.weights.tolist() == [0, 1, 1, 0]


def test_the_last_turn_of_a_completion_may_be_the_only_one_to_learn() -> None:
    row = Row([user("1+1?")], ([assistant("2"), user("2+2?"), assistant("4")],))
    rows = RowTokenizer(chars(UNMARKED))
    first, last = rows.answers(row), rows.answers(row, turns="last")

    def learnt(segment: Segment) -> str:
        text, weights = spelt(segment)
        here = "".join(c for c, w in zip(text, weights, strict=False) if w == "1")
        return here + "".join(learnt(child) for child in segment.children)

    assert (learnt(first), learnt(last)) == ("2~4~", "4~")
    # With the prompt, the first answer is still not learnt.
    prompt, _ = spelt(Segment(np.asarray(rows.prompt(row))))
    assert learnt(rows.answers(row, turns="last", prompt_loss=True)) == prompt[1:] + "4~"
