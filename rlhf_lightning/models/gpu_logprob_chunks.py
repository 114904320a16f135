"""Log-probs chunk by chunk, for a GPU: some rows x the whole vocabulary, large enough to keep all of it busy.

A chunk takes a dozen launches of each pass, however many its rows are, and nothing waits for the device. Operands in
half precision are multiplied as they are, with sums in fp32. The forward pass keeps a few numbers of each row; the
backward pass computes the logits again, and turns them into their gradient in place.

Legend: N tokens, D hidden size, V vocabulary, R rank of the low-rank part of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu_logprob_tiles import LogitsConfig, slices

# Memory of a chunk's logits. Its gradient in half precision takes half of it again; entropy and soft cap as much again.
CHUNK_BYTES = 1 << 30
# Products of gradients in fp16, whose numbers lie between 6e-8 and 65504: the largest coefficient becomes this.
_LARGEST_FP16 = 4096.0


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Writes ``a @ b`` into ``out``, or adds it, with sums in the dtype of ``out``."""
    wide: dict[str, Any] = {}
    if a.is_cuda and a.dtype != out.dtype:
        wide["out_dtype"] = out.dtype
    else:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


class _Chunks:
    """Computes the logits of some rows, in one buffer for all of them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_out: Tensor | None,
        config: LogitsConfig,
    ) -> None:
        # The operands of the product: in half precision if both are in the same one.
        self.operand = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = torch.promote_types(self.operand, torch.float32)
        self.hidden, self.weight = hidden.to(self.operand), weight.to(self.operand)
        self.bias, self.low, self.low_out = (None if t is None else t.to(self.dtype) for t in (bias, low, low_out))
        self.config = config
        step = max(1, CHUNK_BYTES // (len(weight) * self.dtype.itemsize))
        self.slices = slices(len(hidden), step)
        self._memory = self.buffer(self.dtype)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Makes room for a chunk."""
        rows = max((rows.stop - rows.start for rows in self.slices), default=0)
        return torch.empty(rows, len(self.weight), dtype=dtype, device=self.hidden.device)

    def logits(self, rows: slice) -> Tensor:
        """Computes logits ``(rows, V)`` in at least fp32, temperature and soft cap applied, over the last ones."""
        chunk = self._memory[: rows.stop - rows.start]
        # In the order of the model's own forward: product, adapter, bias, scale, soft cap.
        _multiply(self.hidden[rows], self.weight.T, chunk)
        if self.low is not None and self.low_out is not None:
            chunk.addmm_(self.low[rows], self.low_out.T)
        if self.bias is not None:
            chunk += self.bias
        return self.config.finish(chunk)


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probs, and the other fields of TokenStats, chunk by chunk."""

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
        chunks = _Chunks(hidden, weight, bias, low, low_out, config)
        target = target_ids[:, None]
        # Numbers of each row, ``(N, 1)``: logits of the target, of the best other one and of the better of these two;
        # with e = exp(logits - top), the sums of e, of e (logits - top) and of logits - top, and the norm of e.
        numbers = torch.zeros(7, len(hidden), 1, dtype=chunks.dtype, device=hidden.device)
        picked, others, top, mass, weighted, total, norm = numbers.unbind()

        for rows in chunks.slices:
            chunk = chunks.logits(rows)
            # The best logit except the target's, so that a tie does not count as correct.
            torch.gather(chunk, 1, target[rows], out=picked[rows])
            chunk.scatter_(1, target[rows], -torch.inf)
            torch.amax(chunk, 1, keepdim=True, out=others[rows])
            chunk.scatter_(1, target[rows], picked[rows])

            torch.maximum(picked[rows], others[rows], out=top[rows])
            chunk -= top[rows]
            if config.mean:
                torch.sum(chunk, 1, keepdim=True, out=total[rows])
            exps = chunk.exp() if config.entropy else chunk.exp_()
            torch.sum(exps, 1, keepdim=True, out=mass[rows])
            if config.power:
                torch.linalg.vector_norm(exps, dim=1, keepdim=True, out=norm[rows])
            if config.entropy:
                torch.sum(chunk.mul_(exps), 1, keepdim=True, out=weighted[rows])

        # Everything is relative to the top, whose rounding would be that of the log-sum-exp.
        log_mass, nothing = mass.log(), torch.zeros_like(mass)
        entropy = log_mass - weighted / mass if config.entropy else nothing
        columns = (
            picked - top - log_mass,
            picked > others,
            entropy,
            total / len(weight) - log_mass if config.mean else nothing,
            2 * (norm.log() - log_mass) if config.power else nothing,
        )
        ctx.save_for_backward(hidden, weight, bias, low, low_out, target_ids, picked, top, mass, entropy)
        ctx.config = config
        outputs = tuple(column[:, 0] for column in columns)
        asked = (True, False, config.entropy, config.mean, False)
        ctx.mark_non_differentiable(*(o for o, has_gradient in zip(outputs, asked, strict=True) if not has_gradient))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Computes the gradients of all factors of the logits."""
        hidden, weight, bias, low, low_out, target_ids, picked, top, mass, entropy = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, bias, low, low_out, ctx.config)
        inputs = (hidden, weight, bias, low, low_out)
        d_hidden, d_weight, d_bias, d_low, d_low_out = (
            torch.zeros_like(t, dtype=chunks.dtype) if t is not None and need else None
            for t, need in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        slope = _Slope(ctx.config, grads, top, mass, entropy, len(weight))
        unit = slope.fit_fp16() if chunks.operand == torch.float16 and len(hidden) else None

        # Only the products with weight and hidden read it: written in their dtype at once. Bias and adapter read fp32.
        dtype = chunks.operand if bias is None and low is None else chunks.dtype
        rounded = None if dtype == chunks.dtype else chunks.buffer(dtype)
        at_target = slope.at(picked.clone(), slice(None), None, target=True).to(dtype)

        for rows in chunks.slices:
            out = None if rounded is None else rounded[: rows.stop - rows.start]
            grad = slope.at(chunks.logits(rows), rows, out)
            grad.scatter_(1, target_ids[rows, None], at_target[rows])
            if d_bias is not None:
                d_bias += grad.sum(dim=0)
            if d_low is not None and chunks.low_out is not None:
                _multiply(grad, chunks.low_out, d_low[rows])
            if d_low_out is not None and chunks.low is not None:
                _multiply(grad.T, chunks.low[rows], d_low_out, add=True)
            grad = grad.to(chunks.operand)
            if d_hidden is not None:
                _multiply(grad, chunks.weight, d_hidden[rows])
            if d_weight is not None:
                _multiply(grad.T, chunks.hidden[rows], d_weight, add=True)

        results = (d_hidden, d_weight, d_bias, d_low, d_low_out)
        scaled = results if unit is None else (None if d is None else d.div_(unit) for d in results)
        return (*(None if d is None else d.to(t.dtype) for d, t in zip(scaled, inputs, strict=True)), None, None)


class _Slope:
    r"""Computes gradients of products from those of the statistics.

    With ``p = e / mass`` and ``log p = z - log mass``, where ``z`` are logits relative to the top and ``e`` is their
    exponential, the gradient of the logits is

    .. math:: g_{logp} (onehot - p) + g_{mean} (1/V - p) - g_{entropy} p (\log p + H) = e (a z + c) + m + onehot\,g

    with four numbers of each row. A soft cap has the slope ``1 - tanh^2``.
    """

    def __init__(
        self, config: LogitsConfig, grads: Any, top: Tensor, mass: Tensor, entropy: Tensor, vocab: int
    ) -> None:
        g_logprob, _, g_entropy, g_mean, _ = (None if g is None else g[:, None] for g in grads)
        self.top, self.cap = top, None if config.softcap is None else config.softcap * config.inv_temperature
        scale = config.scale * config.inv_temperature
        nothing = torch.zeros_like(top)
        self.g = nothing if g_logprob is None else g_logprob * scale
        pull = self.g if g_mean is None else self.g + g_mean * scale
        self.m = nothing if g_mean is None else g_mean * (scale / vocab)
        self.a: Tensor | None = None
        if g_entropy is not None:
            self.a = g_entropy * -scale / mass
            pull = pull + g_entropy * scale * (entropy - mass.log())
        self.c = -pull / mass

    def at(self, logits: Tensor, rows: slice, out: Tensor | None, *, target: bool = False) -> Tensor:
        """Computes the gradient of the product at some logits ``(rows, anything)``, which it overwrites.

        Args:
            logits: the logits.
            rows: their rows.
            out: gets the gradient; ``None``: the logits do.
            target: whether they are those of the targets.
        """
        cap = None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)
        shifted = logits.sub_(self.top[rows])
        if self.a is None:
            exps, inner = shifted.exp_(), self.c[rows]
        else:
            exps, inner = shifted.exp(), shifted.mul_(self.a[rows]).add_(self.c[rows])
        share = self.m[rows] + self.g[rows] if target else self.m[rows]
        out = logits if out is None else out
        if cap is None:
            return torch.addcmul(share, exps, inner, out=out)
        return torch.mul(torch.addcmul(share, exps, inner, out=logits), cap, out=out)

    def fit_fp16(self) -> Tensor:
        """Scales the coefficients so that gradients neither vanish nor overflow in fp16; returns the factor."""
        numbers = [t for t in (self.a, self.c, self.m, self.g) if t is not None]
        largest = torch.stack([t.abs().amax() for t in numbers]).amax()
        unit = _LARGEST_FP16 / largest.clamp_min(1e-30)
        self.c, self.m, self.g = self.c * unit, self.m * unit, self.g * unit
        self.a = None if self.a is None else self.a * unit
        return unit
