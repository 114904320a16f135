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


def prefix_examples(trees: Sequence[Segment], budget: int) -> tuple[list[Example], list[list[list[int]]]]:
    """Builds trees in which completions of a prompt share all tokens that they begin with.

    The last token of every completion is a leaf of its own, also where another completion continues after it, so that
    each is the end of one sequence.

    Args:
        trees: prompts with one completion each.
        budget: tokens per micro-batch, above 0: a tree's completions without sharing.

    Returns:
        The examples, and for each of their sequences, in order, its positions in ``trees``: several where completions
        are equal.
    """
    by_prompt: dict[bytes, dict[tuple[int, ...], list[int]]] = {}
    prompts: dict[bytes, Segment] = {}
    for number, tree in enumerate(trees):
        key = tree.tokens.tobytes()
        prompts.setdefault(key, tree)
        tokens = tuple(tree.children[0].tokens.tolist())
        by_prompt.setdefault(key, {}).setdefault(tokens, []).append(number)
    examples: list[Example] = []
    numbers: list[list[list[int]]] = []
    for key, completions in by_prompt.items():
        # Sorted, so that completions that share much are in one tree.
        waiting = sorted(completions)
        while waiting:
            size = len(prompts[key].tokens)
            taken: list[tuple[int, ...]] = []
            while waiting and (not taken or size + len(waiting[0]) <= budget):
                size += len(waiting[0])
                taken.append(waiting.pop(0))
            leaves: list[list[int]] = []
            children = _branches(taken, 0, completions, leaves)
            examples.append(Example(f"prefixes:{len(examples)}", Segment(prompts[key].tokens, None, children)))
            numbers.append(leaves)
    return examples, numbers


def _branches(
    sequences: Sequence[tuple[int, ...]],
    start: int,
    places: Mapping[tuple[int, ...], list[int]],
    leaves: list[list[int]],
) -> tuple[Segment, ...]:
    """Builds the segments of sorted sequences from a position on; notes the places of leaves, depth first."""
    found = []
    index = 0
    while index < len(sequences):
        first = sequences[index]
        # A sequence that ends with its next token is a leaf; others with that token continue next to it.
        if len(first) == start + 1:
            same = [first]
        else:
            same = [s for s in sequences[index:] if len(s) > start + 1 and s[start] == first[start]]
        index += len(same)
        if len(same) == 1:
            leaves.append(places[first])
            found.append(Segment(list(first[start:]), [1.0] * (len(first) - start)))
            continue
        end = min(_common(same[0], same[-1], start), min(map(len, same)) - 1)
        found.append(Segment(list(first[start:end]), None, _branches(same, end, places, leaves)))
    return tuple(found)


def _common(one: Sequence[int], other: Sequence[int], start: int) -> int:
    """Returns the position at which two sequences first differ; of sorted ones, all between share as much."""
    end = start
    while end < min(len(one), len(other)) and one[end] == other[end]:
        end += 1
    return end
