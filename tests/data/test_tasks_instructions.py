"""Constraints by examples of each kind; generated instructions can be kept, and broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.data.tasks.constraints import CONSTRAINTS, kept, read_constraints
from rlhf_lightning.data.tasks.sums import split_of
from rlhf_lightning.rewards import InstructionReward

# A value of each kind, texts that keep it, and texts that do not.
KINDS: dict[str, tuple[Any, list[str], list[str]]] = {
    "words_at_most": (3, ["a b c", "", " a-b c, d "], ["a b c d"]),
    "words_at_least": (3, ["a b c", "a b c d"], ["a b"]),
    "sentences": (2, ["One. Two!", 'So 3.5 it is... "Yes?"', "(One.) Two."], ["One.", "One. Two. Three.", "no stop"]),
    "lines": (2, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
    "paragraphs": (2, ["a\nb\n\nc", "a\n \n\nb"], ["a\nb", "a\n\nb\n\nc"]),
    "bullets": (2, ["- a\n- b", "list:\n- a\n- b\nend"], ["- a", "-a\n-b", "a - b\n- c"]),
    "json_keys": (["b", "a"], ['{"a": 1, "b": [2]}'], ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', "{"]),
    "contains": ("Sea", ["by the sea.", "SEA"], ["seaside", "over-seas"]),
    "avoids": ("sea", ["seaside"], ["By the Sea"]),
    "times": (["sea", 2], ["Sea, sea and seas"], ["sea", "sea sea sea"]),
    "begins_with": ("Dear Ann", ["dear ann, hello"], ["My dear Ann"]),
    "ends_with": ("The end.", ["So it was. the END."], ["The end. Or not", "The end"]),
    "quoted": (True, ['"a"', '""'], ['"', "a", '"a" b']),
    "lower_case": (True, ["all low, 1"], ["No", "123"]),
    "upper_case": (True, ["ALL, 1"], ["nO", ""]),
    "no_commas": (True, ["a; b"], ["a, b"]),
}  # fmt: skip


def test_every_kind_has_examples() -> None:
    assert set(KINDS) == set(CONSTRAINTS)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_keep_a_constraint_and_texts_that_do_not(kind: str) -> None:
    value, good, bad = KINDS[kind]
    (constraint,) = read_constraints({kind: value})
    assert [kept(text, [constraint]) for text in good] == [[True]] * len(good)
    assert [kept(text, [constraint]) for text in bad] == [[False]] * len(bad)


def answer(given: dict[str, Any]) -> str:
    """Writes a text that keeps the constraints."""
    if "json_keys" in given:
        return json.dumps(dict.fromkeys(given["json_keys"], 1))
    layout = next((kind for kind in ("lines", "paragraphs", "bullets") if kind in given), "lines")
    parts = given.get(layout, 1)
    sentences = given.get("sentences", max(parts, 4))
    word, times = given.get("times", [given.get("contains", "lorem"), 1])
    words = [*[word] * times, *["ipsum"] * (given.get("words_at_least", 12) - times)]
    texts = [" ".join(words[n::sentences]) + "." for n in range(sentences)]
    if "ends_with" in given:
        texts[-1] = given["ends_with"]
        texts[0] = " ".join(words) + "."
        texts[1:-1] = ["ipsum."] * (sentences - 2)
    blocks = [*texts[: parts - 1], " ".join(texts[parts - 1 :])]
    begin = given.get("begins_with", "")
    if layout == "bullets":
        text = "\n".join([*([begin] if begin else []), *(f"- {block}" for block in blocks)])
    else:
        text = f"{begin} " * bool(begin) + ("\n\n" if layout == "paragraphs" else "\n").join(blocks)
    text = text.lower() if "lower_case" in given else text.upper() if "upper_case" in given else text
    # A bullet point begins a line.
    mark = '"\n' if layout == "bullets" else '"'
    return f'{mark}{text}"' if "quoted" in given else text


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_constraints_of_a_prompt_can_be_kept(count: int) -> None:
    rows = open_task(f"instructions:prompts?rows=150&constraints={count}&split=test")
    given = [{kind: value for part in row["constraints"] for kind, value in part.items()} for row in rows]
    texts = [answer(constraints) for constraints in given]
    prompts, constraints = [row["prompt"] for row in rows], [row["constraints"] for row in rows]
    scores = InstructionReward()(prompts, texts, constraints=constraints)
    assert [(text, of) for text, of, score in zip(texts, given, scores, strict=True) if score != 1] == []
    assert all(len(of) == count for of in given)
    assert {split_of(prompt) for prompt in prompts} == {"test"}
    assert {kind for of in given for kind in of} == set(CONSTRAINTS) - ({"json_keys"} if count > 1 else set())
    shares = InstructionReward("share")(prompts, ["A text, which keeps little"] * 150, constraints=constraints)
    expected = [sum(kept("A text, which keeps little", list(of.items()))) / count for of in given]
    assert shares == expected
    assert min(shares) == 0


def test_rows_are_a_function_of_keys_and_number() -> None:
    more, fewer = (open_task(f"instructions:prompts?rows={n}&constraints=2&seed=3") for n in (20, 5))
    assert more[:5] == fewer
    assert open_task("instructions:prompts?rows=5&constraints=2&seed=4") != fewer
    rows = open_task("instructions:prompts?rows=30&kinds=lines,bullets")
    assert {row["kind"] for row in rows} == {"lines", "bullets"}
    assert all(str(value) in row["prompt"] for row in rows for part in row["constraints"] for value in part.values())


def test_rows_without_constraints_have_no_verdict() -> None:
    assert InstructionReward()(["p"] * 3, ["a"] * 3, constraints=[None, [], [{"lines": 1, "quoted": None}]]) == [
        None,
        None,
        1.0,
    ]


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (
            lambda: read_constraints([{"word_at_most": 3}]),
            "no constraint 'word_at_most': the kinds are words_at",
        ),
        (lambda: read_constraints({"lines": 0}), "constraint lines is 0; it must be a number from 1"),
        (lambda: read_constraints({"lines": True}), "constraint lines is True"),
        (lambda: read_constraints({"quoted": 1}), "constraint quoted is 1; it must be true"),
        (lambda: read_constraints({"times": ["sea"]}), "constraint times is"),
        (lambda: read_constraints({"json_keys": "name"}), "a list of names"),
        (lambda: read_constraints("lines"), "constraints is 'lines'"),
        (lambda: InstructionReward("any"), "count is 'any'"),  # type: ignore[arg-type]
        (lambda: InstructionReward()(["p"], ["a"]), "needs the column 'constraints'"),
        (lambda: open_task("instructions:prompts?kinds=line"), "kinds=line"),
        (lambda: open_task("instructions:prompts?kinds=lines&constraints=2"), "at most 1 for these kinds"),
        (lambda: open_task("instructions:demonstrations"), "allowed is prompts"),
    ],
)
def test_bad_input(run: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        run()
