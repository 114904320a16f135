"""Demonstrations: one child after its prompt, or one segment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.sequences.example import Example

from .toys import BOS, EOS, UNMARKED, chars, ids

CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


def made(columns: dict[str, Any], **settings: Any) -> Example:
    [example] = SFTDataModule(tokenizer=chars(UNMARKED), **settings).make_examples("rows:1", columns)
    return example


def test_a_prompt_with_its_completion() -> None:
    example = made({"prompt": "1+1=", "completion": "2", "level": 3})
    assert (example.row_id, example.fields) == ("rows:1", {"level": 3})
    assert example.root.tokens.tolist() == ids("1+1=")
    assert example.root.weights is None
    [child] = example.root.children
    assert child.tokens.tolist() == ids("2~")
    assert child.weights.tolist() == [1, 1]


def test_the_prompt_too() -> None:
    example = made({"prompt": "1+1=", "completion": "2"}, completion_only_loss=False)
    assert example.root.weights.tolist() == [0, 1, 1, 1]
    assert example.root.children[0].weights.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("assistant_only", "weights"),
    [(True, "000000011"), (False, "011111111")],
)
def test_a_conversation(assistant_only: bool, weights: str) -> None:
    example = made({"messages": CHAT}, assistant_only_loss=assistant_only)
    assert example.root.tokens.tolist() == ids("u:1~\na:2~")
    assert example.root.weights.tolist() == [int(weight) for weight in weights]
    assert example.root.children == ()


def test_a_text() -> None:
    example = made({"text": "ab"})
    assert example.root.tokens.tolist() == [*ids("ab"), EOS]
    assert example.root.weights.tolist() == [0, 1, 1]


def test_no_prompt() -> None:
    assert made({"prompt": "", "completion": "2"}).root.tokens.tolist() == [BOS]


def test_every_scored_token_has_one_before_it() -> None:
    data = SFTDataModule(train="sums:demonstrations?rows=50", tokenizer=chars())
    data.setup("fit")
    for [example] in ([e] for batch in data.train_dataloader() for e in batch):
        root, [child] = example.root, example.root.children
        assert root.weights is None
        assert np.all(child.weights == 1)
        assert child.tokens.tolist().count(EOS) == 1
        assert child.tokens[-1] == EOS
