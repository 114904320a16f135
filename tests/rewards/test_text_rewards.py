"""Format, length, repetition and principles, against the papers' formulas and hand-counted examples."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_lightning.evaluation.win_rate import _filled
from rlhf_lightning.inference import text_terms
from rlhf_lightning.rewards import (
    ConstitutionReward,
    FormatReward,
    InstructionReward,
    LengthReward,
    Principle,
    RepetitionReward,
    SoftOverlongReward,
    exact_text,
)
from rlhf_lightning.rewards.constitution import ask


class TestFormat:
    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("<think>a</think>b", 1.0),
            ("<think>a\nb</think>\nc\n", 1.0),
            ("<think></think>b", 1.0),
            ("b", 0.0),
            ("<think>a</think>", 0.0),
            ("x<think>a</think>b", 0.0),
            ("<think>a<think>b</think>c", 0.0),
            ("<think>a</think>b<think>c</think>d", 0.0),
            ("<think>a</think>b</think>c", 0.0),
            ("<think>a", 0.0),
        ],
    )
    def test_one_block_of_thoughts_and_an_answer(self, text: str, want: float) -> None:
        assert FormatReward()(["p"], [text]) == [want]

    def test_own_pattern_must_match_as_a_whole(self) -> None:
        reward = FormatReward(r".*#-?\d+", matched=0.5, unmatched=-0.5)
        assert reward(["p"] * 3, ["1+2=3\n#3", "#3 ", "#-12"]) == [0.5, -0.5, 0.5]

    def test_refuses_what_is_no_expression(self) -> None:
        with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
            FormatReward("(")

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("a\nb\n<answer>3</answer>", 1.0),
            ("<think>\na\n</think>\nb\n<answer>3</answer>", 1.0),
            ("a\n<answer>3</answer>", 0.0),
            ("a\n<think>\n \n</think>\n<answer>3</answer>", 0.0),
            ("a\nb\nc", 0.0),
            ("a\nb\n</answer>3<answer>", 0.0),
            ("a\nb\n<answer>3", 0.0),
            ("a\n<answer>3</answer>\n<answer>3</answer>", 0.0),
            ("a\nb\n<answer>3</answer></tool>", 0.0),
            ("a\nb\n<answer><tool>3</answer>", 0.0),
            ("a\nb\n<answer>3</answer><tools>", 1.0),
            ("a < b\nc > d\n<answer>3</answer>", 1.0),
        ],
    )
    def test_tags_and_steps(self, text: str, want: float) -> None:
        reward = FormatReward(required=["answer"], forbidden=["tool"], min_steps=3)
        assert reward(["p"], [text]) == [want]

    def test_tags_and_steps_come_on_top_of_a_pattern(self) -> None:
        reward = FormatReward(r".*#\d+", required=["a"], min_steps=1)
        assert reward(["p"] * 3, ["<a>1</a>#2", "<a>1</a>", "1#2"]) == [1.0, 0.0, 0.0]
        assert FormatReward(forbidden=["a"])(["p"] * 3, ["", "x", "</a>"]) == [1.0, 1.0, 0.0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"required": ["<a>"]}, "required has '<a>': write the name of a tag without brackets"),
            ({"forbidden": [""]}, "forbidden has '': write the name"),
            ({"required": "answer"}, r"required is 'answer': write a list of names, such as \['answer'\]"),
            ({"required": ["a"], "forbidden": ["b", "a"]}, "the tag 'a' is required and forbidden"),
            ({"min_steps": -1}, "min_steps is -1; it must be a whole number of at least 0"),
            ({"min_steps": True}, "min_steps is True; it must be"),
        ],
    )
    def test_refuses_other_tags_and_steps(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FormatReward(**options)


class TestSoftOverlong:
    @pytest.mark.parametrize("length", [0, 1, 79, 80, 81, 90, 99, 100, 101, 500])
    def test_equation_13(self, length: int) -> None:
        maximum, cache = 100, 20
        if length <= maximum - cache:
            want = 0.0
        elif length <= maximum:
            want = ((maximum - cache) - length) / cache
        else:
            want = -1.0
        reward = SoftOverlongReward(max_length=maximum, buffer=cache)
        assert reward(["p"], ["ignored"], completion_ids=[[7] * length]) == [want]

    def test_refusals(self) -> None:
        for buffer in (0, 11):
            with pytest.raises(ValueError, match=rf"buffer={buffer} is outside 1 to max_length=10"):
                SoftOverlongReward(max_length=10, buffer=buffer)
        with pytest.raises(ValueError, match="unknown unit 'bytes': use one of tokens, words, characters"):
            SoftOverlongReward(10, 5, unit="bytes")  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match="SoftOverlongReward needs the column 'completion_ids': the rows have none"
        ):
            SoftOverlongReward(10, 5)(["p"], ["a"])


class TestLength:
    def test_both_modes_in_all_units(self) -> None:
        texts, ids = ["ab cd", "a b c d"], [[1], [1, 2, 3, 4, 5, 6]]
        for unit, lengths in (("characters", (5, 7)), ("words", (2, 4)), ("tokens", (1, 6))):
            exact = LengthReward(target=3, coef=0.25, unit=unit)(["p"] * 2, texts, completion_ids=ids)
            assert exact == [-0.25 * abs(length - 3) for length in lengths]
            upper = LengthReward(target=3, coef=0.25, unit=unit, mode="at_most")(["p"] * 2, texts, completion_ids=ids)
            assert upper == [-0.25 * max(length - 3, 0) for length in lengths]

    def test_a_target_for_each_row(self) -> None:
        reward = LengthReward(target_column="budget", coef=1.0, unit="words")
        assert reward(["p"] * 3, ["a", "a b", "a"], budget=[3, 1, None]) == [-2.0, -1.0, None]
        assert reward.required_columns == ("budget",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "target=None and target_column=None: give exactly one"),
            ({"target": 3, "target_column": "x"}, "target=3 and target_column='x': give exactly one"),
            ({"target": -1}, "target=-1 is below 0"),
            ({"target": 1, "coef": -1.0}, "coef=-1.0 is below 0"),
            ({"target": 1, "mode": "max"}, "unknown mode 'max'"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LengthReward(**options)


class TestRepetition:
    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_against_counting(self, size: int) -> None:
        tokens = [1, 2, 3, 1, 2, 3, 1, 2, 4, 4, 4, 4]
        seen: list[list[int]] = []
        repeated = 0
        for start in range(len(tokens) - size + 1):
            ngram = tokens[start : start + size]
            repeated += ngram in seen
            seen.append(ngram)
        got = RepetitionReward(ngram_size=size, penalty=2.0)(["p"], ["x"], completion_ids=[tokens])
        assert got == [pytest.approx(-2.0 * repeated / len(seen))]

    def test_ends(self) -> None:
        reward = RepetitionReward(ngram_size=3, unit="words")
        texts = ["", "a b", "a b c", " ".join("a" * 1000)]
        got = reward(["p"] * 4, texts)
        assert got == [0.0, 0.0, 0.0, pytest.approx(-997 / 998)]
        assert [math.copysign(1, value) for value in got[:3]] == [1.0, 1.0, 1.0]

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="ngram_size=0 is below 1"):
            RepetitionReward(ngram_size=0)
        with pytest.raises(ValueError, match=r"penalty=-1\.0 is below 0"):
            RepetitionReward(penalty=-1.0)


def mentions_prompt(prompt: str, completion: str) -> bool | None:
    """A predicate with a dotted path; does not apply to an empty prompt."""
    return prompt in completion if prompt else None


class TestConstitution:
    def test_weighted_share_of_the_principles_that_apply(self) -> None:
        reward = ConstitutionReward(
            [
                Principle("polite", weight=2.0, require=r"(?i)\bplease\b"),
                Principle("no shouting", weight=1.0, forbid=r"[A-Z]{3}"),
                Principle("on topic", weight=5.0, predicate=f"{__name__}.mentions_prompt"),
                Principle("half", weight=8.0, predicate=lambda prompt, completion: 0.5),
            ]
        )
        prompts = ["tea", "tea", "", "tea"]
        completions = ["Please have tea", "TEA", "please", "please"]
        assert reward(prompts, completions) == [
            pytest.approx((2 + 1 + 5 + 4) / 16),
            pytest.approx((0 + 0 + 0 + 4) / 16),
            pytest.approx((2 + 1 + 4) / 11),
            pytest.approx((2 + 1 + 0 + 4) / 16),
        ]

    def test_unscorable_where_nothing_applies(self) -> None:
        reward = ConstitutionReward([Principle("on topic", predicate=mentions_prompt)])
        assert reward(["", "a"], ["x", "abc"]) == [None, 1.0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "principle 'p' has no check: give exactly one of require, forbid, predicate, statement"),
            ({"require": "a", "forbid": "b"}, "principle 'p' has require and forbid: give exactly one"),
            ({"require": "("}, r"principle 'p': '\(' is not a regular expression"),
            ({"require": "a", "weight": 0.0}, "principle 'p' has the weight 0.0"),
            ({"predicate": "nowhere.at.all"}, "cannot import 'nowhere.at.all'"),
            ({"predicate": "math.shout"}, "module 'math' has nothing called 'shout'"),
            ({"predicate": "shout"}, "'shout' is not a dotted path: write package.module.name"),
            ({"predicate": "math.pi"}, "principle 'p': 'math.pi' is not a function"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ConstitutionReward([Principle("p", **options)])

    def test_refused_lists_and_verdicts(self) -> None:
        with pytest.raises(ValueError, match="principles is empty"):
            ConstitutionReward([])
        with pytest.raises(ValueError, match="two principles are called 'a'"):
            ConstitutionReward([Principle("a", require="x"), Principle("a", require="y")])
        [verdict] = ConstitutionReward([Principle("a", predicate=lambda prompt, completion: 7)])(["p"], ["c"])
        assert str(verdict) == "principle 'a' returned 7: return a number from 0 to 1"


def test_cells_of_tables_are_read_as_what_they_say() -> None:
    nan = float("nan")
    assert exact_text(["p"] * 4, ["42", "41", "", ""], answer=[42, 42, nan, None]) == [1.0, 0.0, None, None]
    reward = LengthReward(target_column="budget", coef=1.0, unit="words")
    assert reward(["p"] * 4, ["one two"] * 4, budget=["3", 1.0, nan, ""]) == [-1.0, -1.0, None, None]
    assert InstructionReward()(["p"], ["a"], constraints=[nan]) == [None]


def test_a_judge_reads_the_calls_of_a_prompt() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    prompt = [
        {"role": "user", "content": "2+2=?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": "so", "tool_calls": [call]},
        {"role": "assistant", "content": ""},
    ]
    written = 'user: 2+2=?\nassistant: {"name": "add", "arguments": {"a": 2}}\n'
    written += 'assistant: so {"name": "add", "arguments": {"a": 2}}\nassistant: '
    assert ask("{prompt}|{completion}|{statement}", prompt, "4", "s") == f"{written}|4|s"
    assert text_terms._written(prompt) == _filled("{prompt}", prompt, "", "") == written
