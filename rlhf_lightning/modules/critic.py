"""What predicts the returns: a head on the policy's hidden states, or a model of its own.

Legend: N scored tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models import base_model, hidden_states, load_causal_lm, resolve_layout
from ..models.heads import HeadKind, RewardHead, freeze_output_projection, load_head, read_head_options
from ..sequences import SequenceBatch, register_attention, register_flex_attention


class Critic(nn.Module):
    """Values of states: of the hidden states of the policy, or of a model of its own.

    Args:
        head: from hidden states to one number.
        model: the critic's own model; ``None`` where it reads the policy's hidden states.
        layout: how batches run through the own model.
    """

    def __init__(
        self, head: RewardHead, model: nn.Module | None = None, layout: Literal["auto", "packed", "padded"] = "auto"
    ) -> None:
        super().__init__()
        self.head = head
        self.model = model
        self._requested_layout = layout
        self._layout: Literal["packed", "padded"] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether it reads the policy's hidden states."""
        return self.model is None

    def values(self, hidden_ND: Tensor) -> Tensor:
        """``(N, D) -> (N,)``."""
        values: Tensor = self.head(hidden_ND)[:, 0, 0]
        return values

    def own_values(self, batch: SequenceBatch) -> Tensor:
        """``(N,)`` values of the states before the scored tokens, by the critic's own model."""
        assert self.model is not None
        if self._layout is None:
            self._layout = resolve_layout(self.model, self._requested_layout)
        hidden = hidden_states(self.model, batch, self._layout)
        return self.values(hidden.read(batch.source_index, batch.sequence_index, batch.source_depth))


def shared_critic(hidden_size: int, *, kind: HeadKind, seed: int, dtype: torch.dtype) -> Critic:
    """A head on the policy's hidden states; its values start at 0."""
    return Critic(_silent(RewardHead(hidden_size, kind=kind, seed=seed, dtype=dtype)))


def own_critic(
    source: str,
    *,
    kind: HeadKind,
    seed: int,
    dtype: torch.dtype,
    attention: Literal["sdpa", "flex"],
    layout: Literal["auto", "packed", "padded"],
    **options: Any,
) -> Critic:
    """A model of its own with a head: the head that is stored with it, or one whose values start at 0.

    Args:
        source: Hugging Face id or folder; that of a reward model, too.
        kind: of the head, where none is stored.
        seed: of the head's first inner weights.
        dtype: of the weights.
        attention: kernel of the packed layout.
        layout: how batches run.
        options: of ``load_causal_lm``.
    """
    name = register_attention() if attention == "sdpa" else register_flex_attention()
    model = load_causal_lm(source, dtype=dtype, attn_implementation=name, headless=True, **options)
    freeze_output_projection(model)
    size = int(base_model(model).config.get_text_config().hidden_size)
    head = RewardHead(size, kind=read_head_options(source).get("head", kind), seed=seed, dtype=dtype)
    if not load_head(head, source):
        _silent(head)
    return Critic(head, model, layout)


def _silent(head: RewardHead) -> RewardHead:
    with torch.no_grad():
        head.weight.zero_()
    return head
