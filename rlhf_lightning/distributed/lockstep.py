"""Lockstep of ranks that shard a model: all run the same sequence of passes, with any number of micro-batches each.

With sharded weights, every forward and backward pass is a series of collectives, and a rank with fewer micro-batches
than another would leave it waiting forever. So ranks agree on every pass before it begins: the earliest requested pass
comes next, and a rank that did not request it runs a one-token dummy pass with a gradient of zero. This is transparent
to methods, a pass that only some ranks need costs the others little, and no rank holds more than the weights that one
layer needs, unlike gathering all weights for a step.

With hybrid sharding all ranks agree as well, since gradients are summed over the groups.

Passes are ordered: forwards without gradient, forwards with gradient, backwards, and last ``barrier``, where ranks wait
until no rank has a pass left. Every other collective must come after a ``barrier``.

Votes are host memory and go over ``host_group``: hosts wait for each other and not for their devices, which have the
passes before still queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .host_group import host_group


class ShardedModel(Protocol):
    """Interface of a sharded model: the model, and a dummy pass through it."""

    @property
    def model(self) -> nn.Module:
        """The model without its heads."""

    def dummy_pass(self) -> Tensor:
        """Runs a dummy pass over one token and returns its hidden states."""


class Lockstep:
    """Keeps ranks with different numbers of micro-batches on the same sequence of collectives.

    Args:
        device: device of the models.
        models: all sharded models, in the same order on every rank.
    """

    def __init__(self, device: torch.device, models: Sequence[ShardedModel]) -> None:
        self.device = device
        self.models = models
        self._waiting: list[tuple[int, Tensor]] = []  # (model, hidden states) of forwards that await a backward
        self._reached: set[int] = set()  # models that losses of this step depend on
        self._suspended = 0

    @property
    def backward_pass(self) -> int:
        """The number of a backward pass, above those of all forwards."""
        return 2 * len(self.models)

    def forward(self, number: int, run: Callable[[], Any]) -> Any:
        """Runs a forward of model ``number`` when all ranks have agreed on it."""
        if self._suspended:
            return run()
        self._agree(number + len(self.models) * torch.is_grad_enabled())
        output = run()
        self._wait_for_backward(number, output[0])
        return output

    def backward(self, loss: Tensor) -> Tensor:
        """Returns a loss whose backward passes through every forward since the last one, when all ranks have agreed."""
        if self._suspended:
            return loss
        self._agree(self.backward_pass)
        # Which models this loss depends on, before the zero is added that depends on all of them.
        self._reached |= _reached(loss, self._waiting)
        return loss + self._zero() if self._waiting else loss

    def drop_unreached(self) -> None:
        """Removes zero gradients of models that no rank's loss depends on; every rank calls it once per step.

        On one rank these models would have no gradient, and the optimizer would skip them.
        """
        numbers = [number in self._reached for number in range(len(self.models))]
        reached = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        self._reached = set()
        self.barrier()
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=host_group())
        for model, any_rank in zip(self.models, reached.tolist(), strict=True):
            if not any_rank:
                for parameter in model.model.parameters():
                    parameter.grad = None

    def barrier(self) -> None:
        """Waits until no rank has a pass left, running dummy passes meanwhile."""
        if not self._suspended:
            self._agree(self.backward_pass + 1)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspends the lockstep while all ranks hold all weights, so that each may run any number of forwards."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def _agree(self, wanted: int) -> None:
        while True:
            # The lowest number wins, so that forwards come before the backward pass and all ranks finish it together.
            vote = torch.tensor(wanted, dtype=torch.int64, device="cpu")
            dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=host_group())
            coming = int(vote)
            if coming == wanted:
                return
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):  # dummy passes must not advance the random state
                self._dummy_pass(coming)

    def _dummy_pass(self, coming: int) -> None:
        count = len(self.models)
        # A backward pass gathers the same weights as the forwards before it.
        if coming == self.backward_pass:
            if self._waiting:
                self._zero().backward()
            return
        number = coming % count
        with torch.set_grad_enabled(coming >= count):
            self._wait_for_backward(number, self.models[number].dummy_pass())

    def _wait_for_backward(self, number: int, hidden: Tensor) -> None:
        if hidden.requires_grad:
            self._waiting.append((number, hidden))

    def _zero(self) -> Tensor:
        """Returns 0 with a zero gradient for all waiting forwards, so that every backward visits the same models."""
        waiting, self._waiting = self._waiting, []
        zero: Any = _Zero.apply
        result: Tensor = zero(*(hidden for _, hidden in waiting))
        return result


def _reached(loss: Tensor, waiting: Sequence[tuple[int, Tensor]]) -> set[int]:
    """Returns the models whose hidden states a loss depends on."""
    ends = {hidden.grad_fn: number for number, hidden in waiting}
    found, seen, open_nodes = set(), set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.add(ends[node])
        else:  # stops at hidden states, without descending into the decoder
            open_nodes.extend(following for following, _ in node.next_functions)
    return found


class _Zero(torch.autograd.Function):
    """Returns 0 for any input, with gradients of 0; a product with 0 would propagate NaN."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in given]
        return given[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


# A single lockstep, as there is a single process group.
_current: list[Lockstep] = []


def set_lockstep(lockstep: Lockstep | None) -> None:
    """Sets or clears the current lockstep."""
    _current[:] = [] if lockstep is None else [lockstep]


def lockstep() -> Lockstep | None:
    """Returns the current lockstep; ``None`` where no weights are sharded."""
    return _current[0] if _current else None


def barrier() -> None:
    """Waits for all ranks where weights are sharded; call it before any other collective."""
    if _current:
        _current[0].barrier()
