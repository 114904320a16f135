"""The fused log-prob head: ``log p(target)`` from hidden states without a (tokens x vocabulary) matrix.

Logits are computed tile by tile (rows x a slice of the vocabulary) and reduced by an online log-sum-exp. The first
tiles are kept for the backward pass, up to a fixed number of bytes; the others are recomputed there. Each tile is
overwritten by its gradient. Memory is one tile and the kept ones; accumulation is in at least fp32, whatever the dtype
of the model.

Legend: N tokens, D hidden size, V vocabulary, R rank of the low-rank part of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Tile sizes: large enough for efficient matrix products, small enough to stay in a CPU core's cache between passes.
TILE_ROWS = 512
TILE_COLUMNS = 2048
# Memory of the tiles that a forward pass keeps for its backward pass, which saves up to a quarter of the products: all
# logits of a small batch, a small part of a large one.
KEPT_BYTES = 256 << 20


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
        scale: factor of the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``, and so on).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), applied after ``scale``.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_in: Tensor | None = None
    lora_out: Tensor | None = None
    lora_scaling: float = 1.0
    lora_dropout: nn.Module | None = None
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
    """

    logprobs: Tensor
    correct: Tensor
    entropy: Tensor
    mean_logprobs: Tensor
    log_sum_p2: Tensor


class _Config(NamedTuple):
    scale: float  # of the product
    inv_temperature: float  # factor after the soft cap
    softcap: float | None
    entropy: bool
    mean: bool
    power: bool
    keep: bool


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
        hidden_ND, weight = hidden_ND.to(dtype), weight.to(dtype)
        low, low_out = (None if t is None else t.to(dtype) for t in (low, low_out))
    learned = any(t is not None and t.requires_grad for t in (hidden_ND, weight, bias, low, low_out))
    config = _Config(
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
        fused: Any = _FusedLogProbs.apply
        return TokenStats(*fused(hidden_ND, weight, bias, low, low_out, target_ids, config))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Computes ``a @ b.T``, accumulated and returned in at least fp32; writes into ``out`` where possible."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b.to(a.dtype).T, out_dtype=torch.float32)
    return torch.mm(a.to(out.dtype), b.to(out.dtype).T, out=out)


class _Tiles:
    """Computes tiles of logits for given rows and columns, and maps their gradients back to the raw product."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_out: Tensor | None,
        config: _Config,
    ) -> None:
        self.hidden, self.weight, self.bias, self.low, self.low_out = hidden, weight, bias, low, low_out
        self.config = config
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        # All tiles share one buffer: fresh pages for every tile would cost a third of its product.
        size = min(TILE_ROWS, len(hidden)) * min(TILE_COLUMNS, len(weight))
        self._memory = torch.empty(size, dtype=self.dtype, device=hidden.device)

    def logits(self, rows: slice, columns: slice, *, fresh: bool = False) -> Tensor:
        """Computes logits ``(rows, columns)`` in at least fp32, temperature and soft cap applied.

        The next call overwrites them unless they are ``fresh``.
        """
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        out = self._memory.new_empty(shape) if fresh else self._memory[: shape[0] * shape[1]].view(shape)
        # In the order of the model's own forward: product, adapter, bias, scale, soft cap.
        tile = _product(self.hidden[rows], self.weight[columns], out)
        if self.low is not None and self.low_out is not None:
            tile.addmm_(self.low[rows].to(self.dtype), self.low_out[columns].to(self.dtype).T)
        if self.bias is not None:
            tile += self.bias[columns].to(self.dtype)
        if self.config.scale != 1.0:
            tile *= self.config.scale
        if self.config.softcap is not None:
            tile.div_(self.config.softcap).tanh_().mul_(self.config.softcap * self.config.inv_temperature)
        return tile

    def to_product(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Maps the gradient of the final logits to that of the raw product; overwrites it."""
        scale, softcap = self.config.scale, self.config.softcap
        if softcap is not None:
            capped = logits / (softcap * self.config.inv_temperature)
            grad = grad.mul_(1 - capped.square_())
            scale *= self.config.inv_temperature
        return grad if scale == 1.0 else grad.mul_(scale)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _FusedLogProbs(torch.autograd.Function):
    """Computes the fields of TokenStats, tile by tile, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_out: Tensor | None,
        target_ids: Tensor,
        config: _Config,
    ) -> tuple[Tensor, ...]:
        tiles = _Tiles(hidden, weight, bias, low, low_out, config)
        num_tokens, vocab = hidden.shape[0], weight.shape[0]
        new: dict[str, Any] = {"dtype": tiles.dtype, "device": hidden.device}
        target_logit, lse, entropy, mean_logit, lse2, peak, total_mass = (
            torch.zeros(num_tokens, **new) for _ in range(7)
        )
        correct = torch.zeros(num_tokens, dtype=torch.bool, device=hidden.device)
        kept_tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # exp(logits - top), and top
        room = KEPT_BYTES if config.keep else 0

        # Rows outside, columns inside: a row's running statistics are complete after its last tile.
        for rows in _slices(num_tokens, TILE_ROWS):
            count = rows.stop - rows.start
            top = torch.full((count,), -torch.inf, **new)
            others = top.clone()
            mass, mass2, weighted, total = (torch.zeros(count, **new) for _ in range(4))
            target = target_ids[rows]
            for columns in _slices(vocab, TILE_COLUMNS):
                size = count * (columns.stop - columns.start) * tiles.dtype.itemsize
                tile = tiles.logits(rows, columns, fresh=size <= room)
                # The target's logit, where it lies in this tile.
                inside = (target >= columns.start) & (target < columns.stop)
                place = (target - columns.start).clamp(0, tile.shape[1] - 1)[:, None]
                picked = tile.gather(1, place)[:, 0]
                target_logit[rows] = torch.where(inside, picked, target_logit[rows])
                # The best logit except the target's, so that a tie does not count as correct.
                tile.scatter_(1, place, torch.where(inside, -torch.inf, picked)[:, None])
                best = tile.amax(dim=1)
                tile.scatter_(1, place, picked[:, None])
                others = torch.maximum(others, best)

                # Online log-sum-exp: sums over earlier tiles are rescaled to the new maximum.
                new_top = torch.maximum(torch.maximum(top, best), torch.where(inside, picked, -torch.inf))
                rescale = (top - new_top).exp_()
                if config.mean:
                    total += tile.sum(dim=1)
                # The entropy needs the logits besides their exponentials.
                kept = tile.clone() if config.entropy else tile
                tile = tile.sub_(new_top[:, None]).exp_()
                mass = mass * rescale + tile.sum(dim=1)
                if config.entropy:
                    weighted = weighted * rescale + torch.linalg.vecdot(tile, kept)
                if config.power:
                    mass2 = mass2 * rescale.square() + torch.linalg.vecdot(tile, tile)
                top = new_top
                if size <= room:
                    kept_tiles[rows.start, columns.start] = tile, top
                    room -= size

            # The row is complete: turn sums into statistics.
            lse[rows] = top + mass.log()
            peak[rows], total_mass[rows] = top, mass
            if config.entropy:
                entropy[rows] = lse[rows] - weighted / mass
            mean_logit[rows] = total / vocab if config.mean else lse[rows]
            lse2[rows] = 2 * top + mass2.log() if config.power else 2 * lse[rows]
            correct[rows] = target_logit[rows] > others

        ctx.save_for_backward(hidden, weight, bias, low, low_out, target_ids, lse, entropy, peak, total_mass)
        ctx.config, ctx.kept_tiles = config, kept_tiles
        outputs = target_logit - lse, correct, entropy, mean_logit - lse, lse2 - 2 * lse
        ctx.mark_non_differentiable(correct, outputs[4])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, low, low_out, target_ids, lse, entropy, peak, mass = ctx.saved_tensors
        g_logprob, _, g_entropy, g_mean, _ = grads
        tiles = _Tiles(hidden, weight, bias, low, low_out, ctx.config)
        needs = ctx.needs_input_grad
        d_hidden, d_weight, d_bias, d_low, d_low_out = (
            torch.zeros_like(t, dtype=tiles.dtype) if t is not None and need else None
            for t, need in zip((hidden, weight, bias, low, low_out), needs, strict=False)
        )
        vocab = weight.shape[0]

        # d logits = g_logprob (onehot - p) + g_mean (1/V - p) - g_entropy p (log p + H)
        g_logprob = torch.zeros_like(lse) if g_logprob is None else g_logprob
        pull = g_logprob if g_mean is None else g_logprob + g_mean

        # Columns outside: a slice of the weight and of its gradient is read once for all rows.
        rows_all = _slices(hidden.shape[0], TILE_ROWS)
        for columns in _slices(vocab, TILE_COLUMNS):
            weight_c = weight[columns].to(tiles.dtype)
            low_out_c = None if low_out is None else low_out[columns].to(tiles.dtype)
            for rows in rows_all:
                kept_tile = ctx.kept_tiles.pop((rows.start, columns.start), None)
                if kept_tile is not None and g_entropy is None:
                    exps, top = kept_tile
                    # Divided by the kept sum rather than exp(lse), so that the probabilities add up to 1.
                    kept = grad = exps.mul_((-pull[rows] * (top - peak[rows]).exp() / mass[rows])[:, None])
                else:
                    logits = tiles.logits(rows, columns)
                    kept = logits.clone() if ctx.config.softcap is not None else logits
                    g_rows = None if g_entropy is None else g_entropy[rows]
                    grad = _tile_gradient(logits, lse[rows], pull[rows], g_rows, entropy[rows])
                if g_mean is not None:
                    grad += (g_mean[rows] / vocab)[:, None]
                # The one-hot part, at the targets that lie in this tile.
                local = target_ids[rows] - columns.start
                inside = ((local >= 0) & (local < grad.shape[1])).nonzero()[:, 0]
                grad[inside, local[inside]] += g_logprob[rows][inside]
                grad = tiles.to_product(grad, kept)

                # Every factor of the product sums its gradient over all tiles, in at least fp32.
                if d_hidden is not None:
                    d_hidden[rows].addmm_(grad, weight_c)
                if d_weight is not None:
                    d_weight[columns].addmm_(grad.T, hidden[rows].to(tiles.dtype))
                if d_bias is not None:
                    d_bias[columns] += grad.sum(dim=0)
                if d_low is not None and low_out_c is not None:
                    d_low[rows].addmm_(grad, low_out_c)
                if d_low_out is not None and low is not None:
                    d_low_out[columns].addmm_(grad.T, low[rows].to(tiles.dtype))

        inputs = (hidden, weight, bias, low, low_out)
        result = [
            None if d is None else d.to(t.dtype)
            for d, t in zip((d_hidden, d_weight, d_bias, d_low, d_low_out), inputs, strict=True)
        ]
        return (*result, None, None)


def _tile_gradient(logits: Tensor, lse: Tensor, pull: Tensor, g_entropy: Tensor | None, entropy: Tensor) -> Tensor:
    """Computes the part of the gradient that every vocabulary entry gets; overwrites the logits."""
    log_p = logits.sub_(lse[:, None])
    if g_entropy is None:
        return log_p.exp_().mul_(-pull[:, None])
    p = log_p.exp()
    return log_p.add_(entropy[:, None]).mul_(g_entropy[:, None]).add_(pull[:, None]).mul_(p).neg_()


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
    return OutputHead(weight=layer.weight, bias=getattr(layer, "bias", None), **parts)


def _logit_scale(config: Any) -> float:
    """Returns the factor between projection and logits, under the names that models use for it."""
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by the factor by which Granite and MiniCPM divide.
    return factor * scaling if getattr(config, "model_type", "") == "hyperclovax" else factor / scaling
