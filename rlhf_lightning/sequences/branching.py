"""Builds trees from paths: turns of a sequence with different contexts share their common prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .example import Example, Segment, distinct_segments

Tokens = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
WeightedPath = tuple[Tokens, Weights]


def grow_tree(sequences: Sequence[Sequence[WeightedPath]], trunk: Tokens | None = None) -> Segment:
    """Builds the tree of one example.

    The paths of a sequence share their longest common prefix; a path that is a prefix of a later one in its sequence
    is merged into it, weights included. Different sequences share only the trunk.

    Args:
        sequences: the paths of each sequence, its last turn last; each as tokens and weights of equal length.
        trunk: the tokens of the root, if all paths begin with them; otherwise, and by default where there are several
            sequences, the root is the common prefix of all paths before their first scored token.

    Returns:
        The root. Without trunk, the root of a single sequence is the common prefix of its paths, scored tokens
        included.

    Raises:
        ValueError: no path, or paths that differ in their first token.

    Example:
        >>> weighted = lambda tokens, weights: (np.array(tokens), np.array(weights, np.float32))
        >>> short, long = weighted([1, 2, 7], [0, 0, 1]), weighted([1, 2, 3, 8], [0, 0, 0, 1])
        >>> root = grow_tree([[short, long]])
        >>> root.tokens.tolist(), [child.tokens.tolist() for child in root.children]
        ([1, 2], [[7], [3, 8]])
    """
    sequences = [_absorbed(sequence) for sequence in sequences]
    paths = [path for sequence in sequences for path in sequence]
    if not paths or not all(sequences):
        raise ValueError("a tree needs at least one path of each sequence")

    # A computed trunk ends before the first scored token, since each sequence scores its own.
    if trunk is None or not all(_begins_with(tokens, trunk) for tokens, _ in paths):
        if trunk is None and len(sequences) == 1:
            return _branch(list(enumerate(sequences[0])), 0, last=True)
        trunk = paths[0][0][: _shared_unscored(paths)]
    if not len(trunk):
        raise ValueError(
            "the renderings of a row's turns differ from their first token on: expected a chat template that begins "
            "them with the same token, such as a beginning-of-sequence token"
        )

    children = []
    for sequence in sequences:
        children += _children(list(enumerate(sequence)), len(trunk), last=True)
    return Segment(trunk, _merged([weights[: len(trunk)] for _, weights in paths]), children)


def unfold_tree(root: Segment) -> list[list[WeightedPath]]:
    """Lists the paths of each sequence of a tree, as ``grow_tree`` takes them.

    Example:
        >>> pair = Segment([1], children=(Segment([2], [1]), Segment([3, 4], [0, 1])))
        >>> [[(tokens.tolist(), weights.tolist()) for tokens, weights in paths] for paths in unfold_tree(pair)]
        [[([1, 2], [0.0, 1.0])], [([1, 3, 4], [0.0, 0.0, 1.0])]]
    """
    return [
        [
            (
                np.concatenate([segment.tokens for segment in path]),
                np.concatenate([np.zeros(len(s.tokens), np.float32) if s.weights is None else s.weights for s in path]),
            )
            for path in sequence
        ]
        for sequence in root.sequences()
    ]


def split_answer(example: Example) -> tuple[Tokens, Segment]:
    """Splits an example into its prompt and its first sequence's answer.

    Where the answer's turns have different contexts, the prompt is everything before the first scored token, and the
    answer is only the last turn, which can follow another prompt.

    Example:
        >>> prompt, answer = split_answer(Example("rows:0", Segment([1, 2], children=(Segment([3, 4], [0, 1]),))))
        >>> prompt.tolist(), answer.tokens.tolist()
        ([1, 2], [3, 4])
    """
    sequence = next(example.root.sequences())
    if len(sequence) == 1:
        tokens, weights = unfold_tree(example.root)[0][0]
        start = len(example.root.tokens)
        return example.root.tokens, Segment(tokens[start:], weights[start:])

    # Several turns: only segments that no earlier turn has read are the last turn's own answer.
    paths = unfold_tree(example.root)[0]
    first = int(np.flatnonzero(paths[0][1])[0])
    earlier = set(distinct_segments(sequence[:-1]))
    own = [segment for segment in sequence[-1] if segment not in earlier]
    tokens = np.concatenate([segment.tokens for segment in own])
    weights = np.concatenate([np.zeros(len(s.tokens), np.float32) if s.weights is None else s.weights for s in own])
    start = int(np.flatnonzero(weights)[0])
    return paths[0][0][:first], Segment(tokens[start:], weights[start:])


def with_answer(root: Segment, prompt: Tokens, answer: Segment) -> Segment:
    """Adds one more sequence to a tree: an answer to its prompt.

    Args:
        root: the tree; the prompt begins with its tokens.
        prompt: as returned by ``split_answer``.
        answer: without children.

    Example:
        >>> root = Segment([1, 2], children=(Segment([3], [1]),))
        >>> [child.tokens.tolist() for child in with_answer(root, root.tokens, Segment([4], [1])).children]
        [[3], [4]]
    """
    rest = prompt[len(root.tokens) :]
    # A prompt that goes beyond the root brings its remaining tokens along, unscored.
    if len(rest):
        weights = np.zeros(len(answer.tokens), np.float32) if answer.weights is None else answer.weights
        weights = np.concatenate([np.zeros(len(rest), np.float32), weights])
        answer = Segment(np.concatenate([rest, answer.tokens]), weights)
    return replace(root, children=(*root.children, answer))


def shared_length(one: Tokens, other: Tokens) -> int:
    """Counts the leading tokens that two paths share.

    Example:
        >>> shared_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
        2
    """
    length = min(len(one), len(other))
    parted = np.flatnonzero(one[:length] != other[:length])
    return int(parted[0]) if len(parted) else length


def _absorbed(paths: Sequence[WeightedPath]) -> list[WeightedPath]:
    """Drops paths that are prefixes of later ones, and merges their weights into these."""
    merged = [(tokens, weights.copy()) for tokens, weights in paths]
    kept: list[WeightedPath] = []
    for number, (tokens, weights) in enumerate(merged):
        for longer, own in merged[number + 1 :]:
            # Its tokens are scored on the longer path instead, each once.
            if len(longer) > len(tokens) and shared_length(longer, tokens) == len(tokens):
                own[: len(tokens)] = np.maximum(own[: len(tokens)], weights)
                break
        else:
            kept.append((tokens, weights))
    return kept


_Numbered = list[tuple[int, WeightedPath]]  # paths with their positions in the sequence


def _branch(paths: _Numbered, start: int, *, last: bool) -> Segment:
    """Makes the segment that paths share from ``start`` on, with its children."""
    first = paths[0][1][0]
    end = min(shared_length(first, tokens) for _, (tokens, _) in paths)
    if end == start:
        raise ValueError(
            "the renderings of a row's turns differ from their first token on: expected a chat template that begins "
            "them with the same token, such as a beginning-of-sequence token"
        )
    children = _children(paths, end, last=last)
    weights = _merged([weights[start:end] for _, (_, weights) in paths])
    return Segment(first[start:end], weights, children, continued=not last and not children)


def _children(paths: _Numbered, start: int, *, last: bool) -> list[Segment]:
    """Makes the children of a segment; the path of the last turn comes last."""
    groups: dict[int, _Numbered] = {}
    # Paths that differ in their next token part here.
    for number, (tokens, weights) in paths:
        if len(tokens) > start:
            groups.setdefault(int(tokens[start]), []).append((number, (tokens, weights)))

    # By the last turn of each group: consumers read the end of a sequence at its last path.
    ordered = sorted(groups.values(), key=lambda group: group[-1][0])
    return [_branch(group, start, last=last and group is ordered[-1]) for group in ordered]


def _begins_with(tokens: Tokens, trunk: Tokens) -> bool:
    return len(tokens) > len(trunk) and bool((tokens[: len(trunk)] == trunk).all())


def _shared_unscored(paths: Sequence[WeightedPath]) -> int:
    scored = [int(np.flatnonzero(weights)[0]) if weights.any() else len(weights) - 1 for _, weights in paths]
    return min(*scored, *(shared_length(paths[0][0], tokens) for tokens, _ in paths))


def _merged(parts: Sequence[Weights]) -> Weights | None:
    weights: Weights = np.max(parts, axis=0)
    return weights if weights.any() else None
