"""Geometry of a packed forest: which token sees which, as the indices that each kernel of ``tree_attention`` reads.

Legend: T tokens, B blocks' rows, Q / P padded queries / path keys, N stretches of a variable-length call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.transfer import to_device
from .prior_context import PriorStates

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


class Shown(NamedTuple):
    """Says what a segment shows to those below it, where that is not everything.

    Args:
        offsets: places of its tokens that they see, ascending.
        hidden: number of the last tokens that the segment sees above it, and that they do not see; ``None`` = all.
    """

    offsets: np.ndarray
    hidden: int | None = 0


_FAR = 1 << 40  # depth of padding queries, which see all keys of a path; padding keys lie twice as far, hidden from all


class TreeGeometry:
    """Visibility between the tokens of a packed forest.

    Arrays of a kernel are made on the host when a layer first asks for them, and copied to the device at once. A set
    ``wanted`` that the geometries of many batches share remembers what was asked for, so that ``pack`` can copy it with
    the rest of the next batch.

    Args:
        segments: ``(start, length, parent)`` per segment in depth-first order; parent is -1 for a root.
        device: device of the index tensors.
        wanted: see above; by default nothing is copied ahead.
        shown: of segments that do not show everything, by their number. Depths count the tokens that a path sees.

    Example:
        >>> pair = TreeGeometry([(0, 2, -1), (2, 1, 0), (3, 2, 0)])  # a prompt of two tokens, and two completions
        >>> pair.subtree_end.tolist(), pair.depth.tolist()
        ([5, 5, 3, 5, 5], [0, 1, 2, 2, 3])
    """

    def __init__(
        self,
        segments: list[tuple[int, int, int]],
        device: torch.device | None = None,
        wanted: set[Part] | None = None,
        shown: Mapping[int, Shown] | None = None,
    ) -> None:
        segments, self.shown = _merge_chains(segments, shown or {})
        self.segments = segments
        self.device = device
        self.wanted = set() if wanted is None else wanted
        self.prior: PriorStates | None = None  # of the contexts that trees follow, set before a forward
        self.num_tokens = sum(length for _, length, _ in segments)
        self._tensors: dict[Part, dict[str, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._stretches: dict[int | None, Stretches] = {}
        self.flex_masks: dict[int | None, Any] = {}  # see flex_attention.py
        self.ends = ends = [start + length for start, length, _ in segments]  # of each segment with its descendants
        for number in range(len(segments) - 1, -1, -1):  # children come after their parent
            parent = segments[number][2]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])

    def tensors(self, make: MakeArrays, window: int | None = None) -> dict[str, Tensor]:
        """Returns what a function makes of the geometry, on the device.

        Args:
            make: a function of a module: from the geometry and ``window`` to arrays by name.
            window: see ``stretches``.
        """
        part = (make, window)
        if part not in self._tensors:
            self.wanted.add(part)
            self._tensors[part] = to_device(make(self, window), self.device)
        return self._tensors[part]

    def wanted_arrays(self) -> dict[tuple[Part, str], np.ndarray]:
        """Makes everything that earlier batches have asked for."""
        parts = [(part, part[0](self, part[1])) for part in self.wanted]
        return {(part, name): array for part, arrays in parts for name, array in arrays.items()}

    def place(self, tensors: dict[tuple[Part, str], Tensor]) -> None:
        """Takes the arrays of ``wanted_arrays`` when they have been copied."""
        for (part, name), tensor in tensors.items():
            self._tensors.setdefault(part, {})[name] = tensor

    @property
    def subtree_end(self) -> Tensor:
        """``(T,)`` the flat position after the last descendant of each token."""
        return self.tensors(visibility_arrays)["subtree_end"]

    @property
    def depth(self) -> Tensor:
        """``(T,)`` position of each token along its own path."""
        return self.tensors(visibility_arrays)["depth"]

    @cached_property
    def first_depths(self) -> list[int]:
        """Position of each segment's first token along its path."""
        if self.shown:
            return [len(seen) for seen in self._seen]
        first: list[int] = []
        for _, _, parent in self.segments:
            first.append(first[parent] + self.segments[parent][1] if parent >= 0 else 0)
        return first

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """Flat positions of each segment's ancestors, as far as it sees them, and of itself."""
        paths: list[np.ndarray] = []
        for number, (start, length, parent) in enumerate(self.segments):
            own = np.arange(start, start + length)
            above = self._seen[number] if self.shown else paths[parent] if parent >= 0 else own[:0]
            paths.append(np.concatenate([above, own]) if len(above) else own)
        return paths

    @cached_property
    def _seen(self) -> list[np.ndarray]:
        """Flat positions of the tokens that each segment sees above it."""
        seen: list[np.ndarray] = []
        below: list[np.ndarray] = []  # of the tokens that each segment's children see
        for number, (start, length, parent) in enumerate(self.segments):
            seen.append(below[parent] if parent >= 0 else np.empty(0, np.int64))
            shown = self.shown.get(number, Shown(np.arange(length)))
            kept = 0 if shown.hidden is None else len(seen[-1]) - shown.hidden
            below.append(np.concatenate([seen[-1][:kept], start + shown.offsets]))
        return seen

    # Padded blocks.

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Numbers of the segments of each padded block."""
        return _group_by_size(self._sizes)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Length of each segment, and of the path that ends with it: ``(segments, 2)``."""
        lengths = np.array([length for _, length, _ in self.segments])
        return np.stack([lengths, lengths + self.first_depths], axis=1)

    @cached_property
    def blocks(self) -> list[Block]:
        """Padded blocks that cover every segment once."""
        flat = self.tensors(block_arrays)
        shapes = [(len(group), *self._sizes[group].max(axis=0).tolist()) for group in self.groups]
        by_block = []
        for name, width in (("query_index", 1), ("key_index", 2), ("query_depth", 1), ("key_depth", 2)):
            parts = flat[name].split([shape[0] * shape[width] for shape in shapes])
            by_block.append([part.view(shape[0], -1) for part, shape in zip(parts, shapes, strict=True)])
        # Padding comes last, so a causal mask hides padding keys from every real query of a root.
        causal = [all(self.segments[n][2] < 0 for n in group) for group in self.groups]
        return [Block(*parts) for parts in zip(*by_block, causal, strict=True)]

    @property
    def query_index(self) -> Tensor:
        """``(sum of B * Q,)`` flat positions of all blocks' queries, block by block."""
        return self.tensors(block_arrays)["query_index"]

    @property
    def key_index(self) -> Tensor:
        """``(sum of B * P,)`` flat positions of all blocks' keys."""
        return self.tensors(block_arrays)["key_index"]

    @property
    def slot(self) -> Tensor:
        """``(T,)`` index of each token among the blocks' queries."""
        return self.tensors(block_arrays)["slot"]

    def block_of(self, group: np.ndarray) -> dict[str, np.ndarray]:
        """Lays out the segments of a block, one per row."""
        lengths, ends = self._sizes[group].T
        starts = np.array([self.segments[n][0] for n in group])
        columns, key_columns = (np.arange(sizes.max()) for sizes in (lengths, ends))
        # Queries are a segment's own tokens, keys those of its whole path; both begin at the left of their row.
        is_query, is_key = columns < lengths[:, None], key_columns < ends[:, None]
        key_index = np.zeros(is_key.shape, np.int64)
        key_index[is_key] = np.concatenate([self.paths[n] for n in group])
        return {
            "query_index": np.where(is_query, starts[:, None] + columns, 0),
            "key_index": key_index,
            "query_depth": np.where(is_query, (ends - lengths)[:, None] + columns, _FAR),
            "key_depth": np.where(is_key, key_columns, 2 * _FAR),
        }

    def block_mask(self, number: int, window: int | None) -> Tensor:
        """Returns the mask of one block, made once per window and cached for all layers."""
        key = (number, window)
        if key not in self._masks:
            self._masks[key] = self.blocks[number].mask(window)
        return self._masks[key]

    def drop_masks(self) -> None:
        """Frees masks, which are made again from indices when they are needed, and the states of contexts."""
        self._masks, self.flex_masks, self.prior = {}, {}, None

    # Variable-length calls.

    def stretches(self, window: int | None) -> Stretches:
        """Returns the variable-length calls of the forest's attention, made once per window.

        Args:
            window: a query sees keys less than this many positions before it; ``None`` is no limit.
        """
        if window not in self._stretches:
            self._make_stretches(window)
        return self._stretches[window]

    @property
    def stretched(self) -> list[int | None]:
        """Windows whose calls have been made."""
        return list(self._stretches)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would trace what the host computes
    def _make_stretches(self, window: int | None) -> None:
        calls, _, reach = self.calls(window)
        tensors = self.tensors(stretch_arrays, window)
        self._stretches[window] = Stretches(
            bounds=list(tensors["bounds"].split([len(each) for each in calls])),
            longest=[int(np.diff(each).max()) for each in calls],
            key_index=tensors.get("key_index"),
            window=reach,
        )

    def calls(self, window: int | None) -> tuple[list[list[int]], np.ndarray | None, int | None]:
        """Lists bounds of queries and of keys, call after call; gathered keys; and the window that has an effect."""
        longest_path, reach = int(self._sizes[:, 1].max()), window
        if window is None or window >= longest_path:
            if not self.shown:
                return self._whole_paths(), None, None
            window, reach = longest_path, None
        tails = [
            path[max(0, len(path) - length - window + 1) :]
            for path, (_, length, _) in zip(self.paths, self.segments, strict=True)
        ]
        # One causal call of segments to the ends of their paths, which hold all that a window or a segment shows.
        queries = [*(start for start, _, _ in self.segments), self.num_tokens]
        return [queries, np.cumsum([0, *map(len, tails)]).tolist()], np.concatenate(tails), reach

    def _whole_paths(self) -> list[list[int]]:
        """Makes a causal call within segments, and a call per level of the tree: descendants to their ancestor there.

        Descendants of a segment are contiguous and follow it. Tokens between are paired with nothing: the queries
        with an empty stretch of keys, and the keys with one of queries.
        """
        size = self.num_tokens
        starts = [start for start, _, _ in self.segments]
        calls: list[list[int]] = [[*starts, size], [*starts, size]]
        levels: list[int] = []
        for _, _, parent in self.segments:
            levels.append(levels[parent] + 1 if parent >= 0 else 0)
        for level in range(max(levels)):
            queries, keys = [0], [0]
            for number, (start, length, _) in enumerate(self.segments):
                end = start + length
                if levels[number] == level and self.ends[number] > end:
                    queries += [end, end, self.ends[number]]
                    keys += [keys[-1], start, end]
            calls += [[*queries, size, size], [*keys, keys[-1], size]]
        return calls


MakeArrays = Callable[[TreeGeometry, int | None], dict[str, np.ndarray]]
Part = tuple[MakeArrays, int | None]


def visibility_arrays(tree: TreeGeometry, window: int | None) -> dict[str, np.ndarray]:
    """Makes ``subtree_end`` and ``depth`` of every token."""
    lengths = [length for _, length, _ in tree.segments]
    parts = [np.arange(first, first + length) for first, length in zip(tree.first_depths, lengths, strict=True)]
    return {"subtree_end": np.repeat(tree.ends, lengths), "depth": np.concatenate(parts)}


def block_arrays(tree: TreeGeometry, window: int | None) -> dict[str, np.ndarray]:
    """Makes the indices of all padded blocks, block after block, and each token's place among their queries."""
    blocks = [tree.block_of(group) for group in tree.groups]
    arrays = {name: np.concatenate([block[name].reshape(-1) for block in blocks]) for name in blocks[0]}
    real = np.flatnonzero(arrays["query_depth"] < _FAR)
    slot = np.empty(tree.num_tokens, np.int64)
    slot[arrays["query_index"][real]] = real
    return {**arrays, "slot": slot}


def stretch_arrays(tree: TreeGeometry, window: int | None) -> dict[str, np.ndarray]:
    """Makes the bounds of variable-length calls, one after the other, and the positions of gathered keys."""
    calls, tails, _ = tree.calls(window)
    bounds = {"bounds": np.concatenate(calls).astype(np.int32)}
    return bounds if tails is None else {**bounds, "key_index": tails}


def _merge_chains(
    segments: list[tuple[int, int, int]], shown: Mapping[int, Shown]
) -> tuple[list[tuple[int, int, int]], dict[int, Shown]]:
    """Joins each only child with its parent, since one causal product is cheaper than a masked one.

    Segments that do not show everything stay as they are; they are returned by their new numbers.
    """
    num_children = [0] * len(segments)
    for _, _, parent in segments:
        if parent >= 0:
            num_children[parent] += 1
    merged: list[tuple[int, int, int]] = []
    place: list[int] = []  # new index of each segment
    for number, (start, length, parent) in enumerate(segments):
        # Extend the parent's merged segment; the child's tokens directly follow it in the layout.
        if parent >= 0 and num_children[parent] == 1 and not {number, parent} & shown.keys():
            first, so_far, above = merged[place[parent]]
            merged[place[parent]] = (first, so_far + length, above)
            place.append(place[parent])
        else:
            place.append(len(merged))
            merged.append((start, length, place[parent] if parent >= 0 else -1))
    return merged, {place[number]: each for number, each in shown.items()}


def _group_by_size(sizes: np.ndarray) -> list[np.ndarray]:
    """Groups segments so that padding a group to its largest member costs at most ``_MAX_PADDING`` times the area."""
    is_root = sizes[:, 0] == sizes[:, 1]
    order = np.lexsort((sizes[:, 1], sizes[:, 0], is_root))
    groups: list[list[int]] = []
    needed = rows = columns = 0
    # Neighbours in this order have similar sizes, so a greedy scan is enough.
    for n, (length, end), root in zip(order.tolist(), sizes[order].tolist(), is_root[order].tolist(), strict=True):
        padded = (len(groups[-1]) + 1) * max(rows, length) * max(columns, end) if groups else 0
        # Roots are grouped separately: their mask is the plain causal one.
        if groups and root == is_root[groups[-1][0]] and padded <= _MAX_PADDING * (needed + length * end):
            groups[-1].append(n)
            needed, rows, columns = needed + length * end, max(rows, length), max(columns, end)
        else:
            groups.append([n])
            needed, rows, columns = length * end, length, end
    return [np.array(group) for group in groups]
