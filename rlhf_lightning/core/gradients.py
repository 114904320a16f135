"""What happens to gradients between the backward passes of a step and the optimizer: sums, over ranks too, and a norm.

All of it is computed in at least fp32, whatever the weights are in, so that neither the number of micro-batches nor
that of ranks rounds a sum more often than once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..distributed.collectives import world_size
from ..distributed.fsdp2 import copies_of
from ..distributed.lockstep import lockstep, meet

_HALF: Final = (torch.bfloat16, torch.float16)


class GradientSums:
    """Adds gradients of weights in half a precision up in fp32, from the second backward pass of a step on.

    A step of one pass costs nothing; of several, a number in fp32 per such weight instead of one in its own precision,
    in which what a later pass adds would be rounded away.

    Args:
        parameters: those that are trained; others than in half a precision are left to torch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad and p.dtype in _HALF]
        self._passes = 0
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def begin_pass(self) -> None:
        """Says that another backward pass comes."""
        self._passes += 1
        if self._passes == 2:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self._take(parameter)
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._take))

    def end(self) -> None:
        """Leaves the sums, rounded once, as the gradients."""
        for handle in self._handles:
            handle.remove()
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums, self._handles, self._passes = {}, [], 0

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        if parameter in self._sums:
            self._sums[parameter].add_(grad)
        else:
            self._sums[parameter] = grad.float()


def sum_gradients(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
    """Adds gradients up over all ranks, in flat buckets; sharded parameters have their part of the sum already.

    Losses are divided by global totals before the backward pass, so the sum is the gradient of the global batch,
    however many micro-batches each rank ran, none included. A parameter without gradient counts as zero, and one that
    has none on any rank keeps none, so that an optimizer leaves it alone as it would on one rank.
    """
    if world_size() == 1:
        return
    meet()
    agreement = lockstep()
    if agreement is not None:
        agreement.drop_unreached()
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not whole:
        return
    used = torch.tensor([parameter.grad is not None for parameter in whole], device=whole[0].device).int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
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
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and bucket[0].dtype != parameter.grad.dtype:
            flush()
        bucket.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in bucket) >= bucket_bytes:
            flush()
    flush()


def loss_scale(trainer: Any) -> float:
    """By which ``manual_backward`` multiplies the loss of a trainer's module; 1 but in fp16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down so that their global norm is at most ``limit``; returns the norm that they had.

    Args:
        parameters: those without gradient count as 0; sharded and whole ones may be mixed.
        limit: above 0; infinite to leave them as they are.

    Returns:
        The norm, in at least fp32.
    """
    grads: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    sharded = [isinstance(grad, DTensor) for grad in grads]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    # Parts may lie in host memory; what is added up over ranks lies where they compute.
    meshes = [torch.device(grad.device_mesh.device_type) for grad in grads if isinstance(grad, DTensor)]
    device = meshes[0] if meshes else local[0].device
    wide = [torch.promote_types(part.dtype, torch.float32) for part in local]
    norms = (torch.linalg.vector_norm(part, dtype=dtype) for part, dtype in zip(local, wide, strict=True))
    squares = [norm.square().to(device) for norm in norms]
    # Shards are added up over the ranks, each of their copies for its part, so that all ranks find the same number;
    # what is whole is the same on each, and counts once.
    zero = squares[0].new_zeros(())
    of_shards = sum((s / copies_of(g) for s, g, is_part in zip(squares, grads, sharded, strict=True) if is_part), zero)
    of_whole = sum((s for s, is_part in zip(squares, sharded, strict=True) if not is_part), zero)
    if meshes:
        of_shards = of_shards.clone()
        meet()
        dist.all_reduce(of_shards)
    norm: Tensor = (of_shards + of_whole).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for part, dtype in zip(local, wide, strict=True):
        own = factor.to(part.device, dtype)
        if part.dtype == dtype:
            part.mul_(own)
        else:  # of half a precision, the product is rounded and not the factor
            part.copy_(part.to(dtype).mul_(own))
    return norm
