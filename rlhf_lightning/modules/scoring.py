"""Scoring texts with a reward model: tokenised as in training, a prompt once for all its completions, packed.

Legend: S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..datamodules.formats import Row
from ..datamodules.tokenization import RowTokenizer
from ..models import evaluating
from ..sequences import Example, ExampleBatch, Segment, SequenceBatch, plan_micro_batches
from .base import PostTrainingModule

Text = str | list[dict[str, Any]]


def answer_segments(
    tokenizer: Any, prompts: Sequence[Text], completions: Sequence[Text]
) -> list[tuple[Segment, Segment]]:
    """Tokenises prompts and completions as ``PreferenceDataModule`` does, the end-of-sequence token included.

    Raises:
        ValueError: lists of different length, or a row that cannot be tokenised, with its number.
    """
    _check_lengths(prompts, completions)
    rows = RowTokenizer(tokenizer)
    segments = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not completion:
            raise ValueError(f"completion {number} is empty: give at least one character or message")
        if not isinstance(prompt, str) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        try:
            root = rows.answers(Row(prompt, (completion,)))
        except ValueError as error:
            raise ValueError(f"completion {number}: {error}") from error
        segments.append((root, root.children[0]))
    return segments


def _check_lengths(prompts: Sequence[Text], completions: Sequence[Any]) -> None:
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        given = f"{type(prompts).__name__} and {type(completions).__name__}"
        if not isinstance(prompts, str) and not isinstance(completions, str):
            given = f"{len(prompts)} prompts and {len(completions)} completions"
        raise ValueError(f"given {given}; give two lists of one length, a prompt for every completion")


def grouped(segments: Sequence[tuple[Segment, Segment]], budget: int) -> tuple[list[Example], list[list[int]]]:
    """Makes one tree of a prompt and its completions, or several where one would not fit into a micro-batch.

    Args:
        segments: prompt and completion of each sequence.
        budget: tokens per micro-batch, above 0.

    Returns:
        The examples, and for each of their sequences its position in ``segments``.
    """
    groups: list[tuple[Segment, list[int]]] = []
    open_groups: dict[bytes, tuple[int, int]] = {}  # prompt -> number of its last group, tokens in it
    for number, (prompt, completion) in enumerate(segments):
        key, cost = prompt.tokens.tobytes(), len(completion.tokens)
        group, tokens = open_groups.get(key, (-1, budget))
        if tokens + cost > budget:
            group, tokens = len(groups), len(prompt.tokens)
            groups.append((prompt, []))
        groups[group][1].append(number)
        open_groups[key] = (group, tokens + cost)
    examples = [
        Example(f"group:{group}", Segment(prompt.tokens, children=tuple(segments[n][1] for n in numbers)))
        for group, (prompt, numbers) in enumerate(groups)
    ]
    return examples, [numbers for _, numbers in groups]


@torch.no_grad()
def per_sequence(
    module: PostTrainingModule, examples: Sequence[Example], values_of: Callable[[SequenceBatch], Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Applies a function of a packed batch and returns its value of every sequence, example by example.

    Args:
        module: what holds the model; its budget and layout are used, in evaluation mode.
        examples: any number, with any number of sequences.
        values_of: from a batch to one tensor per sequence.
    """
    module.configure_model()
    checked = PostTrainingModule._checked(module, ExampleBatch(examples))
    plan = plan_micro_batches(checked, budget=module.micro_batch_tokens, share_prefix=module.share_prefix)
    found: list[list[Tensor]] = [[] for _ in checked]
    with evaluating(module):
        for micro in plan:
            batch = module._pack([checked[n] for n in micro])
            for value, example in zip(values_of(batch), batch.example_index.tolist(), strict=True):
                found[micro[example]].append(value.cpu())
    return found


def score_texts(
    module: PostTrainingModule,
    segments: Sequence[tuple[Segment, Segment]],
    values_of: Callable[[SequenceBatch], Sequence[Tensor]],
) -> list[Tensor]:
    """The value of every prompt and completion, in their order; equal prompts are computed once.

    Args:
        module: see ``per_sequence``.
        segments: prompt and completion of each.
        values_of: see ``per_sequence``.
    """
    examples, numbers = grouped(segments, module.micro_batch_tokens)
    values: list[Tensor] = [torch.empty(0)] * len(segments)
    for places, found in zip(numbers, per_sequence(module, examples, values_of), strict=True):
        for place, value in zip(places, found, strict=True):
            values[place] = value
    return values
