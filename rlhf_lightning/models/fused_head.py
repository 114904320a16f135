"""The fused log-prob head: ``log p(target)`` from hidden states without a (tokens x vocabulary) matrix.

Only a part of the logits exists at a time, in the forward and in the backward pass: on a CPU tiles that fit its cache
(``cpu_logprob_tiles.py``), on other devices chunks of rows that keep the whole device busy (``gpu_logprob_chunks.py``).
Accumulation is in at least fp32, whatever the dtype of the model.

Legend: N tokens, D hidden size, V vocabulary, R rank of the low-rank part of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cpu_logprob_tiles import LogitsConfig, TiledLogProbs
from .gpu_logprob_chunks import ChunkedLogProbs
from .half_weights import rounded_copy


@dataclass
class OutputHead:
    """Holds the parts of a language model's output projection.

    Args:
        weight: ``(V, D)``.
        bias: ``(V,)``.
        lora_in: ``(R, D)``, the A matrix of a LoRA adapter on the head.
        lora_out: ``(V, R)``, its B matrix, scaling not included.
        lora_scaling: the factor of the adapter.
        lora_dropout: dropout of the adapter's input, in its own mode.
        rounded: ``weight`` in the precision of autocast, if it is there already.
        scale: factor of the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``, and so on).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), applied after ``scale``.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_in: Tensor | None = None
    lora_out: Tensor | None = None
    lora_scaling: float = 1.0
    lora_dropout: nn.Module | None = None
    rounded: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Materialises the logits ``(N, V)``, for tests and few rows."""
        logits = hidden_ND @ self.weight.T
        if self.lora_in is not None and self.lora_out is not None:
            logits = logits + self.lora_scaling * (hidden_ND.to(self.lora_in.dtype) @ self.lora_in.T) @ self.lora_out.T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenStats(NamedTuple):
    """Holds statistics of each scored token; the ones that were not requested are 0.

    Args:
        logprobs: ``(N,)`` log-probability of the target.
        correct: ``(N,)`` whether the target is the most likely token; carries no gradient.
        entropy: ``(N,)`` entropy of the distribution, in nats.
        mean_logprobs: ``(N,)`` mean of log p over the vocabulary (label smoothing).
        log_sum_p2: ``(N,)`` log of the sum of p squared (WPO); carries no gradient.

    Example:
        >>> zero = torch.zeros(1)
        >>> TokenStats(torch.tensor([-0.5]), torch.tensor([True]), zero, zero, zero).correct.tolist()
        [True]
    """

    logprobs: Tensor
    correct: Tensor
    entropy: Tensor
    mean_logprobs: Tensor
    log_sum_p2: Tensor


def fused_logprobs(
    hidden_ND: Tensor,
    head: OutputHead,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    mean: bool = False,
    power: bool = False,
) -> TokenStats:
    r"""Computes log-probabilities of targets from hidden states.

    .. math:: \log p_i = z_{i,t_i} - \log\sum_v e^{z_{i,v}}, \qquad z_i = \mathrm{softcap}(s\,(W h_i + b)) / \tau

    Args:
        hidden_ND: ``(N, D)`` hidden states at the positions that predict the targets; N may be 0.
        head: the output projection.
        target_ids: ``(N,)`` token ids.
        temperature: tau, above 0.
        entropy: also compute the entropy, with gradient.
        mean: also compute ``mean_logprobs``, with gradient.
        power: also compute ``log_sum_p2``.

    Returns:
        TokenStats, in at least fp32.

    Raises:
        ValueError: the temperature is not above 0.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.randn(8, 4)
        >>> fused_logprobs(hidden, OutputHead(weight), torch.tensor([0, 5])).logprobs.exp()
        tensor([0.1250, 0.1250])
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    # The adapter's inner product is small: autograd computes it, so that its dropout is applied once.
    weight, bias, low, low_out = head.weight, head.bias, None, None
    if head.lora_in is not None and head.lora_out is not None:
        kept = hidden_ND if head.lora_dropout is None else head.lora_dropout(hidden_ND)
        low = (kept.to(head.lora_in.dtype) @ head.lora_in.T) * head.lora_scaling
        low_out = head.lora_out

    # As autocast would for a linear layer; within the function it is off, since sums are kept in fp32.
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight = hidden_ND.to(dtype), (weight if head.rounded is None else head.rounded).to(dtype)
        low, low_out = (None if t is None else t.to(dtype) for t in (low, low_out))
    learned = any(t is not None and t.requires_grad for t in (hidden_ND, weight, bias, low, low_out))
    config = LogitsConfig(
        # The scale of the logits and the temperature are one factor unless a soft cap comes between them. It is
        # applied to products in fp32: scaling half-precision hidden states would round them again.
        head.scale if head.softcap is not None else head.scale / temperature,
        1.0 / temperature if head.softcap is not None else 1.0,
        head.softcap,
        entropy,
        mean,
        power,
        # The derivative of a soft cap needs the logits themselves.
        keep=learned and torch.is_grad_enabled() and head.softcap is None,
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        fused: Any = _implementation(hidden_ND.device)
        return TokenStats(*fused.apply(hidden_ND, weight, bias, low, low_out, target_ids, config))


def _implementation(device: torch.device) -> type[torch.autograd.Function]:
    return TiledLogProbs if device.type == "cpu" else ChunkedLogProbs


def output_head(model: nn.Module) -> OutputHead:
    """Reads the output projection of a causal language model (tied or separate, bias, LoRA, scale, soft cap).

    Raises:
        ValueError: the model has no output embeddings.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layer = base.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings; a causal language model is needed")
    text = base.config.get_text_config()
    # Gemma's name, and that of others.
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "output_logit_soft_cap", None)
    parts: dict[str, Any] = {"scale": _logit_scale(text), "softcap": softcap}
    if hasattr(layer, "base_layer"):  # a PEFT layer around the projection
        inner = layer.base_layer
        active = (
            [] if layer.disable_adapters or layer.merged else [a for a in layer.active_adapters if a in layer.lora_A]
        )
        if len(active) > 1:
            raise ValueError(
                f"the output projection has {len(active)} active adapters {active}; one at a time is supported"
            )
        # DoRA rescales the product by a norm of the whole weight, which tiles do not have.
        if active and (active[0] in getattr(layer, "lora_variant", {}) or layer.lora_B[active[0]].bias is not None):
            raise ValueError(
                "the output projection has a DoRA adapter or one with a bias, which the fused head does not know: "
                "remove lm_head from lora's target_modules, or use plain LoRA"
            )
        if active:
            name = active[0]
            parts |= {
                "lora_in": layer.lora_A[name].weight,
                "lora_out": layer.lora_B[name].weight,
                "lora_scaling": float(layer.scaling[name]),
                "lora_dropout": layer.lora_dropout[name],
            }
        layer = inner
    return OutputHead(weight=layer.weight, bias=getattr(layer, "bias", None), rounded=rounded_copy(layer), **parts)


def _logit_scale(config: Any) -> float:
    """Returns the factor between projection and logits, under the names that models use for it."""
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by the factor by which Granite and MiniCPM divide.
    return factor * scaling if getattr(config, "model_type", "") == "hyperclovax" else factor / scaling
