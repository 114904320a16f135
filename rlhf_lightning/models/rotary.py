"""Fixes rotary frequencies, so that they are the same in every forward.

A model with LongRoPE (https://arxiv.org/abs/2402.13753; Phi-3 with 128k positions) has two sets of frequencies, and
transformers chooses one of them in every forward, by the longest sequence in the batch. The result of a sequence would
depend on the others of its batch, and cached keys would not fit the later tokens of a long generation.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

log = logging.getLogger(__name__)

_LIMIT: Final = "_rotary_limit"
_STEADY: Final = "steady"  # a name for which transformers does not update frequencies


def steady_rotary(base: nn.Module, longest: int | None = None) -> None:
    """Fixes which of LongRoPE's two sets of frequencies a model uses, for sequences of any length.

    If all sequences fit into the positions of the model's original training, they get the set for these, as in
    transformers; if one may be longer, all get the set for long sequences, as in vLLM, and both sets of the config
    become that one, for exports. Any other model, or one that is fixed already, is left unchanged.

    Args:
        base: a transformers model without adapters around it.
        longest: maximum number of tokens of a sequence, at least 1; ``None``: as many as the original positions.

    Example:
        >>> steady_rotary(model, longest=8192)  # doctest: +SKIP
    """
    if hasattr(base, _LIMIT):
        return
    _fix_all(base, longest)
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
    """Returns the number of tokens up to which fixed frequencies hold; ``None`` without a limit."""
    limit: int | None = getattr(base, _LIMIT, None)
    return limit


def long_rotary_parameters(base: nn.Module) -> dict[str, Any] | None:
    """Returns the config's rotary parameters if all sequences get the set for long ones, unlike in the base's folder.

    An adapter does not hold them: they are stored with it, and ``take_long_rotary`` applies them again.
    """
    if getattr(base, _LIMIT, 0) is not None:
        return None
    config: Any = base.config
    return dict(config.get_text_config().rope_parameters)


def take_long_rotary(base: nn.Module) -> None:
    """Gives all sequences the set for long ones, with which the adapter of this base was trained."""
    _fix_all(base, sys.maxsize)
    if rotary_limit(base) is not None:
        object.__setattr__(base, _LIMIT, None)


def _fix_all(base: nn.Module, longest: int | None) -> None:
    """Fixes one set of frequencies in every layer that has two."""
    for rotary in base.modules():
        kinds: Any = getattr(rotary, "rope_type", None)
        # A dict where each type of layer has its own frequencies.
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            limit = _fix(rotary, layer_type, longest) if kind == "longrope" else None
            if limit is None:
                continue
            if layer_type is None:
                rotary.rope_type = _STEADY  # type: ignore[assignment]
            else:
                kinds[layer_type] = _STEADY
            object.__setattr__(base, _LIMIT, limit)


def _fix(rotary: Any, layer_type: str | None, longest: int | None) -> int | None:
    """Fixes one set of frequencies; returns the length at which they would change, or None if they do not."""
    prefix, named = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    parameters = rotary.config.rope_parameters if layer_type is None else rotary.config.rope_parameters[layer_type]
    if list(parameters["short_factor"]) == list(parameters["long_factor"]):  # fixed in an earlier training
        return None
    limit = int(parameters["original_max_position_embeddings"])
    buffer = getattr(rotary, f"{prefix}inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, buffer.device, seq_len=longest or 1, **named)
    rotary.register_buffer(f"{prefix}inv_freq", frequencies.to(buffer.dtype), persistent=False)
    if longest is not None and longest > limit:
        # Stored with the model, so that it is loaded anywhere with the frequencies of its training.
        parameters["short_factor"] = list(parameters["long_factor"])
    return limit
