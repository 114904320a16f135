"""Log-probs tile by tile, for a CPU: rows x a slice of the vocabulary, small enough to stay in a core's cache.

An online log-sum-exp reduces the tiles. The first ones are kept for the backward pass, up to a fixed number of bytes;
the others are recomputed there. Each tile is overwritten by its gradient. Memory is one tile and the kept ones.

Legend: N tokens, D hidden size, V vocabulary, R rank of the low-rank part of the head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tile sizes: large enough for efficient matrix products, small enough to stay in a CPU core's cache between passes.
TILE_ROWS = 512
TILE_COLUMNS = 2048
# Memory of the tiles that a forward pass keeps for its backward pass, which saves up to a quarter of the products: all
# logits of a small batch, a small part of a large one.
KEPT_BYTES = 256 << 20


class LogitsConfig(NamedTuple):
    """Holds how logits follow from the product, and what is read from them.

    Args:
        scale: factor of the product.
        inv_temperature: factor after the soft cap.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        entropy: whether the entropy is read.
        mean: whether the mean of log p over the vocabulary is read.
        power: whether the sum of p squared is read.
        keep: whether tiles may be kept for a backward pass.
    """

    scale: float
    inv_temperature: float
    softcap: float | None
    entropy: bool
    mean: bool
    power: bool
    keep: bool

    def finish(self, product: Tensor) -> Tensor:
        """Turns a product into logits, in place: scale, soft cap and temperature."""
        if self.scale != 1.0:
            product *= self.scale
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap * self.inv_temperature)
        return product


def slices(size: int, step: int) -> list[slice]:
    """Cuts ``range(size)`` into slices of ``step``; the last one may be shorter."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _Tiles:
    """Computes tiles of logits for given rows and columns, and maps their gradients back to the raw product."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_out: Tensor | None,
        config: LogitsConfig,
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
        tile = torch.mm(self.hidden[rows].to(self.dtype), self.weight[columns].to(self.dtype).T, out=out)
        if self.low is not None and self.low_out is not None:
            tile.addmm_(self.low[rows].to(self.dtype), self.low_out[columns].to(self.dtype).T)
        if self.bias is not None:
            tile += self.bias[columns].to(self.dtype)
        return self.config.finish(tile)

    def to_product(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Maps the gradient of the final logits to that of the raw product; overwrites it."""
        scale, softcap = self.config.scale, self.config.softcap
        if softcap is not None:
            capped = logits / (softcap * self.config.inv_temperature)
            grad = grad.mul_(1 - capped.square_())
            scale *= self.config.inv_temperature
        return grad if scale == 1.0 else grad.mul_(scale)


class TiledLogProbs(torch.autograd.Function):
    """Log-probs, and the other fields of TokenStats, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_out: Tensor | None,
        target_ids: Tensor,
        config: LogitsConfig,
    ) -> tuple[Tensor, ...]:
        """Computes the fields of TokenStats."""
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
        for rows in slices(num_tokens, TILE_ROWS):
            count = rows.stop - rows.start
            top = torch.full((count,), -torch.inf, **new)
            others = top.clone()
            mass, mass2, weighted, total = (torch.zeros(count, **new) for _ in range(4))
            target = target_ids[rows]
            for columns in slices(vocab, TILE_COLUMNS):
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
        """Computes the gradients of all factors of the logits."""
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
        rows_all = slices(hidden.shape[0], TILE_ROWS)
        for columns in slices(vocab, TILE_COLUMNS):
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
