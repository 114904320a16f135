"""Tree attention by FlexAttention, for CUDA: the geometry is a one-line mask, and hidden blocks are skipped.

A model loaded with ``attn_implementation="rlhf_tree_flex"`` uses it for packed batches; calls without a tree go to the
plain attention. FlexAttention has no backward pass on the CPU, so that there it serves evaluation only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .tree_attention import TreeGeometry, tree_attention

FLEX_ATTENTION_NAME = "rlhf_tree_flex"

_COMPILATIONS = 128  # that torch allows in one process, at least


def flex_mask(tree: TreeGeometry, window: int | None) -> BlockMask:
    """Returns the geometry as a block mask, made once per window and cached for all layers."""
    if window not in tree.flex_masks:
        end, depth = tree.subtree_end, tree.depth
        size = len(end)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            on_path = (key <= query) & (query < end[key])
            return on_path if window is None else on_path & (depth[query] - depth[key] < window)

        tree.flex_masks[window] = create_block_mask(visible, None, None, size, size, device=str(end.device))
    mask: BlockMask = tree.flex_masks[window]
    return mask


@cache
def _kernel(compiled: bool) -> Any:
    """Returns the kernel, compiled once per kind of layer; never silently the unfused one, with its T x T scores.

    Each kind of layer (heads, sizes, window, soft cap, with and without gradient) of each model is one compilation, and
    torch gives up after ``recompile_limit`` of them: with ``fullgraph`` as an error.
    """
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_tree_attention(
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention of a packed forest by FlexAttention; arguments and results as in ``tree_attention``.

    FlexAttention has no attention dropout: with it, ``tree_attention`` runs instead.

    Raises:
        RuntimeError: there are more kinds of layers than torch compiles.
    """
    if tree is None or dropout > 0:
        return tree_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            tree,
            sliding_window,
            softcap,
            s_aux,
            **kwargs,
        )

    cap = softcap or 1.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    try:
        out, aux = _kernel(query.is_cuda)(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=flex_mask(tree, sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    except FailOnRecompileLimitHit as error:  # torch's message has many lines, about its own options
        raise RuntimeError(
            f"FlexAttention has been compiled {torch._dynamo.config.recompile_limit} times in this process, once for "
            "each kind of layer of each model, and torch would continue without its kernel: write attention: sdpa, or "
            "use fewer models in one run"
        ) from error
    if s_aux is not None:  # a sink is one more exponential in the denominator
        out = out * torch.sigmoid(aux.lse - s_aux.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2), None


@cache
def register_flex_attention() -> str:
    """Registers the attention with transformers and returns its name, to be given as ``attn_implementation``."""
    AttentionInterface.register(FLEX_ATTENTION_NAME, flex_tree_attention)
    AttentionMaskInterface.register(FLEX_ATTENTION_NAME, sdpa_mask)
    return FLEX_ATTENTION_NAME
