"""Products of 4-bit weights are in the precision of the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.models import load_causal_lm
from rlhf_lightning.models.merged_weights import merged_state

from ..helpers import save_tiny_model

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 4, 12, 30, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.05}
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", **sizes)  # with biases


class Products(TorchDispatchMode):
    """The precisions of products of 4-bit weights, and of what they are dequantised to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes" and func._opname in ("gemm_4bit", "dequantize_4bit"):
            self.found[func._opname, args[0].dtype if func._opname == "gemm_4bit" else args[5]] += 1
        return func(*args, **(kwargs or {}))


def quantised(folder: Path) -> Any:
    torch.manual_seed(0)
    lora = {"r": 4, "init_lora_weights": False}
    return load_causal_lm(folder, dtype=torch.float32, quantization="nf4", lora=lora)


def step(model: Any, *, half: bool) -> tuple[Tensor, Counter[tuple[str, torch.dtype]]]:
    with Products() as products, torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        logits = model(input_ids=TOKENS, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), products.found


@pytest.mark.parametrize("half", [True, False])
def test_products_are_in_the_precision_of_the_run(half: bool, folder: Path) -> None:
    _, found = step(quantised(folder), half=half)
    layers = 14
    assert {dtype for _, dtype in found} == {torch.bfloat16 if half else torch.float32}
    assert sum(count for (name, _), count in found.items() if name == "gemm_4bit") == layers
    # The first layer's inputs need no gradient but those of its adapters.
    assert sum(count for (name, _), count in found.items() if name == "dequantize_4bit") >= layers - 3


def test_they_are_those_of_dequantised_weights(folder: Path) -> None:
    """To the bit, with the gradient of the input; and biases stay in fp32."""
    layer = quantised(folder).base_model.model.model.layers[0].self_attn.q_proj.base_layer
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert (weight.dtype, layer.bias.dtype) == (torch.float32, torch.float32)
    found = []
    for plain in (False, True):
        states = torch.linspace(-1, 1, 5 * 64).view(5, 64).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = F.linear(states, weight, layer.bias) if plain else layer(states)
        out.float().square().sum().backward()
        found.append((out, states.grad))
    assert found[0][0].dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
    assert layer.bias.dtype == torch.float32


def test_a_merged_export_does_not_know_of_it(folder: Path) -> None:
    model = quantised(folder)
    before = {name: tensor.clone() for name, tensor in merged_state(model).items()}
    step(model, half=True)
    after = merged_state(model)
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, after[name]) for name, tensor in before.items())
