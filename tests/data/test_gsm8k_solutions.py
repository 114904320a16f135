"""Real solutions (GSM8K's) through the datamodules: pairs, verdicts and steps, read where they lie, never copied."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.datamodules import PreferenceDataModule, StepwiseDataModule, UnpairedDataModule
from rlhf_lightning.sequences.example import Example, Segment

FOLDER = os.environ.get("GSM8K_DIR", "")
FILE = Path(FOLDER or "nowhere") / "example_model_solutions.jsonl"
pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="GSM8K's solutions are not here: set GSM8K_DIR to the folder of its files"
)
ROWS = 60


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text comes back as it was."""
    vocab = {"<eos>": 0} | {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def solutions() -> dict[str, dict[str, bool]]:
    """By question, the published solutions with their marks, as the rows end them."""
    found: dict[str, dict[str, bool]] = {}
    with FILE.open(encoding="utf-8") as lines:
        for problem in map(json.loads, lines):
            attempts = [value for value in problem.values() if isinstance(value, dict)]
            found[problem["question"]] = {
                tried["solution"].replace("\nA: ", "\n#### "): tried["is_correct"] for tried in attempts
            }
    return found


def text(tokenizer: Any, segment: Segment) -> str:
    return str(tokenizer.decode(segment.tokens.tolist(), skip_special_tokens=True))


def read(data: Any) -> list[Example]:
    return [example for batch in data.all_examples() for example in batch]


def test_pairs(tokenizer: Any, solutions: dict[str, dict[str, bool]]) -> None:
    source = f"gsm8k:preference?split=heldout&annotations=keep&pairs=all&rows={ROWS}"
    examples = read(PreferenceDataModule(train=source, tokenizer=tokenizer))
    assert len(examples) == ROWS
    for example in examples:
        marks = solutions[text(tokenizer, example.root)]
        chosen, rejected = (text(tokenizer, child) for child in example.root.children)
        assert marks[chosen] is True
        assert marks[rejected] is False
        assert all(child.tokens[-1] == tokenizer.eos_token_id for child in example.root.children)
        assert all(child.weights is not None and child.weights.all() for child in example.root.children)


def test_verdicts_and_their_partners(tokenizer: Any, solutions: dict[str, dict[str, bool]]) -> None:
    source = f"gsm8k:unpaired?split=heldout&annotations=keep&rows={ROWS}"
    data = UnpairedDataModule(val=source, tokenizer=tokenizer, eval_batch_size=7)
    examples = [example for batch in data.val_dataloader() for example in batch]
    assert len(examples) == ROWS
    assert {example.fields["label"] for example in examples} == {True, False}
    for example in examples:
        question = text(tokenizer, example.root)
        completion, partner = (text(tokenizer, child) for child in example.root.children)
        assert solutions[question][completion] is example.fields["label"]
        others = [other for other, marks in solutions.items() if partner in marks and other != question]
        assert others, "a partner is the solution of another question"
    # The four solutions of a question follow one another, and none is another's partner.
    assert any(text(tokenizer, a.root) == text(tokenizer, b.root) for a, b in pairwise(examples))


def test_steps(tokenizer: Any, solutions: dict[str, dict[str, bool]]) -> None:
    """Every line is a step; GSM8K marks whole solutions, so that a step's label here is its solution's."""
    rows = []
    for question, marks in list(solutions.items())[:ROWS]:
        for solution, right in marks.items():
            steps = [line for line in solution.split("\n") if line]
            rows.append({"prompt": question, "completions": steps, "labels": [right] * len(steps)})
    examples = read(StepwiseDataModule(train=rows, tokenizer=tokenizer))
    assert len(examples) == len(rows)
    for example, row in zip(examples, rows, strict=True):
        [steps] = example.root.children
        assert text(tokenizer, example.root) == row["prompt"]
        assert text(tokenizer, steps) == "".join(f"{step}\n" for step in row["completions"])
        assert steps.weights is not None
        assert example.fields["labels"] == [float(label) for label in row["labels"]]
        ends = [place + 1 for place, weight in enumerate(steps.weights) if weight]
        assert len(ends) == len(row["completions"])
        found = [text(tokenizer, Segment(steps.tokens[a:b])) for a, b in pairwise([0, *ends])]
        assert found == [f"{step}\n" for step in row["completions"]]
