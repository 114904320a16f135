"""Copying: rows are functions of their keys, splits are apart, and only the same text is right."""

from __future__ import annotations

import pytest

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.data.tasks.sums import split_of
from rlhf_lightning.rewards import exact_text


@pytest.mark.parametrize(("symbols", "alphabet"), [("letters", str.isalpha), ("digits", str.isdigit)])
def test_rows_have_the_asked_length(symbols: str, alphabet: object) -> None:
    rows = open_task(f"copying:prompts?rows=40&length=12&symbols={symbols}&split=test")
    assert callable(alphabet)
    assert all(len(row["answer"]) == 12 and alphabet(row["answer"]) for row in rows)
    assert all(row["prompt"] == f"Copy: {row['answer']}=" and split_of(row["prompt"]) == "test" for row in rows)
    assert len({row["answer"] for row in rows}) == 40
    assert rows[:7] == open_task(f"copying:prompts?rows=7&length=12&symbols={symbols}&split=test")


def test_words_and_demonstrations() -> None:
    rows = open_task("copying:demonstrations?rows=5&length=6&symbols=words")
    assert all(len(row["answer"].split(" ")) == 6 and row["completion"] == row["answer"] for row in rows)
    given = [row["answer"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert exact_text(prompts, [f" {text}\n" for text in given], answer=given) == [1.0] * 5
    assert exact_text(prompts, [text.upper() for text in given], answer=given) == [0.0] * 5
    assert exact_text(prompts[:1], given[:1], answer=[None]) == [None]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("copying:preference", "allowed are demonstrations, prompts"),
        ("copying:prompts?length=0", "length=0"),
        ("copying:prompts?symbols=runes", "symbols=runes"),
        ("copying:prompts?split=validation&length=1&symbols=digits", "empty for length=1"),
    ],
)
def test_bad_keys(source: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        open_task(source)
