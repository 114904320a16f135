"""Geometry of a packed forest: which token sees which, as the indices that each kernel of ``tree_attention`` reads.

Legend: T tokens, B blocks' rows, Q / P padded queries / path keys, N stretches of a variable-length call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Segments share a padded block while its area is at most this multiple of the area that they need.
_MAX_PADDING = 1.3


@dataclass
class Block:
    """Segments of similar length whose attention is one padded product.

    Args:
        query_index: ``(B, Q)`` flat positions of the segments' tokens.
        key_index: ``(B, P)`` flat positions of the tokens on their paths.
        query_depth: ``(B, Q)`` position along the path; padding sees every key, and its output is not read.
        key_depth: ``(B, P)`` position along the path; padding lies beyond every query.
        causal: every segment is a root: the mask is the plain causal one and need not be built.
    """

    query_index: Tensor
    key_index: Tensor
    query_depth: Tensor
    key_depth: Tensor
    causal: bool

    def mask(self, window: int | None) -> Tensor:
        """Builds the mask ``(B, 1, Q, P)``, True = visible: keys at or before the query, and within the window."""
        query, key = self.query_depth[:, None, :, None], self.key_depth[:, None, None, :]
        visible = query >= key
        if window is not None:
            # A padding query has no key within a window; it sees all of them so that softmax stays finite.
            visible &= (query < key + window) | (query >= _FAR)
        return visible


class Stretches(NamedTuple):
    """Variable-length calls that make up the attention of a forest; see ``cascade.py``.

    Call ``c`` pairs stretches of queries with stretches of keys. The first call is causal, aligned at the last key of
    each stretch; in the others every query sees every key of its stretch.

    Args:
        bounds: ``(N + 1,)`` int32 per call: where its stretches of queries begin and end, then the same of keys.
        longest: lengths of the longest stretch of queries and of keys, call after call.
        key_index: flat positions of the keys, where they are gathered; ``None`` where they are the forest's own.
        window: a query sees keys less than this many positions before it; ``None`` is no limit.
    """

    bounds: list[Tensor]
    longest: list[int]
    key_index: Tensor | None
    window: int | None


_FAR = 1 << 40  # depth of padding queries, which see all keys of a path; padding keys lie twice as far, hidden from all


class TreeGeometry:
    """Visibility between the tokens of a packed forest.

    Args:
        segments: ``(start, length, parent)`` per segment in depth-first order; parent is -1 for a root.
        device: device of the index tensors.
    """

    def __init__(self, segments: list[tuple[int, int, int]], device: torch.device | None = None) -> None:
        segments = _merge_chains(segments)
        self.segments = segments
        self.device = device
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._stretches: dict[int | None, Stretches] = {}
        self.flex_masks: dict[int | None, Any] = {}  # see flex_attention.py
        self._ends = ends = [start + length for start, length, _ in segments]
        for number in range(len(segments) - 1, -1, -1):  # children come after their parent
            parent = segments[number][2]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        self.subtree_end = torch.from_numpy(np.repeat(ends, [length for _, length, _ in segments])).to(device)

    @cached_property
    def first_depths(self) -> list[int]:
        """Position of each segment's first token along its path."""
        first: list[int] = []
        for _, _, parent in self.segments:
            first.append(first[parent] + self.segments[parent][1] if parent >= 0 else 0)
        return first

    @cached_property
    def depth(self) -> Tensor:
        """``(T,)`` position of each token along its own path."""
        lengths = [length for _, length, _ in self.segments]
        parts = [np.arange(first, first + length) for first, length in zip(self.first_depths, lengths, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _paths(self) -> list[np.ndarray]:
        """Lists flat positions of each segment's ancestors and of itself."""
        paths: list[np.ndarray] = []
        for start, length, parent in self.segments:
            own = np.arange(start, start + length)
            paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        return paths

    @cached_property
    def blocks(self) -> list[Block]:
        """Padded blocks that cover every segment once."""
        paths = self._paths()
        sizes = np.array([(length, len(path)) for (_, length, _), path in zip(self.segments, paths, strict=True)])
        return [self._block(group, sizes, paths) for group in _group_by_size(sizes)]

    @cached_property
    def query_index(self) -> Tensor:
        """``(sum of B * Q,)`` flat positions of all blocks' queries, block by block."""
        return torch.cat([block.query_index.reshape(-1) for block in self.blocks])

    @cached_property
    def key_index(self) -> Tensor:
        """``(sum of B * P,)`` flat positions of all blocks' keys."""
        return torch.cat([block.key_index.reshape(-1) for block in self.blocks])

    @cached_property
    def slot(self) -> Tensor:
        """``(T,)`` index of each token among the blocks' queries."""
        real = torch.cat([(block.query_depth < _FAR).reshape(-1) for block in self.blocks]).nonzero()[:, 0]
        return torch.empty_like(self.subtree_end).index_copy_(0, self.query_index[real], real)

    def _block(self, group: list[int], sizes: np.ndarray, paths: list[np.ndarray]) -> Block:
        num_queries, num_keys = sizes[group].max(axis=0)
        shape_q, shape_k = (len(group), num_queries), (len(group), num_keys)
        query_index, query_depth = np.zeros(shape_q, np.int64), np.full(shape_q, _FAR)
        key_index, key_depth = np.zeros(shape_k, np.int64), np.full(shape_k, 2 * _FAR)
        # Queries are a segment's own tokens, keys those of its whole path; both begin at the left of their row.
        for row, number in enumerate(group):
            length, path = sizes[number][0], paths[number]
            query_index[row, :length] = path[-length:]
            query_depth[row, :length] = np.arange(len(path) - length, len(path))
            key_index[row, : len(path)] = path
            key_depth[row, : len(path)] = np.arange(len(path))
        arrays = (query_index, key_index, query_depth, key_depth)
        query_i, key_i, query_d, key_d = (torch.from_numpy(a).to(self.device) for a in arrays)
        # Padding comes last, so a causal mask hides padding keys from every real query of a root.
        causal = all(self.segments[n][2] < 0 for n in group)
        return Block(query_i, key_i, query_d, key_d, causal)

    def block_mask(self, number: int, window: int | None) -> Tensor:
        """Returns the mask of one block, made once per window and cached for all layers."""
        key = (number, window)
        if key not in self._masks:
            self._masks[key] = self.blocks[number].mask(window)
        return self._masks[key]

    def stretches(self, window: int | None) -> Stretches:
        """Returns the variable-length calls of the forest's attention, made once per window."""
        lengths = [length for _, length, _ in self.segments]
        if window is not None and window >= max(map(sum, zip(self.first_depths, lengths, strict=True))):
            window = None  # no path is as long
        if window not in self._stretches:
            self._stretches[window] = self._whole_paths() if window is None else self._within(window)
        return self._stretches[window]

    def _whole_paths(self) -> Stretches:
        """Makes a causal call within segments, and a call per level of the tree: descendants to their ancestor there.

        Descendants of a segment are contiguous and follow it. What lies between is paired with nothing: the queries
        with an empty stretch of keys, and the keys with one of queries.
        """
        size = len(self.subtree_end)
        starts = [start for start, _, _ in self.segments]
        calls: list[tuple[list[int], list[int]]] = [([*starts, size], [*starts, size])]
        levels: list[int] = []
        for _, _, parent in self.segments:
            levels.append(levels[parent] + 1 if parent >= 0 else 0)
        for level in range(max(levels)):
            queries, keys = [0], [0]
            for number, (start, length, _) in enumerate(self.segments):
                end = start + length
                if levels[number] == level and self._ends[number] > end:
                    queries += [end, end, self._ends[number]]
                    keys += [keys[-1], start, end]
            calls.append(([*queries, size, size], [*keys, keys[-1], size]))
        return self._calls(calls, None, None)

    def _within(self, window: int) -> Stretches:
        """Makes one causal call of segments to the ends of their paths, which hold all that a window shows."""
        tails = [
            path[max(0, len(path) - length - window + 1) :]
            for path, (_, length, _) in zip(self._paths(), self.segments, strict=True)
        ]
        queries = [*(start for start, _, _ in self.segments), len(self.subtree_end)]
        keys = np.cumsum([0, *map(len, tails)]).tolist()
        return self._calls([(queries, keys)], torch.from_numpy(np.concatenate(tails)), window)

    def _calls(
        self, calls: list[tuple[list[int], list[int]]], key_index: Tensor | None, window: int | None
    ) -> Stretches:
        bounds = [np.array(each, np.int32) for call in calls for each in call]
        # One copy to the device.
        whole = torch.from_numpy(np.concatenate(bounds)).to(self.device)
        return Stretches(
            bounds=list(whole.split([len(each) for each in bounds])),
            longest=[int(np.diff(each).max()) for each in bounds],
            key_index=None if key_index is None else key_index.to(self.device),
            window=window,
        )


def _merge_chains(segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Joins each only child with its parent, since one causal product is cheaper than a masked one."""
    num_children = [0] * len(segments)
    for _, _, parent in segments:
        if parent >= 0:
            num_children[parent] += 1
    merged: list[tuple[int, int, int]] = []
    place: list[int] = []  # new index of each segment
    for start, length, parent in segments:
        # Extend the parent's merged segment; the child's tokens directly follow it in the layout.
        if parent >= 0 and num_children[parent] == 1:
            first, so_far, above = merged[place[parent]]
            merged[place[parent]] = (first, so_far + length, above)
            place.append(place[parent])
        else:
            place.append(len(merged))
            merged.append((start, length, place[parent] if parent >= 0 else -1))
    return merged


def _group_by_size(sizes: np.ndarray) -> list[list[int]]:
    """Groups segments so that padding a group to its largest member costs at most ``_MAX_PADDING`` times the area."""
    order = sorted(range(len(sizes)), key=lambda n: (sizes[n][1] == sizes[n][0], sizes[n][0], sizes[n][1]))
    groups: list[list[int]] = []
    needed = 0
    # Neighbours in this order have similar sizes, so a greedy scan is enough.
    for n in order:
        area = int(sizes[n][0] * sizes[n][1])
        if groups:
            group = [*groups[-1], n]
            # Roots are grouped separately: their mask is the plain causal one.
            same_kind = (sizes[n][0] == sizes[n][1]) == (sizes[groups[-1][0]][0] == sizes[groups[-1][0]][1])
            padded = len(group) * int(sizes[group].max(axis=0).prod())
            if same_kind and padded <= _MAX_PADDING * (needed + area):
                groups[-1] = group
                needed += area
                continue
        groups.append([n])
        needed = area
    return groups
