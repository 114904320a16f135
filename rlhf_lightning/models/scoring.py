"""Texts to score: tokenised as in training, and completions of one prompt grouped so that it is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.formats import Row
from ..data.messages import Text
from ..sequences import Example, Segment

# Settings of a chat template: for all rows, or for each of them.
TemplateSettings = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None


def answered(prompt: Text, completion: Text, template: Mapping[str, Any] | None = None) -> Row:
    """Makes a row of a prompt and its completion; a text that answers a chat becomes an assistant message."""
    if not isinstance(prompt, str) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return Row(prompt, (completion,), {}, dict(template or {}))


def template_of(templates: TemplateSettings, number: int) -> dict[str, Any]:
    """Returns the settings of one row's chat template."""
    given = templates if templates is None or isinstance(templates, Mapping) else templates[number]
    return dict(given or {})


def check_texts(prompts: Sequence[Text], completions: Sequence[Any]) -> None:
    """Checks that there is a prompt for every completion.

    Raises:
        ValueError: a text instead of a list, or lists of different length.
    """
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        given = f"{type(prompts).__name__} and {type(completions).__name__}"
        if not isinstance(prompts, str) and not isinstance(completions, str):
            given = f"{len(prompts)} prompts and {len(completions)} completions"
        raise ValueError(f"given {given}; give two lists of one length, a prompt for every completion")


def check_length(length: int, limit: int | None) -> None:
    """Checks that a prompt and its completion together fit the positions of a reward model.

    Args:
        length: their number of tokens.
        limit: the model's positions; ``None`` if unknown.

    Raises:
        ValueError: there are too many tokens.
    """
    if limit is not None and length > limit:
        raise ValueError(f"prompt and completion have {length} tokens, and the reward model reads {limit} at most")


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
