"""Attention over a packed forest, registered with transformers; no model code is patched.

A model loaded with ``attn_implementation=register_attention()`` runs a packed ``SequenceBatch`` when its forward is
given the keyword ``tree=batch.geometry``; without it (generation with a cache, padded batches) the same function is
plain scaled-dot-product attention. The geometry travels through the model's forward as an argument, never in a global.

Kernels, whose results agree up to rounding:

- ``blocks`` gathers segments of similar length, with their paths, into padded blocks of scaled-dot-product attention.
  It applies to every layer, device and precision.
- ``cascade`` (``cascade.py``) is flash attention in one call per level of the tree, on CUDA in half precision;
  elsewhere its arithmetic in plain operators, for tests. It has no attention dropout, soft caps or sinks.
- ``flex`` (``flex_attention.py``) is FlexAttention, which trains on CUDA only. It has no attention dropout.
- A forest whose segments show no more than their slots runs in blocks where it would run in FlexAttention.
- ``auto`` is the cascade where flash attention applies, FlexAttention for soft caps and sinks on CUDA in half
  precision, and blocks for all else.

A layer to which its kernel does not apply runs in blocks.

Legend: T tokens, H heads, K key/value heads, D head size, B blocks' rows, Q / P padded queries / path keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .cached_rows import CachedRows
from .cascade import cascade_attention, flash_applies, plain_applies
from .flex_attention import flex_tree_attention
from .geometry import TreeGeometry

AttentionKernel = Literal["auto", "blocks", "cascade", "flex"]

ATTENTION_KERNELS: Final[tuple[AttentionKernel, ...]] = get_args(AttentionKernel)
ATTENTION_NAME: Final = "rlhf_tree"
_watched: set[AttentionKernel] | None = None  # of ``watched_kernels``
# The name of each kernel with transformers.
ATTENTION_NAMES: Final[dict[AttentionKernel, str]] = {
    kernel: ATTENTION_NAME if kernel == "auto" else f"{ATTENTION_NAME}_{kernel}" for kernel in ATTENTION_KERNELS
}

_FEW_QUERIES = 16  # per row, for which heads are folded
_LEAST_FLEX_SIZE = 16  # of a head, in FlexAttention's products


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: TreeGeometry | None = None,
    cached_rows: CachedRows | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    kernel: AttentionKernel = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention of a packed forest or of rows with a cache, or plain scaled-dot-product attention.

    Args:
        module: the attention layer.
        query: ``(1, H, T, D)`` packed, or ``(batch, H, queries, D)``.
        key: ``(1, K, T, D)`` packed, or ``(batch, K, columns, D)``.
        value: ``(1, K, T, D)`` packed, or ``(batch, K, columns, D)``.
        attention_mask: not read where ``tree`` or ``cached_rows`` is given.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; the head size to the power -1/2 by default.
        tree: the geometry of the packed batch.
        cached_rows: the geometry of new tokens in rows with a cache.
        sliding_window: a query sees keys less than this many positions before it, along its own path.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H,)`` attention sinks: one more logit per head that takes weight and gives no value.
        is_causal: for calls without ``tree`` and without mask.
        kernel: how a forest is computed; does not affect results.
        kwargs: other keywords that layers pass; refused unless attention does not depend on them.

    Returns:
        ``(1, T, H, D)`` and no weights.

    Raises:
        NotImplementedError: a keyword that may change attention, or a mask that a layer made itself.
        RuntimeError: FlexAttention would have to be compiled for more kinds of layers than torch compiles.
    """
    _check_keywords(kwargs)
    if cached_rows is not None:
        _check_mask(attention_mask)
        mask = cached_rows.mask(sliding_window, query.dtype)
        return _folded(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None
    if tree is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if query.shape[2] == 1 and dropout == 0:
            out = _folded(query, key, value, attention_mask, scaling, softcap, s_aux)
        else:
            out = _plain(query, key, value, attention_mask, dropout, scaling, softcap, s_aux, causal)
        return out.transpose(1, 2).contiguous(), None

    _check_mask(attention_mask)
    if tree.prior is not None:
        key, value = tree.prior.placed(_layer_of(module), key, value)
    cast = _as_autocast(query, key, value)
    # FlexAttention's mask is that of a forest whose segments show everything.
    if tree.shown and (kernel == "flex" or softcap is not None or s_aux is not None):
        kernel = "blocks"
    chosen = _kernel_for(kernel, *cast, dropout, softcap, s_aux)
    if _watched is not None and not torch.compiler.is_compiling():
        _watched.add(chosen)
    if chosen == "cascade":
        return cascade_attention(*cast, tree, sliding_window, scaling), None
    if chosen == "flex":
        flex = _flex_outside if torch.compiler.is_compiling() else flex_tree_attention
        return flex(*cast, tree, sliding_window, scaling, softcap, s_aux), None
    blocks = _blocks_outside if torch.compiler.is_compiling() else _blocks
    return blocks(query, key, value, tree, sliding_window, dropout, scaling, softcap, s_aux), None


@contextmanager
def watched_kernels() -> Iterator[set[AttentionKernel]]:
    """Collects the kernels that layers run with on packed forests within the context; not those of compiled layers."""
    global _watched
    before, _watched = _watched, set()
    try:
        yield _watched
    finally:
        _watched = before


def _layer_of(module: nn.Module) -> int:
    """Returns the number of an attention layer, by which caches know it."""
    number = getattr(module, "layer_idx", None)
    if number is None:
        raise NotImplementedError(f"{type(module).__name__} has no number, by which it would find states of contexts")
    return int(number)


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts states as autocast casts those of scaled-dot-product attention."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _kernel_for(
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionKernel:
    """Returns the kernel that a layer runs with: the one asked for where it applies, else blocks."""
    if kernel == "blocks" or dropout > 0:
        return "blocks"
    if kernel == "flex":
        return "flex"
    if softcap is None and sinks is None:
        applies = flash_applies if query.is_cuda else plain_applies
        wanted = query.is_cuda or kernel == "cascade"
        return "cascade" if wanted and applies(query, key, value) else "blocks"
    half = query.dtype in (torch.bfloat16, torch.float16)
    fused = kernel == "auto" and query.is_cuda and half and query.shape[-1] >= _LEAST_FLEX_SIZE
    return "flex" if fused else "blocks"


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeGeometry,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention of a packed forest in padded blocks: ``(1, H, T, D) -> (1, T, H, D)``."""
    # One gather for all blocks: its backward pass fills one gradient tensor, however many blocks there are.
    blocks = tree.blocks
    queries = _gathered(query, tree.query_index, [block.query_index for block in blocks])
    keys, values = (_gathered(t, tree.key_index, [block.key_index for block in blocks]) for t in (key, value))
    outputs = []
    for number, (block, q, k, v) in enumerate(zip(blocks, queries, keys, values, strict=True)):
        plain_causal = block.causal and (window is None or window >= k.shape[2])
        mask = None if plain_causal else tree.block_mask(number, window)
        out = _plain(q, k, v, mask, dropout, scaling, softcap, sinks, plain_causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return gather_rows(torch.cat(outputs), tree.slot)[None]


# Kept out of compiled code around them: their lists have another length in every batch.
_blocks_outside, _flex_outside = torch.compiler.disable(_blocks), torch.compiler.disable(flex_tree_attention)

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


def _check_mask(mask: Tensor | None) -> None:
    """Refuses any mask but the one element that stands for none, which mask creation leaves as it is."""
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != 1):
        raise NotImplementedError("the layer makes an attention mask of its own, which the geometry replaces")


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


def _folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention of a few queries over a cache: ``(N, H, Q, D) -> (N, H, Q, D)``.

    Heads that share keys become further queries of one head, so that keys and values are read once and not repeated.
    With many queries the mask, which is repeated instead, would be the larger of the two.

    Args:
        query: ``(N, H, Q, D)``.
        key: ``(N, K, C, D)``.
        value: ``(N, K, C, D)``.
        mask: ``(N, 1 or H, Q, C)``; ``None`` where a single query sees all keys.
        scaling: factor of the scores.
        softcap: see ``tree_attention``.
        sinks: see ``tree_attention``.
    """
    rows, heads, length, size = query.shape
    if length > _FEW_QUERIES:
        return _plain(query, key, value, mask, 0.0, scaling, softcap, sinks, False)
    shared, repeats = key.shape[1], heads // key.shape[1]
    if mask is not None and repeats > 1 and (mask.shape[1] > 1 or length > 1):
        groups = shared if mask.shape[1] > 1 else 1
        of_heads = mask.expand(-1, groups * repeats, -1, -1)
        mask = of_heads.reshape(mask.shape[0], groups, repeats * length, mask.shape[-1])
    if sinks is not None and length > 1:
        sinks = sinks.repeat_interleave(length)
    folded = query.reshape(rows, shared, repeats * length, size)
    out = _plain(folded, key, value, mask, 0.0, scaling, softcap, sinks, False)
    return out.reshape(rows, heads, length, value.shape[-1])


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
        with _without_cudnn():
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
        of_queries = sinks.reshape(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, of_queries.expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(F.dropout(weights, p=dropout, training=dropout > 0), value)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keeps torch from cuDNN's attention, which is planned anew, for up to a second, whenever a shape is new.

    Shapes of blocks are new in every micro-batch, and the length of a cache with every token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@cache
def register_attention(kernel: AttentionKernel = "auto") -> str:
    """Registers a kernel with transformers and returns its name, to be given as ``attn_implementation``."""
    name = ATTENTION_NAMES[kernel]
    AttentionInterface.register(name, partial(tree_attention, kernel=kernel))
    AttentionMaskInterface.register(name, _mask)
    return name


def _mask(*, q_length: int, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Makes masks as for torch's attention, without reading what is given on a GPU or for one more token of each row.

    Whether it masks anything decides in torch's if it is made, so that the host would wait for the device. A step of
    generation is given a mask only if it does.
    """
    if attention_mask is not None and (q_length == 1 or attention_mask.is_cuda):
        arguments["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, attention_mask=attention_mask, **arguments)
