"""Pairs: chosen and rejected after their prompt."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.sequences.example import Example

from .toys import UNMARKED, chars, complaint, ids

Q = {"role": "user", "content": "1"}


def made(columns: dict[str, Any]) -> Example:
    [example] = PreferenceDataModule(tokenizer=chars(UNMARKED)).make_examples("rows:1", columns)
    return example


@pytest.mark.parametrize(
    ("columns", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "1=", "chosen": "1", "rejected": "23"}, "1=", "1~", "23~"),
        ({"chosen": "a bc", "rejected": "a bd"}, "a", " bc~", " bd~"),
        ({"prompt": "1", "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3"}, None, None, None),
        ({"prompt": [Q], "chosen": "2", "rejected": "3"}, "u:1~\na:", "2~", "3~"),
        (
            {
                "chosen": [Q, {"role": "assistant", "content": "2"}],
                "rejected": [Q, {"role": "assistant", "content": "3"}],
            },
            "u:1~\na:",
            "2~",
            "3~",
        ),
    ],
)
def test_trees(columns: dict[str, Any], prompt: str | None, chosen: str | None, rejected: str | None) -> None:
    if prompt is None or chosen is None or rejected is None:
        assert "one is a string and one is messages" in complaint(made, columns)
        return
    example = made(columns)
    assert example.root.tokens.tolist() == ids(prompt)
    assert example.root.weights is None
    assert [child.tokens.tolist() for child in example.root.children] == [ids(chosen), ids(rejected)]
    assert [child.weights.tolist() for child in example.root.children] == [[1.0] * len(chosen), [1.0] * len(rejected)]


def test_a_rated_completion_has_no_rival() -> None:
    example = made({"prompt": "1=", "completion": "1", "ratings": {"right": 4}})
    assert example.root.tokens.tolist() == ids("1=")
    assert [child.tokens.tolist() for child in example.root.children] == [ids("1~")]
    assert example.fields == {"right": 4.0}


def test_rated_completions_of_a_prompt_become_pairs() -> None:
    rows = [
        {"prompt": "1=", "completion": "1", "right": 4, "brief": 1, "id": "a"},
        {"prompt": "1=", "completion": "11", "right": 1, "brief": 0, "id": "b"},
        {"prompt": "2=", "completion": "2", "right": 4, "brief": 4, "id": "c"},
    ]
    data = PreferenceDataModule(val=rows, tokenizer=chars(), pair_by={"right": 1.0, "brief": -0.5})
    data.setup("validate")
    [[example]] = data.val_dataloader()
    assert example.row_id == "memory:1+2"
    assert example.root.tokens.tolist() == ids("1=")
    assert [child.tokens.tolist() for child in example.root.children] == [ids("1~"), ids("11~")]
    assert example.fields == {"chosen_score": 3.5, "rejected_score": 1.0, "margin": 2.5}


@pytest.mark.parametrize("pair_by", [{}, {"right": 0.0}, {"right": float("nan")}])
def test_pairs_need_a_rating_to_go_by(pair_by: dict[str, float]) -> None:
    assert complaint(PreferenceDataModule, pair_by=pair_by) == (
        f"pair_by={pair_by!r}, expected finite numbers by rating, not all 0, such as {{'helpfulness': 1.0}}"
    )


def test_texts_that_the_tokenizer_cannot_tell_apart_are_no_pair() -> None:
    assert complaint(made, {"prompt": "1=", "chosen": "ä", "rejected": "ö"}) == (
        "chosen and rejected have the same tokens: a pair needs two completions that differ in them"
    )


def test_the_margin_is_a_field() -> None:
    columns = {"prompt": "1=", "chosen": "1", "rejected": "2", "chosen_score": 4, "rejected_score": 1, "id": "x"}
    assert made(columns).fields == {"chosen_score": 4, "rejected_score": 1, "margin": 3.0, "id": "x"}
    assert "margin" not in made({"prompt": "1=", "chosen": "1", "rejected": "2"}).fields
