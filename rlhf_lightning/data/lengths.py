"""Brings examples within a maximum length: drops them, or cuts their paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..sequences.branching import Tokens, WeightedPath, Weights, grow_tree, shared_length, unfold_tree
from ..sequences.example import Example, Segment

OnTooLong = Literal["drop", "truncate_end", "truncate_start", "error"]


class TooLongError(ValueError):
    """Raised for a sequence with more than ``max_length`` tokens, with ``on_too_long="error"``."""


def fit_to_length(
    example: Example, max_length: int | None, on_too_long: OnTooLong, opening: Sequence[int] = ()
) -> tuple[Example | None, bool]:
    """Brings an example within a maximum length.

    An example's length is that of its longest path: of a pair, the longer of prompt+chosen and prompt+rejected; of a
    conversation, its longest turn with context. Cutting the start removes the same number of prompt tokens for all
    completions, after the tokens that open every text (a beginning-of-sequence token); in a conversation it removes as
    many from all turns, and drops turns whose context differs from the last turn's at the cut. Cutting the end
    shortens the completions, end-of-sequence token included, and each turn of a conversation; turns without a scored
    token are dropped. An example that loses its last prompt token, all its scored tokens, or the tokens in which its
    completions differ is dropped.

    Args:
        example: a prompt with its completions, or one segment alone.
        max_length: maximum number of tokens of a sequence; ``None`` = unlimited.
        on_too_long: what to do with a longer one.
        opening: tokens kept at the beginning of a prompt when its start is cut.

    Returns:
        The example to keep (``None`` = drop it), and whether it was cut.

    Raises:
        TooLongError: with ``on_too_long="error"``.

    Example:
        >>> pair = Segment([1, 2, 3], children=(Segment([4, 5], [1, 1]), Segment([6], [1])))
        >>> shorter, cut = fit_to_length(Example("rows:1", pair), 4, "truncate_start")
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
    # Completions that became equal, or lost all scored tokens, would train on nothing.
    if cut is None or has_equal_sequences(cut):
        return None, False
    # An example that scored something and no longer does.
    shorter = Example(example.row_id, cut, example.fields)
    counts = [len(weights) for weights in shorter.weights_per_sequence()]
    if any(map(len, example.weights_per_sequence())) and 0 in counts:
        return None, False
    return shorter, True


def longest(root: Segment) -> int:
    """Counts the tokens of the longest path of a tree.

    Example:
        >>> longest(Segment([1, 2], children=(Segment([3]), Segment([4, 5]))))
        4
    """
    return len(root.tokens) + max((longest(child) for child in root.children), default=0)


def has_equal_sequences(root: Segment) -> bool:
    """Tells whether two sequences of a tree have the same tokens.

    Example:
        >>> has_equal_sequences(Segment([1], children=(Segment([2]), Segment([2]))))
        True
    """
    sequences = [tuple(tokens.tobytes() for tokens, _ in paths) for paths in unfold_tree(root)]
    return len(set(sequences)) < len(sequences)


def _cut_start(root: Segment, excess: int, opening: Tokens) -> Segment | None:
    # A beginning-of-sequence token stays in its place.
    kept = len(opening) if root.tokens[: len(opening)].tolist() == opening.tolist() else 0
    gone = slice(kept, kept + excess)
    sequences = unfold_tree(root)
    trunk = np.delete(root.tokens, gone) if root.children else None

    # Completions would lose tokens of their own; turns of one conversation may share more than the root.
    if len(root.tokens) - kept <= excess:
        if len(sequences) > 1 or len(sequences[0]) == 1:
            return None
        # The cut reaches beyond the first fork: only turns that share the removed tokens and one more can be cut at the
        # same place.
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
    # Without any token of its own, no completion differs from another.
    if len(root.tokens) >= max_length and len(sequences) > 1:
        return None
    shorter = [
        _scored_paths([(tokens[:max_length], weights[:max_length]) for tokens, weights in paths]) for paths in sequences
    ]
    if not all(shorter):
        return None
    return grow_tree(shorter, root.tokens if len(root.tokens) < max_length else None)


def _scored_paths(paths: Sequence[WeightedPath]) -> list[WeightedPath]:
    """Keeps the paths of a sequence that score a token that no earlier path has."""
    kept: list[WeightedPath] = []
    for tokens, weights in paths:
        shared = max((shared_length(tokens, earlier) for earlier, _ in kept), default=0)
        if weights[shared:].any():
            kept.append((tokens, weights))
    return kept


def _unscored_first(weights: Weights) -> Weights:
    weights[0] = 0.0
    return weights
