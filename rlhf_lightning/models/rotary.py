"""Rotary frequencies that are the same in every forward.

A model with LongRoPE (https://arxiv.org/abs/2402.13753; Phi-3 with 128k positions) has two sets of frequencies, and
transformers takes one of them in every forward, by the longest sequence that is in it. What a sequence gives would so
depend on those that it is batched with, and a token that is generated on the keys that stand before it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

log = logging.getLogger(__name__)

_LIMIT: Final = "_rotary_limit"
_STEADY: Final = "steady"  # a name that transformers' update of frequencies passes by


def steady_rotary(base: nn.Module, longest: int | None = None) -> None:
    """Settles once which of LongRoPE's two sets of frequencies a model uses, for sequences of any length.

    Sequences that all fit into the positions that the model was first trained with get the set for these, as in
    transformers; if one of them may be longer, all get the set for long sequences, as in vLLM, and the config then says
    so for exports: both of its sets are that one. Every other model is left alone, as is one that is settled already.

    Args:
        base: a transformers model without adapters around it.
        longest: tokens that a sequence may have, at least 1; ``None``: as many as fit into the shorter positions.

    Example:
        >>> steady_rotary(model, longest=8192)  # doctest: +SKIP
    """
    if hasattr(base, _LIMIT):
        return
    _settle_all(base, longest)
    limit = rotary_limit(base)
    if limit is not None and longest is not None and longest > limit:
        log.warning(
            "%s has rotary frequencies for sequences of up to %d tokens and others for longer ones: all get the latter "
            "(a max_length of the datamodule that keeps them shorter gives all the former)",
            type(base).__name__,
            limit,
        )
        object.__setattr__(base, _LIMIT, None)


def rotary_limit(base: nn.Module) -> int | None:
    """Tokens up to which the frequencies that were settled hold; ``None`` where nothing had to be, or no limit is."""
    limit: int | None = getattr(base, _LIMIT, None)
    return limit


def long_rotary_parameters(base: nn.Module) -> dict[str, Any] | None:
    """The config's rotary parameters where all sequences get the set for long ones, and the base's folder says else.

    An adapter does not hold them: they are stored beside it, and ``take_long_rotary`` takes them up again.
    """
    if getattr(base, _LIMIT, 0) is not None:
        return None
    config: Any = base.config
    return dict(config.get_text_config().rope_parameters)


def take_long_rotary(base: nn.Module) -> None:
    """Gives all sequences the set for long ones, with which an adapter of this base was trained."""
    _settle_all(base, sys.maxsize)
    if rotary_limit(base) is not None:
        object.__setattr__(base, _LIMIT, None)


def _settle_all(base: nn.Module, longest: int | None) -> None:
    """Puts one set of frequencies in place in every layer that has two."""
    for rotary in base.modules():
        kind: Any = getattr(rotary, "rope_type", None)
        if isinstance(kind, str):
            limit = _settle(rotary, kind, None, longest)
            if limit is not None:
                rotary.rope_type = _STEADY  # type: ignore[assignment]
                object.__setattr__(base, _LIMIT, limit)
        elif isinstance(kind, dict):  # a set of frequencies for every type of layer
            for layer_type, name in kind.items():
                limit = _settle(rotary, name, layer_type, longest)
                if limit is not None:
                    kind[layer_type] = _STEADY
                    object.__setattr__(base, _LIMIT, limit)


def _settle(rotary: Any, kind: str, layer_type: str | None, longest: int | None) -> int | None:
    """Puts one set of frequencies in place; returns the length at which they change, or None where they do not."""
    if kind != "longrope":
        return None
    prefix, named = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    parameters = rotary.config.rope_parameters if layer_type is None else rotary.config.rope_parameters[layer_type]
    if list(parameters["short_factor"]) == list(parameters["long_factor"]):  # settled when it was trained
        return None
    limit = int(parameters["original_max_position_embeddings"])
    buffer = getattr(rotary, f"{prefix}inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, buffer.device, seq_len=longest or 1, **named)
    rotary.register_buffer(f"{prefix}inv_freq", frequencies.to(buffer.dtype), persistent=False)
    if longest is not None and longest > limit:
        # Stored with the model: whoever loads it, here or elsewhere, computes with what it was trained with.
        parameters["short_factor"] = list(parameters["long_factor"])
    return limit
