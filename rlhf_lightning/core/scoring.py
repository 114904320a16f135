"""Scoring texts with a reward model: tokenised as in training, a prompt once for all its completions, packed.

Legend: S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.formats import Row
from ..data.tokenization import RowTokenizer
from ..models import evaluating
from ..sequences import Example, ExampleBatch, Segment, SequenceBatch, plan_micro_batches
from .module import PostTrainingModule

Text = str | list[dict[str, Any]]
# Settings of a chat template: for all rows, or for each of them.
TemplateSettings = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None


def answer_trees(
    tokenizer: Any,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    templates: TemplateSettings = None,
) -> list[Segment]:
    """Tokenises prompts and completions as ``PreferenceDataModule`` does: one sequence each, with its end token.

    Args:
        tokenizer: the model's tokenizer.
        prompts: texts, or lists of chat messages.
        completions: one per prompt.
        templates: settings of the chat template, such as ``tools``: for all rows, or a list with one per row.

    Raises:
        ValueError: lists of different length, or a row that cannot be tokenised, with its number.
    """
    _check_lengths(prompts, completions)
    rows, trees = RowTokenizer(tokenizer), []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not completion:
            raise ValueError(f"completion {number} is empty: give at least one character or message")
        try:
            trees.append(rows.answers(answered(prompt, completion, template_of(templates, number))))
        except ValueError as error:
            raise ValueError(f"completion {number}: {error}") from error
    return trees


def answered(prompt: Text, completion: Text, template: Mapping[str, Any] | None = None) -> Row:
    """Makes a row of a prompt and its completion; a text that answers a chat becomes an assistant message."""
    if not isinstance(prompt, str) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return Row(prompt, (completion,), {}, dict(template or {}))


def template_of(templates: TemplateSettings, number: int) -> dict[str, Any]:
    """Returns the settings of one row's chat template."""
    given = templates if templates is None or isinstance(templates, Mapping) else templates[number]
    return dict(given or {})


def _check_lengths(prompts: Sequence[Text], completions: Sequence[Any]) -> None:
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        given = f"{type(prompts).__name__} and {type(completions).__name__}"
        if not isinstance(prompts, str) and not isinstance(completions, str):
            given = f"{len(prompts)} prompts and {len(completions)} completions"
        raise ValueError(f"given {given}; give two lists of one length, a prompt for every completion")


def grouped(trees: Sequence[Segment], budget: int) -> tuple[list[Example], list[list[int]]]:
    """Groups completions of equal prompts into trees, several per prompt where one would exceed a micro-batch.

    Args:
        trees: trees of one sequence each; trees of several paths are not grouped.
        budget: tokens per micro-batch, above 0.

    Returns:
        The examples, and for each of their sequences its position in ``trees``.
    """
    groups: list[tuple[Segment, list[int]]] = []
    open_groups: dict[bytes, tuple[int, int]] = {}  # prompt -> number of its last group, tokens in it
    for number, tree in enumerate(trees):
        if len(tree.children) != 1 or tree.children[0].children:
            groups.append((tree, [number]))
            continue
        key, cost = tree.tokens.tobytes(), len(tree.children[0].tokens)
        group, tokens = open_groups.get(key, (-1, budget))
        if tokens + cost > budget:
            group, tokens = len(groups), len(tree.tokens)
            groups.append((Segment(tree.tokens), []))
        groups[group][1].append(number)
        open_groups[key] = (group, tokens + cost)
    examples = []
    for group, (root, numbers) in enumerate(groups):
        children = root.children or tuple(trees[n].children[0] for n in numbers)
        examples.append(Example(f"group:{group}", Segment(root.tokens, root.weights, children)))
    return examples, [numbers for _, numbers in groups]


@torch.no_grad()
def per_sequence(
    module: PostTrainingModule, examples: Sequence[Example], values_of: Callable[[SequenceBatch], Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Applies a function to packed micro-batches and returns its values per example and sequence.

    Args:
        module: module with the model; its budget and layout are used, in evaluation mode.
        examples: any number, with any number of sequences.
        values_of: function from a batch to one tensor per sequence.
    """
    module.configure_model()
    checked = PostTrainingModule.validate_batch(module, ExampleBatch(examples))
    plan = plan_micro_batches(checked, budget=module.micro_batch_tokens, share_prefix=module.share_prefix)
    found: list[list[Tensor]] = [[] for _ in checked]
    with evaluating(module):
        for micro in plan:
            batch = module.micro_batching.pack([checked[n] for n in micro])
            for value, example in zip(values_of(batch), batch.example_index.tolist(), strict=True):
                found[micro[example]].append(value.cpu())
    return found


def score_texts(
    module: PostTrainingModule,
    trees: Sequence[Segment],
    values_of: Callable[[SequenceBatch], Sequence[Tensor]],
) -> list[Tensor]:
    """Returns the value of every prompt with its completion, in order; equal prompts are computed once.

    Args:
        module: see ``per_sequence``.
        trees: prompts with completions, as ``answer_trees`` makes them.
        values_of: see ``per_sequence``.
    """
    examples, numbers = grouped(trees, module.micro_batch_tokens)
    values: list[Tensor] = [torch.empty(0)] * len(trees)
    for places, found in zip(numbers, per_sequence(module, examples, values_of), strict=True):
        for place, value in zip(places, found, strict=True):
            values[place] = value
    return values
