"""Ranks that share the weights of a model run the same forwards and backwards, whatever their data ask of each.

Where weights are sharded, every forward and backward pass is a series of collectives, and a rank with fewer
micro-batches than another would leave it waiting for ever. So ranks agree on every pass before it begins: the earliest
of those that are asked for comes next, and a rank that did not ask for it stands in with a pass over one token, whose
gradient is zero. Methods know nothing of this, and a forward that only some ranks make costs the others next to
nothing; nobody holds more than the weights that one layer needs, which gathering all weights for a step would cost.

Also where groups of ranks have a copy of the weights each, all ranks agree: gradients are added up over the groups.

Passes are ordered: forwards without gradient, forwards with gradient, backwards, and last ``meet``, where ranks wait
until none has a pass left to make. Every other collective has to be behind a ``meet``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ShardedModel(Protocol):
    """What an agreement has to know of a model."""

    @property
    def model(self) -> nn.Module:
        """The model without its heads."""

    def stand_in(self) -> Tensor:
        """Makes a pass over one token and returns its hidden states."""


class Lockstep:
    """What ranks agree by.

    Args:
        device: where the numbers that are exchanged lie.
        models: all sharded models, in the same order on every rank.
    """

    def __init__(self, device: torch.device, models: Sequence[ShardedModel]) -> None:
        self.device = device
        self.models = models
        self._waiting: list[tuple[int, Tensor]] = []  # models and their hidden states, from forward to backward
        self._reached: set[int] = set()  # models that losses of this step depend on
        self._held = 0

    @property
    def backward_pass(self) -> int:
        """The number of a backward, above those of all forwards."""
        return 2 * len(self.models)

    def forward(self, number: int, run: Callable[[], Any]) -> Any:
        """Makes a forward of the model of this number, once it is its turn."""
        if self._held:
            return run()
        self._agree(number + len(self.models) * torch.is_grad_enabled())
        output = run()
        self._wait_for_backward(number, output[0])
        return output

    def backward(self, loss: Tensor) -> Tensor:
        """Returns a loss whose backward passes through every forward since the last one, once it is its turn."""
        if self._held:
            return loss
        self._agree(self.backward_pass)
        self._reached |= _reached(loss, self._waiting)
        return loss + self._zero() if self._waiting else loss

    def drop_unreached(self) -> None:
        """Takes the gradient of 0 away from models that no rank's loss depends on; every rank calls it, once a step.

        On one rank they have none, and an optimizer leaves them alone.
        """
        reached = torch.tensor([number in self._reached for number in range(len(self.models))], dtype=torch.int32)
        self._reached = set()
        self.meet()
        reached = reached.to(self.device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        for model, any_rank in zip(self.models, reached.tolist(), strict=True):
            if not any_rank:
                for parameter in model.model.parameters():
                    parameter.grad = None

    def meet(self) -> None:
        """Waits until no rank has a pass left to make, standing in for those that have."""
        if not self._held:
            self._agree(self.backward_pass + 1)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lets every rank run what it likes, while all of them hold all weights."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _agree(self, wanted: int) -> None:
        while True:
            vote = torch.tensor(wanted, dtype=torch.int64, device=self.device)
            dist.all_reduce(vote, op=dist.ReduceOp.MIN)
            coming = int(vote)
            if coming == wanted:
                return
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):  # what a rank draws does not depend on the others
                self._stand_in(coming)

    def _stand_in(self, coming: int) -> None:
        count = len(self.models)
        if coming == self.backward_pass:
            if self._waiting:
                self._zero().backward()
            return
        number = coming % count
        with torch.set_grad_enabled(coming >= count):
            self._wait_for_backward(number, self.models[number].stand_in())

    def _wait_for_backward(self, number: int, hidden: Tensor) -> None:
        if hidden.requires_grad:
            self._waiting.append((number, hidden))

    def _zero(self) -> Tensor:
        """0, with a gradient of 0 for all that waits: no loss may leave a model out that another rank goes through."""
        waiting, self._waiting = self._waiting, []
        zero: Any = _Zero.apply
        result: Tensor = zero(*(hidden for _, hidden in waiting))
        return result


def _reached(loss: Tensor, waiting: Sequence[tuple[int, Tensor]]) -> set[int]:
    """Models on whose hidden states a loss depends."""
    ends = {hidden.grad_fn: number for number, hidden in waiting}
    found, seen, open_nodes = set(), set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.add(ends[node])
        else:  # not on into the decoder
            open_nodes.extend(following for following, _ in node.next_functions)
    return found


class _Zero(torch.autograd.Function):
    """Returns 0 whatever it is given, and gives back gradients of 0: a product with 0 would pass nan on."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in given]
        return given[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


# As there is one process group, there is one agreement.
_current: list[Lockstep] = []


def set_lockstep(lockstep: Lockstep | None) -> None:
    """Puts an agreement into force, or ends it."""
    _current[:] = [] if lockstep is None else [lockstep]


def lockstep() -> Lockstep | None:
    """The agreement in force; ``None`` where no weights are sharded."""
    return _current[0] if _current else None


def meet() -> None:
    """Waits for all ranks where weights are sharded; to be called before any collective of one's own."""
    if _current:
        _current[0].meet()
