"""SequenceBatch: a forest of token segments laid out flat, depth first, without padding.

Legend: T tokens in the forest, P root-to-leaf paths, S sequences (of one path or several), N scored tokens (each once
per sequence), E examples.

One integer per token defines the geometry: token ``j`` is visible to token ``i`` exactly when
``j <= i < subtree_end[j]``. Plain packing (no shared segment), shared prompts and search trees are the same case. A
segment that shows no more than its slots hides its other tokens from the segments below (see ``Segment``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..utils.transfer import to_device
from .example import Example
from .forest_layout import lay_out
from .geometry import Part, TreeGeometry
from .prior_context import PriorContext


@dataclass
class PaddedBatch:
    """The paths of a forest as rows of a padded matrix, for models that cannot run packed.

    Args:
        input_ids: ``(P, L)``.
        attention_mask: ``(P, L)``, 1 = token, 0 = padding.
        position_ids: ``(P, L)``, the depth of each token along its own path; 0 at padding.
        start: ``(P,)`` column of each path's first token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    start: Tensor


@dataclass
class SequenceBatch:
    """A packed forest, with the indices and weights that a loss reads.

    Args:
        input_ids: ``(T,)`` tokens, depth first.
        position_ids: ``(T,)`` depth of each token along its own path.
        geometry: visibility between tokens, for the registered attention.
        source_index: ``(N,)`` flat position of the token *before* each scored token: where its prediction is read.
        source_depth: ``(N,)`` the same position counted along the path.
        source_path: ``(N,)`` the path on which each scored token is read; ascending.
        target_ids: ``(N,)`` the scored tokens.
        sequence_index: ``(N,)`` which sequence each scored token belongs to; ascending.
        weights: ``(N,)`` loss weights, above 0.
        last_index: ``(S,)`` flat position of each sequence's last token, on its last path.
        last_path: ``(S,)`` the last path of each sequence.
        scored_lengths: ``(S,)`` number of scored tokens of each sequence.
        lengths: ``(P,)`` tokens of each path, its prompt included.
        path_sequence: ``(P,)`` which sequence each path belongs to; ascending.
        example_index: ``(S,)`` which example each sequence belongs to; ascending.
        examples: the examples, in the order in which they were packed.
        path_index: flat positions of every path's tokens, path after path; ``(sum(lengths),)``.
        host: the tensors above as arrays in host memory, by name, for code that would wait for the device otherwise.
        extra: further tensors that ``pack`` was given as arrays.
        also: further batches that were packed with this one.
        slots: ``(T,)`` numbers of slots, below 0 at tokens; ``None`` without slots, as is ``encoded``: ``(T,)`` whether
            a token's segment shows less than everything.
        distinct: where several sequences score the same token at the same place (rows of one prompt that share a
            completion): the scored tokens to compute, ``(U,)``, and for each scored token its number there, ``(N,)``.
        contexts: contexts that trees follow, each with the flat position of its first entry. Paths begin with entries,
            whose tokens are 0; their keys and values come with ``geometry.prior``.

    Example:
        >>> from rlhf_lightning.sequences import Segment, pack
        >>> tree = Segment([5, 6], children=(Segment([7], [1]), Segment([8], [1])))
        >>> batch = pack([Example("rows:0", tree)])
        >>> batch.input_ids.tolist(), batch.target_ids.tolist(), batch.num_examples
        ([5, 6, 7, 8], [7, 8], 1)
    """

    input_ids: Tensor
    position_ids: Tensor
    geometry: TreeGeometry
    source_index: Tensor
    source_depth: Tensor
    source_path: Tensor
    target_ids: Tensor
    sequence_index: Tensor
    weights: Tensor
    last_index: Tensor
    last_path: Tensor
    scored_lengths: Tensor
    lengths: Tensor
    path_sequence: Tensor
    example_index: Tensor
    path_index: Tensor
    host: dict[str, np.ndarray]
    extra: dict[str, Tensor] = field(default_factory=dict)
    also: dict[str, SequenceBatch] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    slots: Tensor | None = None
    encoded: Tensor | None = None
    distinct: tuple[Tensor, Tensor] | None = None
    contexts: list[tuple[int, PriorContext]] = field(default_factory=list)
    _padded: dict[tuple[str, int, int], PaddedBatch] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that the backbone computes, each shared token once."""
        return self.input_ids.shape[0]

    @property
    def num_paths(self) -> int:
        """Root-to-leaf paths."""
        return self.lengths.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences that losses compare and count: completions, conversations."""
        return self.last_path.shape[0]

    @property
    def num_examples(self) -> int:
        """Rows."""
        return len(self.examples)

    @property
    def subtree_end(self) -> Tensor:
        """``(T,)`` the flat position after the last descendant of each token."""
        return self.geometry.subtree_end

    def sum_per_sequence(self, values_N: Tensor) -> Tensor:
        """Sums values of scored tokens per sequence: ``(N,) -> (S,)``; an empty sequence gives 0."""
        return values_N.new_zeros(self.num_sequences).index_add(0, self.sequence_index, values_N)

    def sum_per_example(self, values_N: Tensor) -> Tensor:
        """Sums values of scored tokens per example: ``(N,) -> (E,)``."""
        return values_N.new_zeros(self.num_examples).index_add(0, self.example_index[self.sequence_index], values_N)

    def scored_positions(self) -> tuple[Tensor, Tensor]:
        """Returns the positions of the scored tokens themselves, not of the tokens before them.

        Returns:
            ``(N,)`` flat positions in the forest, and ``(N,)`` positions along their paths.
        """
        # Scored tokens are predicted from the token before them on the same path.
        first_P = self.lengths.cumsum(0) - self.lengths
        depth_N = self.source_depth + 1
        return self.path_index[first_P[self.source_path] + depth_N], depth_N

    def drop_masks(self) -> None:
        """Frees masks and the states of contexts; they are made again where they are needed."""
        for batch in (self, *self.also.values()):
            batch.geometry.drop_masks()

    def padded(self, *, side: Literal["right", "left"] = "right", extra: int = 0, pad_token_id: int = 0) -> PaddedBatch:
        """Lays out the paths, prompts repeated, as rows with padding on one side.

        Args:
            side: side of the padding.
            extra: columns of padding beyond the longest path, at least 0.
            pad_token_id: token at padding; no result depends on it.
        """
        key = (side, extra, pad_token_id)
        if key not in self._padded:
            arrays = self._padded_arrays(side == "left", extra, pad_token_id)
            self._padded[key] = PaddedBatch(**to_device(arrays, self.input_ids.device))
        return self._padded[key]

    def _padded_arrays(self, left: bool, extra: int, pad_token_id: int) -> dict[str, np.ndarray]:
        lengths = self.host["lengths"]
        width = int(lengths.max()) + extra
        start = width - lengths if left else np.zeros_like(lengths)

        # Depth of every cell along its path; cells outside of 0 to length are padding.
        depth = np.arange(width) - start[:, None]
        mask = (depth >= 0) & (depth < lengths[:, None])
        tokens = np.full((len(lengths), width), pad_token_id, np.int64)
        tokens[mask] = self.host["input_ids"][self.host["path_index"]]
        return {
            "input_ids": tokens,
            "attention_mask": mask.astype(np.int64),
            "position_ids": depth * mask,
            "start": start,
        }


def pack(
    examples: Sequence[Example],
    *,
    share_prefix: bool = True,
    device: torch.device | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    also: Mapping[str, Sequence[Example]] | None = None,
    wanted: set[Part] | None = None,
) -> SequenceBatch:
    """Lays examples out as one SequenceBatch; a GPU gets it in one copy, for which the host does not wait.

    Args:
        examples: at least one.
        share_prefix: lay out a prompt once for all its completions, also across examples, and likewise a completion
            that several examples of the prompt share; ``False`` repeats them. The results agree.
        device: device of the tensors.
        extra: further arrays to copy, by name.
        also: examples of further batches to lay out and copy, by name.
        wanted: see ``TreeGeometry``: a set that is shared by all batches of a model.

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
    drafts = {name: _Draft(part, share_prefix, device, wanted) for name, part in {"": examples, **(also or {})}.items()}
    arrays: dict[Any, np.ndarray] = {
        (name, key): array for name, draft in drafts.items() for key, array in draft.arrays().items()
    }
    arrays |= {(None, name): array for name, array in (extra or {}).items()}

    tensors: dict[Any, dict[Any, Tensor]] = {owner: {} for owner in (*drafts, None)}  # everything in one copy
    for (owner, key), tensor in to_device(arrays, device).items():
        tensors[owner][key] = tensor
    batches = {name: draft.batch(tensors[name]) for name, draft in drafts.items()}
    batch = batches.pop("")
    batch.extra, batch.also = tensors[None], batches
    return batch


class _Draft:
    """A batch on the host, before its arrays are copied."""

    def __init__(
        self,
        examples: Sequence[Example],
        share_prefix: bool,
        device: torch.device | None,
        wanted: set[Part] | None,
    ) -> None:
        layout = lay_out(examples, share_prefix)
        self.examples, self.contexts = list(examples), layout.contexts
        self.host = layout.arrays()
        self.geometry = TreeGeometry(layout.segments, device=device, wanted=wanted, shown=layout.shown)

    def arrays(self) -> dict[Any, np.ndarray]:
        """Returns all arrays of the batch: its own, tokens to project once, and what layers have asked for."""
        distinct = _distinct(self.host["source_index"], self.host["target_ids"])
        return {**self.host, **distinct, **self.geometry.wanted_arrays()}

    def batch(self, tensors: dict[Any, Tensor]) -> SequenceBatch:
        """Makes the batch of the copies of ``arrays``."""
        own: dict[str, Any] = {name: tensors.pop(name) for name in self.host}
        distinct = (tensors.pop("chosen"), tensors.pop("which")) if "chosen" in tensors else None
        self.geometry.place(tensors)
        own |= {"geometry": self.geometry, "host": self.host, "examples": self.examples}
        return SequenceBatch(**own, distinct=distinct, contexts=self.contexts)


def _distinct(source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Finds tokens that several sequences score after the same prefix; empty if every token is scored once."""
    if not len(target):
        return {}
    pairs = source * (int(target.max()) + 1) + target
    _, chosen, which = np.unique(pairs, return_index=True, return_inverse=True)
    return {"chosen": chosen, "which": which} if len(chosen) < len(pairs) else {}
