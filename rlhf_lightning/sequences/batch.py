"""SequenceBatch: a forest of token segments laid out flat, depth first, without padding.

Legend: T tokens in the forest, S sequences (root-to-leaf paths), N scored tokens (each once per sequence), E examples.

One integer per token is all the geometry there is: token ``j`` is visible to token ``i`` exactly when
``j <= i < subtree_end[j]``. Plain packing (no shared segment), shared prompts and search trees are the same case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .attention import TreeGeometry
from .example import Example, Segment


@dataclass
class PaddedBatch:
    """The same sequences as rows of a padded matrix, for models that packing does not reach.

    Args:
        input_ids: ``(S, L)``.
        attention_mask: ``(S, L)``, 1 = token, 0 = padding.
        position_ids: ``(S, L)``, the depth of each token along its own sequence; 0 at padding.
        start: ``(S,)`` column of each sequence's first token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    start: Tensor


@dataclass
class SequenceBatch:
    """A packed forest with what a loss reads from it.

    Args:
        input_ids: ``(T,)`` tokens, depth first.
        position_ids: ``(T,)`` depth of each token along its own path.
        geometry: who sees whom, for the registered attention.
        source_index: ``(N,)`` flat position of the token *before* each scored token: where its prediction is read.
        source_depth: ``(N,)`` the same position counted along the sequence.
        target_ids: ``(N,)`` the scored tokens.
        sequence_index: ``(N,)`` which sequence each scored token belongs to; ascending.
        weights: ``(N,)`` loss weights, above 0.
        last_index: ``(S,)`` flat position of each sequence's last token.
        lengths: ``(S,)`` tokens of each sequence, its prompt included.
        example_index: ``(S,)`` which example each sequence belongs to; ascending.
        examples: the examples, in the order in which they were packed.
        path_index: flat positions of every sequence's tokens, sequence after sequence; ``(sum(lengths),)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    geometry: TreeGeometry
    source_index: Tensor
    source_depth: Tensor
    target_ids: Tensor
    sequence_index: Tensor
    weights: Tensor
    last_index: Tensor
    lengths: Tensor
    example_index: Tensor
    path_index: Tensor
    examples: list[Example] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the backbone computes, each shared token once."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """Root-to-leaf paths."""
        return self.lengths.shape[0]

    @property
    def num_examples(self) -> int:
        """Rows."""
        return len(self.examples)

    @property
    def subtree_end(self) -> Tensor:
        """``(T,)`` the flat position after the last descendant of each token."""
        return self.geometry.subtree_end

    def sum_per_sequence(self, values_N: Tensor) -> Tensor:
        """Adds values of scored tokens up per sequence: ``(N,) -> (S,)``; an empty sequence gives 0."""
        return values_N.new_zeros(self.num_sequences).index_add(0, self.sequence_index, values_N)

    def sum_per_example(self, values_N: Tensor) -> Tensor:
        """Adds values of scored tokens up per example: ``(N,) -> (E,)``."""
        return values_N.new_zeros(self.num_examples).index_add(0, self.example_index[self.sequence_index], values_N)

    def padded(self, *, side: Literal["right", "left"] = "right", extra: int = 0, pad_token_id: int = 0) -> PaddedBatch:
        """The same sequences, prompts repeated, as rows with padding on one side.

        Args:
            side: where the padding goes.
            extra: columns of padding beyond the longest sequence, at least 0.
            pad_token_id: what fills them; no result depends on it.
        """
        lengths = self.lengths.cpu()
        width = int(lengths.max()) + extra
        columns = torch.arange(width)
        start = torch.zeros_like(lengths) if side == "right" else width - lengths
        depth = columns[None, :] - start[:, None]
        mask = (depth >= 0) & (depth < lengths[:, None])
        tokens = torch.full((len(lengths), width), pad_token_id, dtype=self.input_ids.dtype)
        tokens[mask] = self.input_ids.cpu()[self.path_index.cpu()]
        device = self.input_ids.device
        return PaddedBatch(
            input_ids=tokens.to(device),
            attention_mask=mask.long().to(device),
            position_ids=(depth * mask).to(device),
            start=start.to(device),
        )


class _Layout:
    """Collects the flat arrays of a forest while its trees are walked depth first."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int]] = []  # (start, length, parent segment or -1)
        self.size = 0
        self.source: list[np.ndarray] = []
        self.depth: list[np.ndarray] = []
        self.target: list[np.ndarray] = []
        self.weight: list[np.ndarray] = []
        self.sequence: list[np.ndarray] = []
        self.paths: list[np.ndarray] = []
        self.example: list[int] = []

    def walk(self, segment: Segment, parent: int, path: list[tuple[Segment, np.ndarray]], example: int) -> None:
        """Lays out one segment behind its ancestors, then its children."""
        start = self.size
        depth = sum(len(flat) for _, flat in path)
        length = len(segment.tokens)
        flat = np.arange(start, start + length)
        self.tokens.append(segment.tokens)
        self.positions.append(np.arange(depth, depth + length))
        self.segments.append((start, length, parent))
        self.size += length
        number = len(self.segments) - 1
        path = [*path, (segment, flat)]
        if not segment.children:
            self._close(path, example)
        for child in segment.children:
            self.walk(child, number, path, example)

    def _close(self, path: list[tuple[Segment, np.ndarray]], example: int) -> None:
        """Records a finished sequence and the tokens that it scores."""
        flat = np.concatenate([part for _, part in path])
        weights = np.concatenate(
            [np.zeros(len(part), np.float32) if s.weights is None else s.weights for s, part in path]
        )
        scored = np.flatnonzero(weights)
        if len(scored) and scored[0] == 0:
            raise ValueError("the first token of a tree has weight above 0, but no token before it: give it weight 0")
        tokens = np.concatenate([s.tokens for s, _ in path])
        self.source.append(flat[scored - 1])
        self.depth.append(scored - 1)
        self.target.append(tokens[scored])
        self.weight.append(weights[scored])
        self.sequence.append(np.full(len(scored), len(self.paths)))
        self.paths.append(flat)
        self.example.append(example)


def _linear(path: tuple[Segment, ...]) -> Segment:
    """A path as a tree of its own that shares nothing."""
    tokens = np.concatenate([s.tokens for s in path])
    weights = np.concatenate([np.zeros(len(s.tokens), np.float32) if s.weights is None else s.weights for s in path])
    return Segment(tokens, weights)


def pack(
    examples: Sequence[Example], *, share_prefix: bool = True, device: torch.device | None = None
) -> SequenceBatch:
    """Lays examples out as one SequenceBatch.

    Args:
        examples: at least one.
        share_prefix: lay a prompt out once for all its completions; ``False`` repeats it for each. The results agree.
        device: where the tensors go.

    Raises:
        ValueError: no example, or a weight on the first token of a tree.

    Example:
        >>> prompt, yes, no = [5, 6, 7], [8, 9], [4]
        >>> tree = Segment(prompt, children=(Segment(yes, [1, 1]), Segment(no, [1])))
        >>> batch = pack([Example("rows:0", tree)])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.subtree_end.tolist()
        ([5, 6, 7, 8, 9, 4], [0, 1, 2, 3, 4, 3], [6, 6, 6, 5, 5, 6])
        >>> batch.source_index.tolist(), batch.target_ids.tolist(), batch.sequence_index.tolist()
        ([2, 3, 2], [8, 9, 4], [0, 0, 1])
    """
    if not examples:
        raise ValueError("cannot pack an empty list of examples")
    layout = _Layout()
    for number, example in enumerate(examples):
        roots = [example.root] if share_prefix else [_linear(path) for path in example.root.paths()]
        for root in roots:
            layout.walk(root, -1, [], number)

    def tensor(parts: list[np.ndarray], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype=dtype, device=device)

    lengths = [len(path) for path in layout.paths]
    return SequenceBatch(
        input_ids=tensor(layout.tokens),
        position_ids=tensor(layout.positions),
        geometry=TreeGeometry(layout.segments, device=device),
        source_index=tensor(layout.source),
        source_depth=tensor(layout.depth),
        target_ids=tensor(layout.target),
        sequence_index=tensor(layout.sequence),
        weights=tensor(layout.weight, torch.float32),
        last_index=torch.tensor([path[-1] for path in layout.paths], device=device),
        lengths=torch.tensor(lengths, device=device),
        example_index=torch.tensor(layout.example, device=device),
        path_index=tensor(layout.paths),
        examples=list(examples),
    )
