"""Attention over a packed forest, registered with transformers; no model code is patched.

A model loaded with ``attn_implementation="rlhf_tree"`` runs a packed ``SequenceBatch`` when its forward is given the
keyword ``tree=batch.geometry``; without it (generation with a cache, padded batches) the same function is plain
scaled-dot-product attention. The geometry travels through the model's forward as an argument, never in a global.

Legend: T tokens, G segments, H heads, K key/value heads, D head size, B blocks' rows, Q / P padded queries / path keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "rlhf_tree"

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
        self.flex_masks: dict[int | None, Any] = {}  # see flex_attention.py
        ends = [start + length for start, length, _ in segments]
        for number in range(len(segments) - 1, -1, -1):  # children come after their parent
            parent = segments[number][2]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[number])
        self.subtree_end = torch.from_numpy(np.repeat(ends, [length for _, length, _ in segments])).to(device)

    @property
    def depth(self) -> Tensor:
        """``(T,)`` position of each token along its own path."""
        parts: list[np.ndarray] = []
        after: list[int] = []
        for _, length, parent in self.segments:
            first = after[parent] if parent >= 0 else 0
            parts.append(np.arange(first, first + length))
            after.append(first + length)
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


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: TreeGeometry | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention of a packed forest, or plain scaled-dot-product attention where no ``tree`` is given.

    Args:
        module: the attention layer.
        query: ``(1, H, T, D)`` packed, or ``(batch, H, queries, D)``.
        key: ``(1, K, T, D)`` packed.
        value: ``(1, K, T, D)`` packed.
        attention_mask: not read where ``tree`` is given.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; the head size to the power -1/2 by default.
        tree: the geometry of the packed batch.
        sliding_window: a query sees keys less than this many positions before it, along its own path.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H,)`` attention sinks: one more logit per head that takes weight and gives no value.
        is_causal: for calls without ``tree`` and without mask.
        kwargs: other keywords that layers pass; refused unless attention does not depend on them.

    Returns:
        ``(1, T, H, D)`` and no weights.

    Raises:
        NotImplementedError: a keyword that may change attention, or a mask that a layer made itself.
    """
    _check_keywords(kwargs)
    if tree is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        out = _plain(query, key, value, attention_mask, dropout, scaling, softcap, s_aux, causal)
        return out.transpose(1, 2).contiguous(), None

    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.numel() != 1):
        raise NotImplementedError("the layer makes an attention mask of its own, which a packed forest does not read")

    # One gather for all blocks: its backward pass fills one gradient tensor, however many blocks there are.
    blocks = tree.blocks
    queries = _gathered(query, tree.query_index, [block.query_index for block in blocks])
    keys, values = (_gathered(t, tree.key_index, [block.key_index for block in blocks]) for t in (key, value))
    outputs = []
    for number, (block, q, k, v) in enumerate(zip(blocks, queries, keys, values, strict=True)):
        plain_causal = block.causal and (sliding_window is None or sliding_window >= k.shape[2])
        mask = None if plain_causal else tree.block_mask(number, sliding_window)
        out = _plain(q, k, v, mask, dropout, scaling, softcap, s_aux, plain_causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return gather_rows(torch.cat(outputs), tree.slot)[None], None


# Keywords that layers pass on and that do not change attention.
_INERT = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def _check_keywords(keywords: dict[str, Any]) -> None:
    """Refuses keywords that this attention would ignore: position biases, selected keys, another packing's lengths."""
    for name, value in keywords.items():
        if name not in _INERT and value is not None and value is not False:
            raise NotImplementedError(f"the layer passes {name!r}, which this attention does not know")


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """Gathers rows of a tensor: ``(rows, ...), (...) -> (*index.shape, ...)``.

    By an embedding look-up, whose backward pass is 100 times faster on the CPU than that of ``index_select``.
    """
    return F.embedding(index, states.flatten(1)).view(*index.shape, *states.shape[1:])


def _gathered(states_HTD: Tensor, index: Tensor, shapes: list[Tensor]) -> list[Tensor]:
    """Gathers tokens into blocks: ``(1, H, T, D) -> [(B, H, Q, D)]``."""
    # (T, heads, size): a token's heads lie together in memory, so that gathering tokens copies whole rows.
    rows = gather_rows(states_HTD[0].transpose(0, 1), index)
    parts = rows.split([shape.numel() for shape in shapes])
    return [part.unflatten(0, shape.shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Computes scaled-dot-product attention; explicitly where soft-capping or sinks rule out the fused kernels."""
    # A mask made for a cache may be wider than the keys so far.
    if mask is not None and mask.shape[-1] > key.shape[-2]:
        mask = mask[..., : key.shape[-2]]
    # Grouped queries: repeat the shared keys and values.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))

    # A single query sees all keys of a cache: torch's is_causal would align the mask to the first key.
    if softcap is None and sinks is None:
        causal = causal and mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=causal
        )

    # Explicit scores, since the fused kernels know neither soft caps nor sinks.
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else None
        scores = scores + mask if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

    # A sink is one more logit per head: it takes weight in the softmax and is dropped after it.
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(F.dropout(weights, p=dropout, training=dropout > 0), value)


@cache
def register_attention() -> str:
    """Registers the attention with transformers and returns its name, to be given as ``attn_implementation``."""
    AttentionInterface.register(ATTENTION_NAME, tree_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME
