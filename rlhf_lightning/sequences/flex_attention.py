"""Tree attention by FlexAttention, for CUDA: the geometry is a one-line mask, and hidden blocks are skipped.

FlexAttention has no backward pass on the CPU, so that there it serves evaluation only.

Legend: T tokens, H heads, B blocks of 128 tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..utils.compilation import allow_compilations
from .geometry import TreeGeometry

_BLOCK = 128  # tokens on a side of a block, FlexAttention's default


def flex_mask(tree: TreeGeometry, window: int | None) -> BlockMask:
    """Returns the geometry as a block mask, made once per window and cached for all layers."""
    if window not in tree.flex_masks:
        lists, end, depth = tree.tensors(flex_arrays, window), tree.subtree_end, tree.depth

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            on_path = (key <= query) & (query < end[key])
            return on_path if window is None else on_path & (depth[query] - depth[key] < window)

        tree.flex_masks[window] = BlockMask.from_kv_blocks(
            lists["part_number"],
            lists["part"],
            lists["full_number"],
            lists["full"],
            BLOCK_SIZE=_BLOCK,
            mask_mod=visible,
            seq_lengths=(tree.num_tokens, tree.num_tokens),
        )
    mask: BlockMask = tree.flex_masks[window]
    return mask


def flex_arrays(tree: TreeGeometry, window: int | None) -> dict[str, np.ndarray]:
    """Lists the blocks of keys that each block of queries sees in part, and in full: how many, and which."""
    counts = visible_pairs(tree, window)
    full = counts == _BLOCK * _BLOCK
    part_number, part = _listed((counts > 0) & ~full)
    full_number, whole = _listed(full)
    return {"part_number": part_number, "part": part, "full_number": full_number, "full": whole}


def visible_pairs(tree: TreeGeometry, window: int | None) -> np.ndarray:
    """Counts the visible pairs of each block of queries (row) and block of keys: ``(B, B)``.

    Segments are cut where blocks end. Along a path, a piece sees all of every piece above it, up to its window, so that
    its pairs have closed forms; no mask of T x T is made.

    Args:
        tree: the geometry.
        window: a query sees keys less than this many positions before it; ``None`` is no limit.

    Example:
        >>> visible_pairs(TreeGeometry([(0, 130, -1)]), None).tolist()
        [[8256, 0], [256, 3]]
    """
    size = tree.num_tokens
    reach = size if window is None else window
    start, length, depth, above = _pieces(tree)
    blocks = -(-size // _BLOCK)

    # Pieces see themselves up to the diagonal.
    rows, columns, counts = [start // _BLOCK], [start // _BLOCK], [_staircase(length) - _staircase(length - reach)]
    own, other = np.arange(len(start)), above
    while True:
        # Pieces further up a path are further away: the first out of reach ends the walk.
        near = (other >= 0) & (depth[own] - depth[other] - length[other] + 1 < reach)
        own, other = own[near], other[near]
        if not len(own):
            break
        rows.append(start[own] // _BLOCK)
        columns.append(start[other] // _BLOCK)
        counts.append(_pairs_closer(reach - depth[own] + depth[other], length[own], length[other]))
        other = above[other]
    cells = np.concatenate(rows) * blocks + np.concatenate(columns)
    return np.bincount(cells, np.concatenate(counts), blocks * blocks).astype(np.int64).reshape(blocks, blocks)


def _pieces(tree: TreeGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts segments where blocks end: start, length, depth of the first token, and the piece before it on its path."""
    pieces: list[tuple[int, int, int, int]] = []
    last: list[int] = []  # of each segment
    for (start, length, parent), depth in zip(tree.segments, tree.first_depths, strict=True):
        end, begin, above = start + length, start, last[parent] if parent >= 0 else -1
        while begin < end:
            until = min(end, (begin // _BLOCK + 1) * _BLOCK)
            pieces.append((begin, until - begin, depth + begin - start, above))
            begin, above = until, len(pieces) - 1
        last.append(above)
    start, length, depth, above = np.array(pieces, np.int64).T
    return start, length, depth, above


def _staircase(steps: np.ndarray) -> np.ndarray:
    """Adds the numbers from 1 to ``steps``; 0 where ``steps`` is 0."""
    steps = np.maximum(steps, 0)
    total: np.ndarray = steps * (steps + 1) // 2
    return total


def _pairs_closer(distance: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Counts pairs with ``x - y < distance``, for x below ``width`` and y below ``height``."""
    far = _staircase(width - distance) - _staircase(width - distance - height)
    near: np.ndarray = width * height - far + _staircase(-distance) - _staircase(-distance - height)
    return near


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists the columns of each row: how many, and the columns themselves before the others."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(axis=1).astype(np.int32)[None, None], order.astype(np.int32)[None, None]


@cache
def _kernel(compiled: bool) -> Any:
    """Returns the kernel, compiled once per kind of layer; never silently the unfused one, with its T x T scores.

    Each kind of layer (heads, sizes, window, soft cap, with and without gradient) is one compilation, which models of
    the same sizes share, and torch gives up after ``recompile_limit`` of them: with ``fullgraph`` as an error.
    Batches of more than one block are one more. Soft caps are constants: torch cannot trace the backward pass of a
    score that reads a number which may change.
    """
    if not compiled:
        return flex_attention
    allow_compilations()
    fused = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return torch._dynamo.config.patch(specialize_float=True)(fused)


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeGeometry,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention of a packed forest by FlexAttention: ``(1, H, T, D) -> (1, T, H, D)``; see ``tree_attention``.

    Raises:
        RuntimeError: there are more kinds of layers than torch compiles.
    """
    cap = softcap or 1.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    try:
        out, aux = _kernel(query.is_cuda)(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=flex_mask(tree, window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    except FailOnRecompileLimitHit as error:  # torch's message has many lines, about its own options
        raise RuntimeError(
            f"FlexAttention has been compiled {torch._dynamo.config.recompile_limit} times in this process, once for "
            "each kind of layer of each model, and torch would continue without its kernel: write attention: blocks, "
            "or use fewer models in one run"
        ) from error
    if sinks is not None:  # a sink is one more exponential in the denominator
        out = out * torch.sigmoid(aux.lse - sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
    transposed: Tensor = out.transpose(1, 2)
    return transposed
