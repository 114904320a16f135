"""Prompts: a root alone, and all columns for the reward functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lightning.datamodules import PromptDataModule

from .toys import UNMARKED, chars, complaint, ids


def test_strings() -> None:
    row = {"prompt": "1+1=", "answer": "2", "tests": ["assert"]}
    [made] = PromptDataModule(tokenizer=chars(opening=True)).make_examples("rows:1", row)
    assert made.root.tokens.tolist() == ids("^1+1=")
    assert (made.root.weights, made.root.children) == (None, ())
    assert made.fields == row


def test_chat() -> None:
    row = {"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}
    [made] = PromptDataModule(tokenizer=chars(UNMARKED)).make_examples("rows:1", row)
    assert made.root.tokens.tolist() == ids("u:1+1~\na:")
    assert made.fields == row


@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_of_a_text_is_a_prompt(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("1+1=\n\n2+2=\n")
    data = PromptDataModule(train=str(path), tokenizer=chars(), global_batch_size=2, shuffle=False, streaming=streaming)
    [examples] = data.train_dataloader()
    assert [example.root.tokens.tolist() for example in examples] == [ids("1+1="), ids("2+2=")]
    assert [example.row_id for example in examples] == [f"{path}:1", f"{path}:3"]


def test_the_end_of_a_question_is_never_cut_off() -> None:
    assert complaint(PromptDataModule, on_too_long="truncate_end") == (
        "on_too_long='truncate_end', expected one of drop, truncate_start, error"
    )
    data = PromptDataModule(train=[{"prompt": "12345"}], tokenizer=chars(), max_length=3, on_too_long="truncate_start")
    [[example]] = data.train_dataloader()
    assert example.root.tokens.tolist() == ids("345")
