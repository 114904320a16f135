"""Sums of adapters: peft's forward is the oracle of single adapters, dense sums of what it computes that of merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.merging import merge, verify
from rlhf_lightning.merging.methods.lora import Product, concatenate, truncate

TOKENS = torch.arange(9)[None]
WEIGHTS = (0.7, -0.4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "base"
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, seed: int, **options) -> Path:
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **options}
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(**options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), folder).double().eval()


def functions(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Weights and biases of a model's layers, as their forwards compute them; ``layers`` are those of the base."""
    found = {}
    for path, original in layers.items():
        layer = model.get_submodule(path)
        if "embed" in path:
            found[f"{path}.weight"] = layer(torch.arange(40))
        elif "norm" in path:
            found[f"{path}.weight"] = layer(torch.ones(16).double()) * (1 + 1e-6) ** 0.5
        else:
            inputs = original.in_features
            found[f"{path}.bias"] = layer(torch.zeros(1, inputs).double())[0]
            found[f"{path}.weight"] = (layer(torch.eye(inputs).double()) - found[f"{path}.bias"]).T
    return found


@torch.no_grad()
def naive_logits(base: Path, adapters: list[Path], weights) -> torch.Tensor:
    """Logits of the base plus the weighted sum of what each adapter changes."""
    model = load(base).double()
    layers = {n: layer for n, layer in model.named_modules() if "weight" in dict(layer.named_parameters(recurse=False))}
    start = functions(model, layers)
    total = dict(start)
    for folder, weight in zip(adapters, weights, strict=True):
        found = functions(adapted(base, folder).base_model.model, layers)
        total = {name: total[name] + weight * (found[name] - start[name]) for name in start}
    missing = {f"{path}.bias" for path in layers} - dict(model.named_parameters()).keys()
    model.load_state_dict({name: value for name, value in total.items() if name not in missing})
    return model(TOKENS).logits


VARIANTS = {
    "ranks and layers": ({}, {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ({"use_rslora": True}, {"r": 2}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"use_rslora": True, "rank_pattern": {r"layers\.0\..*up_proj": 1}},
    ),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "modules_to_save": ({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm", "lm_head"]}),
    "lora_bias": ({"lora_bias": True, "use_rslora": True}, {"target_modules": ["down_proj"]}),
    "bias": ({"bias": "all"}, {"bias": "lora_only", "target_modules": ["o_proj"]}),
}
DORA = {"dora": ({"use_dora": True}, {}), "dora and rslora": ({"use_dora": True, "use_rslora": True}, {"bias": "all"})}


def pair(base: Path, root: Path, options) -> list[Path]:
    return [save_adapter(base, root / f"adapter{n}", n + 1, **given) for n, given in enumerate(options)]


@pytest.mark.parametrize("name", VARIANTS)
def test_sums_compute_what_their_adapters_add(name, base, tmp_path):
    adapters = pair(base, tmp_path, VARIANTS[name])
    expected = naive_logits(base, adapters, WEIGHTS)
    for method, options in (("cat", {}), ("svd", {"rank": 99})):
        output = merge(method, models=adapters, output=tmp_path / method, weights=WEIGHTS, **options)
        with torch.no_grad():
            found = adapted(base, output)(TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert verify(output) == []
        assert json.loads((output / "merge_manifest.json").read_text())["errors"] == {}
    with torch.no_grad():
        assert float((load(base).double()(TOKENS).logits - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*VARIANTS, *DORA])
def test_adapters_are_merged_into_their_base(name, base, tmp_path):
    adapters = pair(base, tmp_path, {**VARIANTS, **DORA}[name])
    options = {"weights": WEIGHTS, "precision": "float64"}
    output = merge("task_arithmetic", base=base, models=adapters, output=tmp_path / "out", **options)
    with torch.no_grad():
        found = load(output).double()(TOKENS).logits
    torch.testing.assert_close(found, naive_logits(base, adapters, WEIGHTS), rtol=1e-6, atol=1e-6)


def test_a_rank_states_its_error(base, tmp_path):
    adapters = pair(base, tmp_path, ({}, {"target_modules": ["q_proj", "down_proj"]}))
    lines: list[str] = []
    output = merge("svd", models=adapters, output=tmp_path / "out", rank=3, weights=WEIGHTS, say=lines.append)
    errors = json.loads((output / "merge_manifest.json").read_text())["errors"]
    found, factors = (
        load_file(output / "adapter_model.safetensors"),
        [load_file(path / "adapter_model.safetensors") for path in adapters],
    )
    assert len(errors) == len(lines) == 6
    for path, error in errors.items():
        a, b = (f"base_model.model.{path}.lora_{which}.weight" for which in "AB")
        dense = sum(
            weight * 4 * state[b].double() @ state[a].double()
            for weight, state in zip(WEIGHTS, factors, strict=True)
            if a in state
        )
        values = torch.linalg.svdvals(dense)
        left = (dense - found[b].double() @ found[a].double()).norm()
        assert found[a].shape[0] == 3
        assert error["frobenius"] == pytest.approx(float(values[3:].norm()), rel=1e-9)
        assert error["frobenius"] == pytest.approx(float(left), rel=1e-5)
        assert error["relative"] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-9)
        assert f"{path}: rank 3, error {error['frobenius']:.4g}" in " ".join(lines)


def test_products_by_hand():
    one = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    other = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0]])
    found = concatenate([one, other], [0.5, -3.0])
    assert (found.b_Or @ found.a_rI).tolist() == [[1.0, 0.0], [0.0, -3.0]]
    shorter = truncate(found, 1)
    torch.testing.assert_close(shorter.b_Or @ shorter.a_rI, torch.tensor([[0.0, 0.0], [0.0, -3.0]]))
    assert shorter.error == pytest.approx(1.0)
    assert shorter.norm == pytest.approx(10**0.5)
    # A sum of rank 1 needs no second.
    same = concatenate([one, one], [1.0, 1.0])
    assert [len(truncate(same, 5).a_rI), truncate(same, 5).error] == [1, 0.0]
    zero = truncate(Product(torch.zeros(3, 2), torch.zeros(2, 4)), 2)
    assert [float((zero.b_Or @ zero.a_rI).abs().max()), zero.error] == [0.0, 0.0]


def change(folder: Path, **options) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def test_what_is_no_adapter_is_refused(base, tmp_path):
    plain, other = pair(base, tmp_path, ({}, {"r": 2}))

    def tried(*models, method="cat", **options):
        with pytest.raises(ValueError, match=r".") as error:
            merge(method, models=models, output=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    dora = save_adapter(base, tmp_path / "dora", 5, use_dora=True)
    assert "uses DoRA, which rescales the base's weights" in tried(plain, dora)
    assert "is a whole model: use method='linear'" in tried(plain, base)
    assert "are the same adapter" in tried(plain, other, plain)
    assert "a weight of 0 leaves an adapter out" in tried(plain, other, weights=[1.0, 0.0])
    assert "the merged adapter equals" in tried(plain)
    assert "give rank=16" in tried(plain, other, method="svd")
    assert "rank is 0" in tried(plain, other, method="svd", rank=0)
    assert "remove layers" in tried(plain, other, layers={"q": {}})
    assert "weights has 1 numbers for 2 models" in tried(plain, other, weights=[1.0])

    whole = save_adapter(base, tmp_path / "whole", 6, target_modules=["q_proj"], modules_to_save=["up_proj"])
    assert "was trained in full in" in tried(plain, whole)
    embedding = save_adapter(base, tmp_path / "embedding", 7, target_modules=["embed_tokens"])
    biased = save_adapter(base, tmp_path / "biased", 8, lora_bias=True)
    assert "changes the embedding 'model.embed_tokens'" in tried(biased, embedding)
    change(other, base_model_name_or_path="elsewhere")
    assert "one of 'elsewhere': only adapters of one base" in tried(plain, other)
    merge("cat", models=[plain, other], base=base, output=tmp_path / "fine")

    state = load_file(plain / "adapter_model.safetensors")
    shutil.copytree(plain, tmp_path / "wide")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({**state, key: torch.zeros(17, 4)}, tmp_path / "wide" / "adapter_model.safetensors")
    assert "with different shapes" in tried(plain, tmp_path / "wide")
    save_file({**state, key: torch.full((16, 4), 1e38)}, tmp_path / "wide" / "adapter_model.safetensors")
    assert "not finite" in tried(plain, tmp_path / "wide", weights=[1.0, 10.0])


def test_a_folder_with_a_whole_model_is_not_replaced(base, tmp_path):
    adapters = pair(base, tmp_path, ({}, {"r": 2}))
    merge("task_arithmetic", base=base, models=adapters, output=tmp_path / "out")
    with pytest.raises(ValueError, match="holds a model, and this run writes a adapter"):
        merge("cat", models=adapters, output=tmp_path / "out")
    merge("cat", models=adapters, output=tmp_path / "sum")
    merge("svd", models=adapters, output=tmp_path / "sum", rank=1)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 1
