"""Brings examples within a length: drops them, or cuts their paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..sequences.branching import Tokens, WeightedPath, Weights, grow_tree, shared_length, unfold_tree
from ..sequences.example import Example, Segment

OnTooLong = Literal["drop", "truncate_end", "truncate_start", "error"]


class TooLongError(ValueError):
    """A sequence has more tokens than it may have, and that is to be an error."""


def fit(
    example: Example, max_length: int | None, on_too_long: OnTooLong, opening: Sequence[int] = ()
) -> tuple[Example | None, bool]:
    """Brings an example within a length.

    An example is measured by its longest path, so a pair by the longer of prompt+chosen and prompt+rejected, and a
    conversation by the longest of its turns with its context. Cutting the start takes from the prompt, as much for all
    completions, behind the tokens that open every text (a beginning-of-sequence token); of a conversation it takes as
    much from all turns, and those whose contexts are not the last turn's beyond the cut are left out. Cutting the end
    takes from the completions, with their end-of-sequence token, and from each turn of a conversation; turns without a
    scored token are left out. What loses its last prompt token, all its scored tokens, or what told its completions
    apart is dropped.

    Args:
        example: a prompt with its completions, or one segment alone.
        max_length: tokens that a sequence may have; ``None`` = any number.
        on_too_long: what to do with a longer one.
        opening: tokens that stay where a prompt begins with them and its start is cut.

    Returns:
        The example to keep (``None`` = drop it), and whether it was cut.

    Raises:
        TooLongError: with ``on_too_long="error"``.

    Example:
        >>> pair = Segment([1, 2, 3], children=(Segment([4, 5], [1, 1]), Segment([6], [1])))
        >>> shorter, cut = fit(Example("rows:1", pair), 4, "truncate_start")
        >>> shorter.root.tokens.tolist(), cut
        ([2, 3], True)
    """
    length = longest(example.root)
    if max_length is None or length <= max_length:
        return example, False
    if on_too_long == "error":
        raise TooLongError(
            f"{length} tokens, expected at most max_length={max_length}: raise it, shorten the row or set on_too_long"
        )
    if on_too_long == "drop":
        return None, False
    cut = (
        _cut_start(example.root, length - max_length, np.asarray(opening, np.int64))
        if on_too_long == "truncate_start"
        else _cut_end(example.root, max_length)
    )
    if cut is None or has_equal_sequences(cut):
        return None, False
    shorter = Example(example.row_id, cut, example.fields)
    counts = [len(weights) for weights in shorter.weights_per_sequence()]
    if any(map(len, example.weights_per_sequence())) and 0 in counts:
        return None, False
    return shorter, True


def longest(root: Segment) -> int:
    """The tokens of the longest path of a tree.

    Example:
        >>> longest(Segment([1, 2], children=(Segment([3]), Segment([4, 5]))))
        4
    """
    return len(root.tokens) + max((longest(child) for child in root.children), default=0)


def has_equal_sequences(root: Segment) -> bool:
    """Whether two sequences of a tree have the same tokens.

    Example:
        >>> has_equal_sequences(Segment([1], children=(Segment([2]), Segment([2]))))
        True
    """
    sequences = [tuple(tokens.tobytes() for tokens, _ in paths) for paths in unfold_tree(root)]
    return len(set(sequences)) < len(sequences)


def _cut_start(root: Segment, excess: int, opening: Tokens) -> Segment | None:
    kept = len(opening) if root.tokens[: len(opening)].tolist() == opening.tolist() else 0
    gone = slice(kept, kept + excess)
    sequences = unfold_tree(root)
    trunk = np.delete(root.tokens, gone) if root.children else None
    if len(root.tokens) - kept <= excess:
        if len(sequences) > 1 or len(sequences[0]) == 1:
            return None
        # The cut reaches beyond the first fork: turns that do not share what is cut, and a token more, cannot go along.
        last, trunk = sequences[0][-1][0], None
        sequences = [[path for path in sequences[0] if shared_length(path[0], last) > kept + excess]]
    shorter = [
        [(np.delete(tokens, gone), _unscored_first(np.delete(weights, gone))) for tokens, weights in paths]
        for paths in sequences
    ]
    return grow_tree(shorter, trunk)


def _cut_end(root: Segment, max_length: int) -> Segment | None:
    if not root.children:
        return Segment(root.tokens[:max_length], None if root.weights is None else root.weights[:max_length])
    sequences = unfold_tree(root)
    if len(root.tokens) >= max_length and len(sequences) > 1:
        return None
    shorter = [
        _scored_paths([(tokens[:max_length], weights[:max_length]) for tokens, weights in paths]) for paths in sequences
    ]
    if not all(shorter):
        return None
    return grow_tree(shorter, root.tokens if len(root.tokens) < max_length else None)


def _scored_paths(paths: Sequence[WeightedPath]) -> list[WeightedPath]:
    """The paths of a sequence that score a token which no earlier one has."""
    kept: list[WeightedPath] = []
    for tokens, weights in paths:
        shared = max((shared_length(tokens, earlier) for earlier, _ in kept), default=0)
        if weights[shared:].any():
            kept.append((tokens, weights))
    return kept


def _unscored_first(weights: Weights) -> Weights:
    weights[0] = 0.0
    return weights
