"""Ranks agree in host memory: no device is waited for, and no gradient is held twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhf_lightning.core.gradients import sum_gradients
from rlhf_lightning.distributed import host_group as host
from rlhf_lightning.distributed.collectives import gather_objects, max_over_ranks, sum_over_ranks, sum_vector_over_ranks
from rlhf_lightning.distributed.lockstep import Lockstep
from rlhf_lightning.sequences import ExampleBatch

from ..budgets.measure import costs
from ..budgets.trace import traced_cuda
from ..gpu.pretended import Pretended
from ..invariance.harness import Batches
from ..invariance.methods import METHODS


class Ranks:
    """Two ranks that always agree; the collectives of this one, those of the device with their bytes."""

    def __init__(self) -> None:
        self.on_host = 0
        self.on_device: list[int] = []
        self.seen: list[Tensor] = []

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.seen.append(tensor)
        if isinstance(tensor, Pretended):
            self.on_device.append(tensor.nbytes)
        else:
            self.on_host += 1
        if op == dist.ReduceOp.SUM:
            tensor.mul_(2)

    def all_gather_object(self, parts: list[Any], value: Any, group: Any = None) -> None:
        self.on_host += 1
        parts[:] = [value] * len(parts)


@contextmanager
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with (
            patch.object(dist, "all_reduce", ranks.all_reduce),
            patch.object(dist, "all_gather_object", ranks.all_gather_object),
        ):
            yield ranks
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_a_step_of_two_ranks_waits_for_the_device_as_often_as_one(name: str) -> None:
    """Once, to read the gradient's norm and the rows; KTO also for its estimate."""
    alone = costs.__wrapped__(name)
    with two_ranks() as ranks:
        together = costs.__wrapped__(name)
    assert together.micro_batch.waits == alone.micro_batch.waits == {}
    assert together.step.totals["waits"] == alone.step.totals["waits"] == (2 if name == "kto" else 1)
    assert together.step.totals["uploads"] == alone.step.totals["uploads"] == 0
    # Of three steps, whatever their number of micro-batches: one collective on devices, which sums the gradients.
    assert len(ranks.on_device) == 3
    # Counts of the batch, which gradients there are, rows, and whether a signal came; KTO also its partners and their
    # rows; and at the end whether all have ended.
    assert ranks.on_host == 3 * (6 if name == "kto" else 4) + 1


def test_votes_of_ranks_that_share_weights_do_not_wait() -> None:
    class Model:
        model = nn.Linear(2, 2)

        def dummy_pass(self) -> Tensor:
            raise AssertionError("all ranks want the same")

    with two_ranks() as ranks, traced_cuda() as tracer:
        lockstep = Lockstep(torch.device("cuda", 0), [Model()])
        weight = torch.ones(2, 2, device="cuda").requires_grad_()
        tracer.take()
        for _ in range(3):
            hidden = lockstep.forward(0, lambda: (weight * 2,))[0]
            lockstep.backward(hidden.sum()).backward()
        lockstep.barrier()
        lockstep.drop_unreached()
        trace = tracer.take()
    assert trace.waits == {}
    assert trace.uploads == {}
    # Three forwards, three backwards, two barriers, and which models were reached.
    assert (ranks.on_host, ranks.on_device) == (9, [])


def test_collectives_are_exact_and_on_the_host() -> None:
    with two_ranks() as ranks, traced_cuda() as tracer:
        vector = torch.tensor([1.5, -2.0], device="cuda")
        tracer.take()
        assert sum_over_ranks({"tokens": 2.0**53, "rows": 3.0}) == {"tokens": 2.0**54, "rows": 6.0}
        assert max_over_ranks(7) == 7
        assert gather_objects("a") == ["a", "a"]
        assert tracer.take().waits == {}
        assert sum_vector_over_ranks(vector).tolist() == [3.0, -4.0]
    assert (ranks.on_host, ranks.on_device) == (4, [])


def test_large_gradients_are_summed_where_they_are() -> None:
    large, small, other, half, unused = (
        nn.Parameter(torch.zeros(size, dtype=dtype))
        for size, dtype in ((64, None), (3, None), (5, None), (64, torch.bfloat16), (2, None))
    )
    parameters = [small, large, other, half, unused]
    for number, parameter in enumerate(parameters[:4], start=1):
        parameter.grad = torch.full_like(parameter, float(number))
    before = [p.grad for p in parameters]
    with two_ranks() as ranks:
        sum_gradients(parameters, bucket_bytes=1 << 20, alone_bytes=256)
    assert [p.grad is grad for p, grad in zip(parameters, before, strict=True)] == [True] * 5
    assert [None if p.grad is None else p.grad.unique().tolist() for p in parameters] == [
        [2.0],
        [4.0],
        [6.0],
        [8.0],
        None,
    ]
    flags, alone, bucket, wide = ranks.seen
    assert flags.dtype == torch.int32
    assert large.grad is not None
    assert alone.data_ptr() == large.grad.data_ptr()
    assert (bucket.numel(), wide.numel(), wide.dtype) == (8, 64, torch.float32)


def test_host_memory_has_a_group_of_its_own_where_the_default_one_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    with two_ranks():
        assert host.host_group() is None
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
        monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or object())
        host.set_timeout(timedelta(hours=2))
        group = host.host_group()
        assert group is not None
        assert host.host_group() is group
        host.set_timeout(None)
    assert made == [{"backend": "gloo", "timeout": timedelta(hours=2)}]
    with two_ranks():  # another run has another
        assert host.host_group() is not group
    assert [options["timeout"] for options in made] == [timedelta(hours=2), None]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_ddp_holds_no_gradient_twice(tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buckets have the size of all gradients; the weights of rank 0 are taken without it."""
    shared: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("buckets are allocated")

    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", refuse)
    monkeypatch.setattr("rlhf_lightning.distributed.whole_gradients._sync_module_states", shared.append)
    method = METHODS["sft"]
    module = method.module(str(tiny_model_folder()), **method.options)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 1, **quiet}
    trainer = lightning.Trainer(strategy=DDPStrategy(process_group_backend="gloo"), **settings)
    try:
        trainer.fit(module, Batches(ExampleBatch(method.rows(4))))
        assert trainer.global_step == 1
        assert trainer.strategy.model is module
        assert shared == [module]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
