"""Gradient accumulation, reduction over ranks and clipping, between the backward passes of a step and the optimizer.

Sums over micro-batches, and over the ranks of DDP, are taken in at least fp32 whatever the dtype of the weights, and
rounded once. Under ``fsdp2``, torch sums over ranks in the dtype of the weights (bf16 for ``bf16-true``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..distributed.collectives import gather_objects, world_size
from ..distributed.fsdp2 import copies_of
from ..distributed.host_group import host_group
from ..distributed.lockstep import barrier, lockstep
from ..sequences import Example

_HALF: Final = (torch.bfloat16, torch.float16)


class GradientSums:
    """Accumulates gradients of bf16 and fp16 weights in fp32, from the second backward pass of a step on.

    A step of one pass costs nothing. Several passes hold an fp32 buffer per such weight in place of its gradient, since
    sums in half precision would round away later passes.

    Args:
        parameters: trained parameters; those of other dtypes are accumulated by torch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad and p.dtype in _HALF]
        self._passes = 0
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def begin_pass(self) -> None:
        """Announces another backward pass; the second one switches to fp32 accumulation."""
        self._passes += 1
        # A single pass needs no sum: its gradients stay where they are.
        if self._passes == 2:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self._take(parameter)
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._take))

    def end(self) -> None:
        """Rounds the sums once and stores them as the gradients."""
        for handle in self._handles:
            handle.remove()
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums, self._handles, self._passes = {}, [], 0

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        # Taken away, so that the next pass does not add to it in half precision.
        grad, parameter.grad = parameter.grad, None
        if parameter in self._sums:
            self._sums[parameter].add_(grad)
        else:
            self._sums[parameter] = grad.float()


def sum_gradients(
    parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = 64 << 20, alone_bytes: int = 16 << 20
) -> None:
    """Sums gradients over all ranks; FSDP2 has already reduced those of sharded parameters.

    Large gradients are summed where they are, small ones in flat buckets: at most one bucket is held besides them.

    Losses are divided by global normalizers before the backward pass, so the sum is the gradient of the global batch,
    however many micro-batches each rank ran, zero included. A missing gradient counts as zero; a parameter without
    gradient on every rank keeps none, so that the optimizer skips it as it would on one rank.
    """
    if world_size() == 1:
        return

    barrier()
    agreement = lockstep()
    if agreement is not None:
        agreement.drop_unreached()

    # All ranks must reduce the same parameters: those with a gradient on any rank.
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not whole:
        return
    used = torch.tensor([parameter.grad is not None for parameter in whole], device="cpu").int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=host_group())

    # Large buckets, because a collective for every small parameter would cost more in latency than in transfer.
    bucket: list[Tensor] = []

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        flat = flat.float() if flat.dtype in _HALF else flat
        dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
        bucket.clear()

    for parameter in (parameter for parameter, count in zip(whole, used.tolist(), strict=True) if count):
        # Another rank has a gradient: this one takes part with 0.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        if grad.nbytes >= alone_bytes and grad.dtype not in _HALF and grad.is_contiguous():
            dist.all_reduce(grad)
            continue
        if bucket and bucket[0].dtype != parameter.grad.dtype:
            flush()
        bucket.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in bucket) >= bucket_bytes:
            flush()
    flush()


def loss_scale(trainer: Any) -> float:
    """Returns the factor by which ``manual_backward`` scales the loss; 1 except in fp16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clips the global norm of gradients to ``limit`` and returns the norm before clipping.

    Args:
        parameters: sharded and whole parameters; a missing gradient counts as 0.
        limit: above 0; infinite to measure the norm alone.

    Returns:
        The norm, in at least fp32.
    """
    grads: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())

    sharded = [isinstance(grad, DTensor) for grad in grads]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    # Offloaded shards lie in host memory, but the reduction over ranks needs the device that computes.
    meshes = [torch.device(grad.device_mesh.device_type) for grad in grads if isinstance(grad, DTensor)]
    device = meshes[0] if meshes else local[0].device
    wide = [torch.promote_types(part.dtype, torch.float32) for part in local]
    norms = (torch.linalg.vector_norm(part, dtype=dtype) for part, dtype in zip(local, wide, strict=True))
    squares = [norm.square().to(device) for norm in norms]

    # Squares of shards are summed over ranks and divided by the number of copies; whole gradients are equal on all
    # ranks and count once.
    zero = squares[0].new_zeros(())
    of_shards = sum((s / copies_of(g) for s, g, is_part in zip(squares, grads, sharded, strict=True) if is_part), zero)
    of_whole = sum((s for s, is_part in zip(squares, sharded, strict=True) if not is_part), zero)
    if meshes:
        of_shards = of_shards.clone()
        barrier()
        dist.all_reduce(of_shards)

    # Parts are scaled in place, shards like whole gradients, by the same factor on all ranks.
    norm: Tensor = (of_shards + of_whole).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for part, dtype in zip(local, wide, strict=True):
        own = factor.to(part.device, dtype)
        if part.dtype == dtype:
            part.mul_(own)
        else:  # in half precision, round the product and not the factor
            part.copy_(part.to(dtype).mul_(own))
    return norm


def check_gradient(module: Any, grad_norm: float, examples: Sequence[Example]) -> None:
    """Raises before a step with a non-finite gradient; fp16's gradient scaler skips such steps instead.

    Args:
        module: a ``PostTrainingModule``; its gradients are cleared.
        grad_norm: norm of the gradient of the global batch, read from the device.
        examples: this rank's part of the batch, to name in the message.

    Raises:
        ValueError: the norm is not finite.
    """
    if math.isfinite(grad_norm) or getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        return
    module.zero_grad()
    rows = ", ".join(example.row_id for example in examples[:3]) + (", ..." if len(examples) > 3 else "")
    # The norm is the same on all ranks, so all raise, with the rows of every rank.
    if world_size() > 1:
        rows = "; ".join(f"of rank {n}: {part}" for n, part in enumerate(gather_objects(rows)) if part)
    raise ValueError(
        f"the gradient's norm is {grad_norm} in step {module.trainer.global_step + 1} (rows {rows}); the "
        "weights are still those of the step before: check these rows, or lower the learning rate"
    )
