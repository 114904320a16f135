"""Labelled steps: one child, scored at the end of each step."""

from __future__ import annotations

import numpy as np

from rlhf_lightning.datamodules import StepwiseDataModule

from .toys import UNMARKED, chars, complaint, ids

ROW = {"prompt": "1+2+3=?", "completions": ["1+2=3", "3+3=7"], "labels": [True, False], "answer": 6}


def test_trees() -> None:
    [made] = StepwiseDataModule(tokenizer=chars()).make_examples("rows:1", ROW)
    assert made.root.tokens.tolist() == ids("1+2+3=?")
    [steps] = made.root.children
    assert steps.tokens.tolist() == ids("1+2=3\n3+3=7\n")
    assert np.flatnonzero(steps.weights).tolist() == [5, 11]
    assert made.fields == {"answer": 6, "labels": [1.0, 0.0]}


def test_another_separator_and_a_chat_prompt() -> None:
    chat = {**ROW, "prompt": [{"role": "user", "content": "1+2+3"}]}
    [made] = StepwiseDataModule(tokenizer=chars(UNMARKED), step_separator="; ").make_examples("rows:1", chat)
    assert made.root.tokens.tolist() == ids("u:1+2+3~\na:")
    assert made.root.children[0].tokens.tolist() == ids("1+2=3; 3+3=7; ")
    assert np.flatnonzero(made.root.children[0].weights).tolist() == [6, 13]


def test_every_step_of_a_task_has_its_label() -> None:
    data = StepwiseDataModule(
        train="sums:stepwise?rows=30", tokenizer=chars(), max_length=40, on_too_long="truncate_start"
    )
    for batch in data.train_dataloader():
        for example in batch:
            assert int(example.root.children[0].weights.sum()) == len(example.fields["labels"])


def test_settings() -> None:
    assert complaint(StepwiseDataModule, step_separator="") == (
        "step_separator='' ends no step: write at least one character, such as a line's end"
    )
    assert complaint(StepwiseDataModule, on_too_long="truncate_end") == (
        "on_too_long='truncate_end', expected one of drop, truncate_start, error"
    )
