"""Identifies the decoder that something was trained with, whatever the precision and the adapters that it runs with."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .backbone import base_model

_EDGE = 32  # values at either end of each weight that are read


def decoder_identity(model: nn.Module) -> dict[str, Any]:
    """Describes a model: its sizes, and a digest of both ends of every weight, rounded to bfloat16.

    Args:
        model: a causal language model; the weights of adapters on it are not read.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    digest = blake2b(digest_size=16)
    for name, weight in sorted(_plain_weights(base).items()):
        flat = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().reshape(-1)
        ends = torch.cat([flat[:_EDGE], flat[-_EDGE:]]).to(torch.bfloat16).cpu()
        digest.update(f"{name}:{tuple(weight.shape)}".encode() + ends.view(torch.uint8).numpy().tobytes())
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "weights": digest.hexdigest(),
    }


def difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Says in what two models differ, or None."""
    for name, value in then.items():
        if now.get(name) != value:
            return "its weights differ" if name == "weights" else f"{name} is {now.get(name)!r}, there {value!r}"
    return None


def _plain_weights(base: nn.Module) -> dict[str, Tensor]:
    """Returns the weights by the names that they have without adapters."""
    named = ((name.replace(".base_layer.", "."), weight) for name, weight in base.named_parameters())
    return {name: weight for name, weight in named if "lora_" not in name and not weight.is_meta}
