"""The cascade: attention of a packed forest as one operator of few variable-length calls, without gathers and masks.

Below a segment, in depth-first order, lies one contiguous stretch of queries, and all of them see the whole segment. So
attention is a causal variable-length call over the segments themselves, and for each level of the tree a call in which
descendants see their ancestor on that level. With ``O_c`` the output of call ``c`` and ``L_c`` its log-sum-exp,

    ``L = log(sum_c exp(L_c))``,   ``O = sum_c exp(L_c - L) O_c``.

Flash attention (Dao 2023, arXiv 2307.08691) computes the backward pass from ``P = exp(S - L)`` and
``dS = P (dP - rowsum(dO O))``. Given the merged ``O`` and ``L``, each call's backward is its exact share of the
gradient: scores of all calls belong to one softmax, and no gradient of a log-sum-exp arises. Keys and values are kept
once, and heads of queries that share a head of keys stay grouped.

A window cuts through ancestors, so there the call is one: segments, causally, to the gathered ends of their paths.
Keys and values are gathered again in the backward pass, and not kept.

CUDA runs torch's flash attention; every other device the same arithmetic in plain operators, in at least fp32.

Legend: T tokens, P keys, H heads, K key/value heads, R = H / K, D head size, N stretches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from .geometry import TreeGeometry

_HALF = (torch.bfloat16, torch.float16)


class _Call(NamedTuple):
    """One variable-length call: ``(N + 1,)`` bounds of its stretches, their longest lengths, and its mask."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    causal: bool
    window: int | None
    scale: float


@torch.library.custom_op("rlhf_lightning::cascade", mutates_args=())
def cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[Tensor],
    longest: list[int],
    key_index: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes attention of a packed forest.

    Args:
        query: ``(T, H, D)``.
        key: ``(T, K, D)``.
        value: ``(T, K, D)``.
        bounds: see ``Stretches``.
        longest: see ``Stretches``.
        key_index: see ``Stretches``.
        window: see ``Stretches``.
        scale: factor of the scores.

    Returns:
        The output ``(T, H, D)``, and the log-sum-exp of each query's scores, ``(H, T)`` in at least fp32, which has no
        gradient.

    Example:
        >>> pair = TreeGeometry([(0, 2, -1), (2, 1, 0), (3, 2, 0)])  # a prompt of two tokens, and two completions
        >>> query, value = torch.zeros(5, 1, 8), torch.arange(5.0).expand(1, 8, 5).permute(2, 0, 1)
        >>> out, _ = cascade(query, query, value, *pair.stretches(None), 1.0)
        >>> [round(mean, 2) for mean in out[:, 0, 0].tolist()]  # over the values that each token sees
        [0.0, 0.5, 1.0, 1.33, 2.0]
    """
    keys, values = _chosen(key, value, key_index)
    first, *others = _calls(bounds, longest, window, scale)
    part, lse = _forward(query, keys, values, first)
    out = part.to(lse.dtype)
    for call in others:
        part, part_lse = _forward(query, keys, values, call)
        # A query without keys has an infinite log-sum-exp, as flash attention writes it.
        part_lse = part_lse.masked_fill(part_lse == math.inf, -math.inf)
        merged = torch.logaddexp(lse, part_lse)
        out = out.addcmul_(part - out, (part_lse - merged).exp().T.unsqueeze(-1))
        lse = merged
    return out.to(query.dtype).contiguous(), lse


@torch.library.custom_op("rlhf_lightning::cascade_backward", mutates_args=())
def _cascade_backward(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: list[Tensor],
    longest: list[int],
    key_index: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of query, key and value from that of the output."""
    keys, values = _chosen(key, value, key_index)
    first, *others = _calls(bounds, longest, window, scale)
    found = _backward(slope, query, keys, values, out, lse, first)
    for call in others:
        found = [a.add_(b) for a, b in zip(found, _backward(slope, query, keys, values, out, lse, call), strict=True)]
    of_query, *of_keys = found
    if key_index is not None:
        # A key that many paths gather is summed over them in the precision of the log-sum-exp.
        sums = torch.zeros(key.shape, dtype=lse.dtype, device=key.device)
        of_keys = [sums.index_add(0, key_index, each.to(lse.dtype)).to(key.dtype) for each in of_keys]
    return of_query.contiguous(), of_keys[0].contiguous(), of_keys[1].contiguous()


@cascade.register_fake
def _(query: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=_wide(query))


@_cascade_backward.register_fake
def _(slope: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, ctx.longest, key_index, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, key_index, *bounds)


def _differentiate(ctx: Any, slope: Tensor | None, _: Any) -> tuple[Any, ...]:
    query, key, value, out, lse, key_index, *bounds = ctx.saved_tensors
    found: tuple[Any, ...] = (None, None, None)
    if slope is not None:
        given = (query, key, value, out, lse, bounds, ctx.longest, key_index, ctx.window, ctx.scale)
        found = _cascade_backward(slope.contiguous(), *given)
    return (*found, [None] * len(bounds), None, None, None, None)


cascade.register_autograd(_differentiate, setup_context=_keep)


def _chosen(key: Tensor, value: Tensor, key_index: Tensor | None) -> tuple[Tensor, Tensor]:
    return (key, value) if key_index is None else (key[key_index], value[key_index])


def _calls(bounds: list[Tensor], longest: list[int], window: int | None, scale: float) -> list[_Call]:
    return [
        _Call(bounds[n], bounds[n + 1], longest[n], longest[n + 1], causal=n == 0, window=window, scale=scale)
        for n in range(0, len(bounds), 2)
    ]


def _forward(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Returns the output of a call and its log-sum-exp: 0 and infinity for queries without keys."""
    return (flash_forward if query.is_cuda else plain_forward)(query, key, value, call)


def _backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> list[Tensor]:
    """Returns a call's share of the gradients of query, key and value, given the merged output and log-sum-exp."""
    return (flash_backward if query.is_cuda else plain_backward)(slope, query, key, value, out, lse, call)


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


# Torch's kernels.


def flash_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tells whether torch's flash attention runs these states ``(1, H, T, D)``: their device, precision and sizes."""
    if query.dtype not in _HALF or query.shape[-1] % 8 or value.shape[-1] != query.shape[-1]:
        return False
    grouped = query.shape[1] != key.shape[1]
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, grouped)))


def _flash_window(call: _Call) -> dict[str, int]:
    # Keys before and after the one that a query is aligned with; -1 is all of them.
    left = -1 if call.window is None else call.window - 1
    return {"window_size_left": left, "window_size_right": 0 if call.causal else -1}


def flash_forward(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Runs a call by torch's flash attention."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.queries,
        call.keys,
        call.longest_queries,
        call.longest_keys,
        0.0,  # dropout
        call.causal,
        False,  # no debug mask
        scale=call.scale,
        **_flash_window(call),
    )
    return out, lse


def flash_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> list[Tensor]:
    """Runs a call's backward by torch's flash attention."""
    unread = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of random numbers, for dropout
    found = torch.ops.aten._flash_attention_backward(
        slope,
        query,
        key,
        value,
        out,
        lse,
        call.queries,
        call.keys,
        call.longest_queries,
        call.longest_keys,
        0.0,  # dropout
        call.causal,
        unread,
        unread,
        scale=call.scale,
        **_flash_window(call),
    )
    return list(found)


# The same in plain operators.


def plain_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tells whether plain operators compute a call on these states ``(1, H, T, D)``: heads of one size."""
    return query.shape[-1] == key.shape[-1] == value.shape[-1]


def plain_forward(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Runs a call in at least fp32, one stretch after another."""
    dtype = _wide(query)
    out = query.new_zeros(query.shape, dtype=dtype)
    lse = query.new_full((query.shape[1], query.shape[0]), math.inf, dtype=dtype)
    with torch.autocast(query.device.type, enabled=False):
        for rows, columns, scores in _stretches(query, key, call):
            totals = scores.logsumexp(dim=-1, keepdim=True)
            seen = (scores - totals).exp() @ _per_head(value[columns])
            out[rows] = _ungrouped(seen)
            lse[:, rows] = totals[..., 0].flatten(0, 1)
    return out, lse


def plain_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> list[Tensor]:
    """Runs a call's backward in at least fp32, one stretch after another."""
    found = [torch.zeros(each.shape, dtype=_wide(each), device=each.device) for each in (query, key, value)]
    heads = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        for rows, columns, scores in _stretches(query, key, call):
            slopes, outs = _grouped(slope[rows], heads), _grouped(out[rows], heads)
            weights = (scores - lse[:, rows].unflatten(0, (heads, -1)).unsqueeze(-1)).exp()
            of_weights = slopes @ _per_head(value[columns]).mT - (slopes * outs).sum(dim=-1, keepdim=True)
            of_scores = weights * of_weights * call.scale
            found[0][rows] = _ungrouped(of_scores @ _per_head(key[columns]))
            found[1][columns] = (of_scores.mT @ _grouped(query[rows], heads)).sum(dim=1).transpose(0, 1)
            found[2][columns] = (weights.mT @ slopes).sum(dim=1).transpose(0, 1)
    return [each.to(query.dtype) for each in found]


def _stretches(query: Tensor, key: Tensor, call: _Call) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows, columns and scores ``(K, R, rows, columns)`` of each stretch that has both."""
    bounds = (call.queries.tolist(), call.keys.tolist())
    for begin, end, first, last in zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True):
        if begin == end or first == last:
            continue
        rows, columns = slice(begin, end), slice(first, last)
        scores = _grouped(query[rows], key.shape[1]) @ _per_head(key[columns]).mT * call.scale
        if call.causal:
            place = torch.arange(begin - end, 0, device=query.device)[:, None]  # of queries, counted from the last key
            other = torch.arange(first - last, 0, device=query.device)
            hidden = other > place
            if call.window is not None:
                hidden |= other <= place - call.window
            scores = scores.masked_fill(hidden, -math.inf)
        yield rows, columns, scores


def _grouped(states: Tensor, heads: int) -> Tensor:
    """Groups heads by the head of keys that they read: ``(Q, H, D) -> (K, R, Q, D)``."""
    grouped: Tensor = states.to(_wide(states)).unflatten(1, (heads, -1))
    return grouped.permute(1, 2, 0, 3)


def _ungrouped(states: Tensor) -> Tensor:
    """Reverses ``_grouped``: ``(K, R, Q, D) -> (Q, H, D)``."""
    return states.permute(2, 0, 1, 3).flatten(1, 2)


def _per_head(states: Tensor) -> Tensor:
    """Puts heads of keys or values first: ``(P, K, D) -> (K, 1, P, D)``."""
    return states.to(_wide(states)).transpose(0, 1).unsqueeze(1)


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeGeometry, window: int | None, scaling: float | None
) -> Tensor:
    """Runs the operator on states as layers have them: ``(1, H, T, D) -> (1, T, H, D)``."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = (states[0].transpose(0, 1) for states in (query, key, value))
    out, _ = cascade(*tokens, *tree.stretches(window), scale)
    shaped: Tensor = out[None]
    return shaped
