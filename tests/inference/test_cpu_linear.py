from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_lightning.inference.cpu_linear import packed_linears

from ..helpers import tiny_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (2, 40)])
def test_products_are_those_of_the_layer(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 512, bias=bias), nn.GELU(), nn.Linear(512, 300, bias=bias))
    states = torch.randn(*shape, 384)
    expected = model(states)
    with torch.no_grad(), packed_linears(model):
        assert "forward" in vars(model[0])
        torch.testing.assert_close(model(states), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_products_are_as_close_as_the_layers_own() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 512).bfloat16()
    states = torch.randn(9, 512).bfloat16()
    exact = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad(), packed_linears(layer):
        error = (layer(states).double() - exact).abs().max()
    assert error <= 1.5 * (layer(states).double() - exact).abs().max()


def test_parameters_and_forwards_are_put_back_also_after_an_error() -> None:
    layer = nn.Linear(512, 512)
    weight, forward = layer.weight, layer.forward
    with pytest.raises(ZeroDivisionError), packed_linears(layer):
        _ = 1 / 0
    assert layer.weight is weight
    assert layer.forward == forward
    assert "forward" not in vars(layer)
    assert weight.is_contiguous()


def test_new_weights_are_seen_by_the_next_context() -> None:
    layer = nn.Linear(512, 512)
    states = torch.randn(3, 512)
    with torch.no_grad():
        with packed_linears(layer):
            layer(states)
        layer.weight.mul_(2)
        with packed_linears(layer):
            torch.testing.assert_close(layer(states), nn.functional.linear(states, layer.weight, layer.bias))


class _Noisy(nn.Linear):
    pass


def test_what_is_no_plain_layer_is_left_alone() -> None:
    replaced = nn.Linear(512, 512)
    replaced.forward = lambda states: states  # type: ignore[method-assign]
    model = nn.ModuleList([_Noisy(512, 512), nn.Linear(8, 8), nn.Linear(512, 512).double(), replaced])
    kept = replaced.forward
    with packed_linears(model):
        assert [vars(module).get("forward") for module in model] == [None, None, None, kept]
    assert replaced.forward is kept
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_linears(layer := nn.Linear(512, 512)):
        assert "forward" not in vars(layer)


def test_base_layers_of_adapters_and_hooks_take_part() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=512, num_hidden_layers=1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.tensor([[1, 5, 7]])
    expected = model(input_ids=ids).logits
    seen: list[nn.Module] = []
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    base.register_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad(), packed_linears(model):
        assert "forward" in vars(base)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert seen == [base]
