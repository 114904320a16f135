"""Weights in half precision: the same bits as autocast, in every kind of layer, pass and mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import (
    AdapterReference,
    OutputHead,
    ProcessRewardModel,
    ProcessRewardModelOptions,
    fused_logprobs,
    load_causal_lm,
    output_head,
)
from rlhf_lightning.models.half_weights import HalfLinear, hold_frozen, rounded, rounded_copy, widen_trained
from rlhf_lightning.models.saving import save_pretrained

from ..helpers import ARCHITECTURES, char_tokenizer, tiny_model

HALF = torch.bfloat16
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 4, 12, 30, 7]])


class Casts(TorchDispatchMode):
    """Counts the casts of matrices from fp32 to half precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


def autocast(dtype: torch.dtype = HALF) -> torch.autocast:
    return torch.autocast("cpu", dtype, cache_enabled=False)


def passes(model: nn.Module, times: int = 2) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Logits and gradients of some forward and backward passes under autocast, and the casts of weights."""
    model.zero_grad()
    logits = []
    with Casts(model) as casts, autocast():
        for _ in range(times):
            found = model(input_ids=TOKENS, use_cache=False).logits
            logits.append(found.detach())
            if found.requires_grad:
                found.float().logsumexp(-1).sum().backward()
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, casts.count


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in found[1].items())


def linears(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_copies_change_no_bit(arch: str) -> None:
    """Of logits and gradients, and each weight is cast once instead of once per pass."""
    model = tiny_model(arch).requires_grad_(True).train()
    expected = passes(model)
    with autocast(), rounded(model):
        first, found = passes(model, times=1), passes(model)
    assert_same(found, expected)
    assert torch.equal(first[0][0], expected[0][0])
    tied = model.config.tie_word_embeddings
    assert first[2] == expected[2] // 2 >= linears(model)
    # Left are those of layers that are no nn.Linear: of experts and of GPT-2.
    assert found[2] == expected[2] - 2 * linears(model)
    if arch not in ("gpt2", "qwen3_moe"):
        assert found[2] == 0
    assert not any("forward" in vars(module) for module in model.modules()), tied


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_frozen_weights_in_half_precision_change_no_bit(arch: str) -> None:
    model = tiny_model(arch).requires_grad_(False)
    expected = passes(model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    hold_frozen(model, HALF, exact=False)
    found = passes(model)
    assert_same(found, expected)
    held = [module for module in model.modules() if isinstance(module, HalfLinear)]
    # All but an output projection that is tied to the embedding.
    assert len(held) == linears(model) - model.config.tie_word_embeddings
    assert before - sum(p.numel() * p.element_size() for p in model.parameters()) == 2 * sum(
        module.weight.numel() for module in held
    )
    assert found[2] == expected[2] - 2 * len(held)


def test_only_values_that_it_holds_exactly() -> None:
    model = tiny_model("llama").requires_grad_(False)
    stored = {name: p.clone() for name, p in model.named_parameters()}
    hold_frozen(model, HALF)
    assert not any(isinstance(module, HalfLinear) for module in model.modules())

    model.bfloat16().float()  # as a model that was stored in bf16
    expected = {name: p.clone() for name, p in model.named_parameters()}
    assert any(not torch.equal(expected[name], p) for name, p in stored.items())
    hold_frozen(model, HALF)
    assert sum(isinstance(module, HalfLinear) for module in model.modules()) == linears(model)
    hold_frozen(model, None)
    assert not any(isinstance(module, HalfLinear) for module in model.modules())
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_without_autocast_kept_weights_are_widened() -> None:
    model = tiny_model("llama").requires_grad_(False).bfloat16().float()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        hold_frozen(model, HALF)
        assert torch.equal(model(input_ids=TOKENS).logits, expected)
        head, hidden = output_head(model), torch.randn(6, 32)
        found = fused_logprobs(hidden, head, torch.arange(6)).logprobs
        plain = fused_logprobs(hidden, OutputHead(head.weight.float()), torch.arange(6)).logprobs
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_a_weight_that_is_unfrozen_is_trained_in_single_precision() -> None:
    model = tiny_model("llama").bfloat16().float().requires_grad_(False)
    hold_frozen(model, HALF)
    layer: Any = model.model.layers[1].mlp.up_proj
    parameter = layer.weight
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    parameter.requires_grad_(True)
    widen_trained(model, HALF)
    assert layer.weight is parameter
    assert (parameter.dtype, type(layer)) == (torch.float32, nn.Linear)
    before = parameter.detach().clone()
    passes(model)
    optimizer.step()
    assert torch.equal(before.add(parameter.grad, alpha=-1e-3), parameter)
    assert isinstance(model.model.layers[0].mlp.up_proj, HalfLinear)


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(tiny_model("llama").bfloat16().float(), config)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}], ids=str)
def test_adapters_on_frozen_weights_change_no_bit(options: dict[str, Any]) -> None:
    model = adapted(**options)
    expected = passes(model)
    hold_frozen(model, HALF)
    assert_same(passes(model), expected)
    held = [name for name, module in model.named_modules() if isinstance(module, HalfLinear)]
    # DoRA reads the norms of its layer's weight, here all but the output projection's.
    assert len(held) == (1 if "use_dora" in options else 15)
    assert not any("lora_" in name for name in held)
    with autocast(), rounded(model):
        passes(model, times=1)
        found = passes(model)
    assert_same(found, expected)
    assert found[2] <= (2 * 14 if "use_dora" in options else 0)


def test_a_reference_that_exchanges_weights_reads_them() -> None:
    """Biases and unfrozen matrices are those of the start while the model with its adapter off is the reference."""
    model = adapted()
    trained = model.base_model.model.lm_head
    trained.weight.requires_grad_(True)
    reference = AdapterReference(model)
    with torch.no_grad(), autocast():
        with reference.scoring() as scored:
            expected = scored(input_ids=TOKENS).logits
        trained.weight.mul_(2.0)
        moved = model(input_ids=TOKENS).logits
        with rounded(model):
            with reference.scoring() as scored:
                assert torch.equal(scored(input_ids=TOKENS).logits, expected)
            assert torch.equal(model(input_ids=TOKENS).logits, moved)
    assert not torch.equal(moved, expected)


def test_checkpointed_layers_read_the_copies() -> None:
    model = tiny_model("llama").requires_grad_(True).train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected = passes(model)
    with autocast(), rounded(model):
        first, found = passes(model, times=1), passes(model)
    assert_same(found, expected)
    # Four passes over layers, two of the head; then each weight once, and not again.
    assert (expected[2], first[2], found[2]) == (2 * (2 * 14 + 1), 15, 0)


def test_weights_that_nothing_reads_are_not_rounded() -> None:
    """Such as the output projection under a reward head."""
    model = tiny_model("llama")
    with Casts(model) as casts, autocast(), rounded(model):
        assert casts.count == 0
        model.model(input_ids=TOKENS)
        assert casts.count == 14
        assert rounded_copy(model.lm_head).dtype == HALF  # type: ignore[union-attr]
        assert casts.count == 15


def test_passes_without_gradients_may_come_first() -> None:
    """The copies have the gradients that torch's own cache of autocast loses."""
    model = tiny_model("llama").requires_grad_(True).train()
    expected = passes(model)
    with autocast(), rounded(model):
        with torch.no_grad():
            model(input_ids=TOKENS)
        assert_same(passes(model), expected)


def test_the_output_projection_of_step_labels_is_exact(tmp_path: Path) -> None:
    options = ProcessRewardModelOptions(head="tokens", label_tokens=["+", "-"])
    model = tiny_model("llama").requires_grad_(False)
    process = ProcessRewardModel(model, options, tokenizer=char_tokenizer())
    hidden = torch.randn(4, 32)
    expected = process._step_logits(hidden)
    hold_frozen(model, HALF, exact=False)
    with autocast(), rounded(model):
        assert torch.equal(process._step_logits(hidden), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_exports_are_those_of_single_precision(merge: bool, tmp_path: Path) -> None:
    source = tmp_path / "base"
    model = tiny_model("llama").bfloat16().float()
    model.save_pretrained(source)
    char_tokenizer().save_pretrained(source)
    lora = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "up_proj"]} if merge else None
    torch.manual_seed(0)
    policy: Any = load_causal_lm(source, dtype=torch.float32, lora=lora)
    if not merge:
        policy.model.layers[0].requires_grad_(False)
    found = {}
    for name, dtype in (("before", None), ("after", HALF)):
        hold_frozen(policy, dtype)
        held = sum(isinstance(module, HalfLinear) for module in policy.modules())
        assert held == (0 if dtype is None else 15 if merge else 7)
        folder = save_pretrained(policy, char_tokenizer(), tmp_path / name, merge_adapter=merge)
        found[name] = load_file(folder / "model.safetensors")
    assert found["before"].keys() == found["after"].keys()
    for name, weight in found["before"].items():
        assert weight.dtype == found["after"][name].dtype
        assert torch.equal(weight, found["after"][name]), name


def test_an_engine_casts_each_weight_once(tmp_path: Path) -> None:
    """However many tokens it samples, and the samples stay the same."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    params = SamplingParams(max_new_tokens=8, seed=0)
    plain = copy.deepcopy(model)
    with autocast():
        expected = LocalEngine(plain, None).generate([[5, 6, 7]], 3, params)
        engine = LocalEngine(model, None)
        engine.generate([[5, 6, 7]], 3, params)
        with Casts(model) as casts:
            found = engine.generate([[5, 6, 7]], 3, params)
    assert [s.token_ids for s in found[0]] == [s.token_ids for s in expected[0]]
    assert casts.count == linears(model)
