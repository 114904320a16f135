"""Copies of many arrays at once, on the CPU and on a pretended GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.utils.transfer import count_index, to_device, to_host

from ..gpu.pretended import Pretended, pretended_cuda

ARRAYS = {
    "tokens": np.arange(7),
    "empty": np.zeros((2, 0), np.float32),
    "flags": np.array([True, False, True]),
    "number": np.array(1.5),
    "bounds": np.array([[0], [2], [5]], np.int32),
    "halves": np.array([0.5, 0.25], np.float32),
    "bytes": np.array([255], np.uint8),
}


def test_nothing_is_copied_on_the_cpu() -> None:
    for device in (None, "cpu", torch.device("cpu")):
        found = to_device(ARRAYS, device)
        for name, array in ARRAYS.items():
            assert np.shares_memory(found[name].numpy(), array) or not array.size
    assert to_host(found) == found
    assert all(to_host(found)[name] is tensor for name, tensor in found.items())


def test_there_and_back_again() -> None:
    with pretended_cuda():
        there = to_device({**ARRAYS, "tensor": torch.arange(3)}, "cuda")
        assert all(isinstance(tensor, Pretended) for tensor in there.values())
        back = to_host({**there, "here": torch.ones(2)})
    assert list(back) == [*ARRAYS, "tensor", "here"]
    for name, expected in {**to_device(ARRAYS, None), "tensor": torch.arange(3), "here": torch.ones(2)}.items():
        assert not isinstance(back[name], Pretended)
        assert back[name].dtype == expected.dtype
        assert torch.equal(back[name], expected)


def test_half_precision_and_gradients_are_read() -> None:
    with pretended_cuda():
        weight = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16, device="cuda").requires_grad_()
        back = to_host({"weight": weight.T, "sum": weight.sum()})
    assert back["weight"].dtype == torch.bfloat16
    assert back["weight"].tolist() == [[1.5], [-2.0]]
    assert back["sum"].tolist() == -0.5
    assert not back["sum"].requires_grad


def test_nothing_at_all() -> None:
    with pretended_cuda():
        assert to_device({}, "cuda") == to_host({}) == {}


@given(st.lists(st.integers(0, 5)), st.integers(6, 8))
def test_counts_are_those_of_bincount(values: list[int], size: int) -> None:
    index = torch.tensor(values, dtype=torch.long)
    assert torch.equal(count_index(index, size), torch.bincount(index, minlength=size))


def test_memory_that_is_not_contiguous() -> None:
    with pretended_cuda():
        found = to_device({"turned": np.arange(6).reshape(2, 3).T}, "cuda")
        assert to_host(found)["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    with pretended_cuda():
        found = to_host(to_device({"values": np.ones(shape), "byte": np.ones(1, bool)}, "cuda"))
    assert found["values"].shape == shape
