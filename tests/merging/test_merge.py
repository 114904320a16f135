"""Merges on disk: equal to those in memory, loud where inputs do not fit, resumed after a kill to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_lightning.merging import greedy_soup, merge, tensor_files, verify
from rlhf_lightning.merging.data import _check_names, estimate_fisher, estimate_products
from rlhf_lightning.merging.merge import build_method
from rlhf_lightning.merging.methods import METHODS, merge_tensors
from rlhf_lightning.merging.methods import base as base_module
from rlhf_lightning.merging.sources import open_source
from rlhf_lightning.merging.stream import JOURNAL
from rlhf_lightning.merging.tensor_files import read_header
from rlhf_lightning.models import load_tokenizer
from rlhf_lightning.utils.files import REPLACED

from ..helpers import Killed, killed_after, save_tiny_model

TOKENS = torch.arange(9)[None]
NANO = Path(__file__).parents[2] / "configs" / "models" / "nano"


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    start = llama(0)
    start.save_pretrained(root / "base")
    for number, name in enumerate("abc", start=1):
        model = llama(0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(root / name)
    return {name: root / name for name in ("base", "a", "b", "c")}


def states(folders, *names):
    return [load_file(folders[name] / "model.safetensors") for name in names]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slerp", "fisher", "regmean"}))
def test_a_merge_on_disk_equals_one_in_memory(name, folders, tmp_path):
    output = merge(name, base=folders["base"], models=[folders[n] for n in "abc"], output=tmp_path / "out")
    start, *models = states(folders, "base", "a", "b", "c")
    expected = merge_tensors(METHODS[name](), models, start)
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, msg=key)
    assert verify(output) == []
    logits = AutoModelForCausalLM.from_pretrained(output)(torch.arange(5)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_threads_and_blocks_change_no_bytes(folders, tmp_path, monkeypatch):
    options = {"base": folders["base"], "models": [folders[n] for n in "abc"], "density": 0.3}
    merge("ties", **options, output=tmp_path / "whole")
    monkeypatch.setattr(base_module, "BLOCK_ELEMENTS", 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            merge("ties", **options, output=tmp_path / str(threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert all((tmp_path / name / "model.safetensors").read_bytes() == whole for name in ("1", "3"))


def test_layers_have_densities_of_their_own(folders, tmp_path):
    options = {"base": folders["base"], "models": [folders["a"], folders["b"]]}
    output = merge("ties", **options, output=tmp_path / "out", density=0.2, layers={"embed": {"density": 0.9}})
    start, *models = states(folders, "base", "a", "b")
    found = load_file(output / "model.safetensors")
    for density, keys in (
        (0.9, ["model.embed_tokens.weight"]),
        (0.2, sorted(set(start) - {"model.embed_tokens.weight"})),
    ):
        expected = merge_tensors(METHODS["ties"](density=density), models, start)
        assert all(torch.equal(found[key], expected[key]) for key in keys)


def test_types_shards_and_layers(folders, tmp_path):
    output = merge(
        "slerp",
        models=[folders["a"], folders["b"]],
        output=tmp_path / "out",
        t=0.3,
        dtype="bfloat16",
        precision="float64",
        layers={r"layers\.0\.": {"t": 0.0}, "embed": {"t": 1.0}},
        max_shard_size="4KB",
    )
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 6000 for file in files)
    found = {key: value for file in files for key, value in load_file(file).items()}
    a, b = states(folders, "a", "b")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[key], a[key].bfloat16())
    assert torch.equal(found["model.embed_tokens.weight"], b["model.embed_tokens.weight"].bfloat16())
    key = "model.layers.1.mlp.up_proj.weight"
    expected = merge_tensors(METHODS["slerp"](t=0.3), [{key: a[key]}, {key: b[key]}], dtype=torch.float64)[key]
    assert torch.equal(found[key], expected.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert verify(output) == []


def test_the_manifest_names_the_convention_and_verify_what_differs(folders, tmp_path):
    output = merge("ties", base=folders["base"], models=[folders["a"], folders["b"]], output=tmp_path / "out")
    manifest = json.loads((output / "merge_manifest.json").read_text())
    assert manifest["options"]["preset"] == "paper"
    assert manifest["options"]["trim_scope"] == "model"
    decided = {"elect_on", "normalize_by", "zero_sign", "trim_scope"}
    assert manifest["options"].keys() == {"weights", "scale", "preset", "density"} | decided
    assert [entry["role"] for entry in manifest["inputs"]] == ["models[0]", "models[1]", "base"]
    weights = output / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copyfile(weights, output / "extra.safetensors")
    (difference,) = verify(output)
    assert "model.safetensors: sha256 is" in difference
    weights.unlink()
    assert "missing (output)" in verify(output)[0]
    with pytest.raises(ValueError, match=r"has no merge_manifest\.json"):
        verify(folders["a"])


# Adapters.


def adapted(model, path: Path, **options) -> PeftModel:
    torch.manual_seed(5)
    targets = options.pop("target_modules", ["q_proj", "up_proj"])
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options))
    with torch.no_grad():
        for weight in peft.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    peft.save_pretrained(path)
    return peft.eval()


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_is_merged_as_it_computes(name, folders, tmp_path):
    start = LlamaForCausalLM.from_pretrained(folders["base"])
    with torch.no_grad():
        peft = adapted(start, tmp_path / "adapter", **VARIANTS[name])
        expected = peft(torch.arange(9)[None]).logits
        options = {"models": [tmp_path / "adapter"], "output": tmp_path / "out", "precision": "float64"}
        output = merge("linear", base=folders["base"], **options)
        found = AutoModelForCausalLM.from_pretrained(output)(torch.arange(9)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, LlamaForCausalLM.from_pretrained(folders["base"])(torch.arange(9)[None]).logits)


def test_an_adapter_with_biases_on_conv1d(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for number, options in enumerate(({"lora_bias": True}, {"bias": "all"}, {"use_dora": True})):
        start = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        place = tmp_path / f"adapter{number}"
        peft = adapted(start, place, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **options)
        with torch.no_grad():
            expected = peft(torch.arange(9)[None]).logits
            output = merge("linear", base=tmp_path / "base", models=[place], output=tmp_path / f"out{number}")
            found = AutoModelForCausalLM.from_pretrained(output)(torch.arange(9)[None]).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA adapters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised with pissa_niter_4"),
        ({"r": 8}, "have rank 4, and adapter_config.json says 8"),
    ],
)
def test_adapters_that_equal_no_weights_are_refused(changes, message, folders, tmp_path):
    adapted(LlamaForCausalLM.from_pretrained(folders["base"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        merge("linear", base=folders["base"], models=[tmp_path / "adapter"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_bias_without_a_bias_to_add_to_is_refused(folders, tmp_path):
    adapted(LlamaForCausalLM.from_pretrained(folders["base"]), tmp_path / "adapter", lora_bias=True, bias="none")
    with pytest.raises(ValueError, match="whose layer has none"):
        merge("linear", base=folders["base"], models=[tmp_path / "adapter"], output=tmp_path / "out")


TIED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "layers": {},
    "tied embedding": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tied modules_to_save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def tied_llama(path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", TIED)
def test_an_adapter_unties_only_what_it_changes(name, tmp_path):
    base = tied_llama(tmp_path / "base")
    with torch.no_grad():
        expected = adapted(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", **TIED[name])(TOKENS).logits
        output = merge("linear", models=[tmp_path / "adapter"], output=tmp_path / "out", precision="float64", keep=True)
        found = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    assert found.config.tie_word_embeddings == (name == "layers" or "tied" in name)
    stored = load_file(output / "model.safetensors").keys()
    assert ("lm_head.weight" in stored) != found.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_models_are_merged_with_an_untied_adapter(tmp_path):
    base = tied_llama(tmp_path / "base")
    other = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    peft = adapted(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["embed_tokens"])
    models = [tmp_path / "adapter", tmp_path / "other"]
    output = merge("task_arithmetic", base=base, models=models, output=tmp_path / "out")
    found = load_file(output / "model.safetensors")
    embedding = peft.get_input_embeddings()(torch.arange(40)).detach()
    torch.testing.assert_close(found["lm_head.weight"], other.lm_head.weight.detach())
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedding + 0.1)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_brings_tokenizer_and_generation_config_of_its_base(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    ends = GenerationConfig.from_pretrained(base)
    ends.eos_token_id = [1, 2]
    ends.save_pretrained(base)
    adapter = tmp_path / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(base), adapter)
    # Found from the adapter's folder, as where a model is loaded.
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    output = merge("linear", models=[adapter], output=tmp_path / "out")
    assert load_tokenizer(output).get_vocab() == load_tokenizer(base).get_vocab()
    assert (output / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()
    assert GenerationConfig.from_pretrained(output).eos_token_id == [1, 2]
    # Its own goes first; the tokenizer remains that of the base.
    ends.eos_token_id = 7
    ends.save_pretrained(adapter)
    again = merge("linear", models=[adapter], output=tmp_path / "again")
    assert GenerationConfig.from_pretrained(again).eos_token_id == 7
    assert (again / "tokenizer.json").is_file()


def test_another_shape_is_told_with_both(folders, tmp_path):
    adapter = tmp_path / "adapter"
    adapted(LlamaForCausalLM.from_pretrained(folders["base"]), adapter, modules_to_save=["embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    key = next(name for name in state if "embed_tokens" in name)
    save_file({**state, key: torch.zeros(42, 16)}, path)
    with pytest.raises(ValueError, match=r"of shape \(42, 16\), and its base model one of shape \(40, 16\): give as"):
        merge("linear", base=folders["base"], models=[adapter], output=tmp_path / "out")
    save_file({**state, "base_model.model.model.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"'model\.extra\.weight', which its base model does not have"):
        merge("linear", base=folders["base"], models=[adapter], output=tmp_path / "out")


# Statistics of data.


def test_fisher_equals_a_loop_over_rows():
    model = llama(1).double()
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    found = estimate_fisher(model, rows, seed=3)
    assert not any(weight.grad is not None for weight in model.parameters())

    # Each row by hand: the same draws, and the gradient of their sum.
    from rlhf_lightning.inference import derive_seed

    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(derive_seed(3, number) >> 1)
        logits = model(torch.tensor([row])).logits[0, :-1]
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator).squeeze(-1)
        total = sum(logits[t].float().log_softmax(-1)[drawn[t]] for t in range(len(row) - 1))
        for (name, _), gradient in zip(
            model.named_parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
        ):
            sums[name] += gradient.square()
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / 5, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_fisher_converges_to_the_expectation_over_the_vocabulary():
    model = llama(2).double()
    row = [1, 2, 3]
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(model.named_parameters())[name]
    exact = torch.zeros_like(weight)
    logprobs = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    for t in range(2):
        for token in range(40):
            (gradient,) = torch.autograd.grad(logprobs[t, token], weight, retain_graph=True)
            exact += float(logprobs[t, token].exp()) * gradient.square()
    estimate = sum(estimate_fisher(model, [row] * 50, seed=s)[name] for s in range(40)) / 40
    error = float((estimate - exact / 2).norm() / (exact / 2).norm())
    assert error < 0.1  # 2,000 draws in each context


def test_products_equal_a_loop_over_inputs():
    model = llama(1).double()
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    found = estimate_products(model, rows)
    name = "model.layers.0.self_attn.k_proj.weight"
    hidden = [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(row))) for row in rows]
    x = torch.cat(hidden)
    torch.testing.assert_close(found[name].products[0], x.T @ x / 7, rtol=1e-10, atol=1e-12)
    assert "lm_head.weight" in found
    assert not found[name].transposed


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_merges_by_data(method, tmp_path):
    from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer

    for number in range(2):
        torch.manual_seed(number)
        model = load_causal_lm(NANO, dtype=torch.float32, init="random")
        model.save_pretrained(tmp_path / str(number))
        load_tokenizer(NANO).save_pretrained(tmp_path / str(number))
    rows = [{"prompt": "1+2=?\n", "completion": "3"}, {"prompt": "4+5=?\n", "completion": "9"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "models": [tmp_path / "0", tmp_path / "1"],
        "output": tmp_path / "out",
        "rows": str(tmp_path / "rows.jsonl"),
    }
    with pytest.raises(ValueError, match="give rows="):
        merge(method, models=options["models"], output=options["output"])
    output = merge(method, **options)
    found = AutoModelForCausalLM.from_pretrained(output)
    means = {
        name: (a + b) / 2
        for (name, a), b in zip(
            AutoModelForCausalLM.from_pretrained(tmp_path / "0").state_dict().items(),
            AutoModelForCausalLM.from_pretrained(tmp_path / "1").state_dict().values(),
            strict=True,
        )
    }
    far = [name for name, value in found.state_dict().items() if not torch.allclose(value, means[name], atol=1e-4)]
    assert any("mlp" in name for name in far)


@pytest.mark.parametrize(("method", "options"), [("fisher", {}), ("regmean", {"ridge": 1.0})])
def test_adapters_are_measured_as_their_sums(method, options, tmp_path):
    """The oracle merges whole models that peft has made of the adapters."""
    base = save_tiny_model(tmp_path / "base", "llama", num_hidden_layers=1)
    tokenizer, adapters, wholes = load_tokenizer(base), [], []
    for number in range(2):
        adapters.append(tmp_path / f"adapter{number}")
        torch.manual_seed(number)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["up_proj"]))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += torch.randn(weight.shape)
        model.save_pretrained(adapters[-1])
        wholes.append(tmp_path / f"whole{number}")
        model.merge_and_unload().save_pretrained(wholes[-1])
        tokenizer.save_pretrained(wholes[-1])
    rows = [{"prompt": "1+2=?", "completion": "3"}, {"prompt": "4+5=?", "completion": "9"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"rows": str(tmp_path / "rows.jsonl"), "precision": "float64", **options}
    output = merge(method, models=adapters, output=tmp_path / "out", **given)
    expected = merge(method, models=wholes, output=tmp_path / "expected", **given)
    plain = merge("linear", models=adapters, output=tmp_path / "plain", precision="float64")
    found, expected, plain = (load_file(path / "model.safetensors") for path in (output, expected, plain))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((found[name] - plain[name]).abs().max()) > 1e-2


def test_names_that_are_not_those_of_the_files_are_refused(folders):
    source = open_source(folders["a"])
    _check_names(source, ["model.norm.weight"], source.tensors)
    with pytest.raises(ValueError, match=r"1 tensors of .* such as 'norm\.weight', so that what"):
        _check_names(source, ["norm.weight", "model.norm.weight"], source.tensors)


# Bad input.


def damaged(folders, tmp_path, name="bad"):
    shutil.copytree(folders["b"], tmp_path / name)
    return tmp_path / name


def change(folder: Path, act) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    act(state)
    save_file(state, path, metadata={"format": "pt"})


def test_loud_failures(folders, tmp_path):
    def tried(**options):
        given = {"models": [folders["a"], tmp_path / "bad"], "output": tmp_path / "out", **options}
        try:
            merge(given.pop("method", "linear"), **given)
        except ValueError as error:
            message = str(error)
        else:
            message = "no error"
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        assert "\n" not in message
        return message

    change(damaged(folders, tmp_path), lambda s: s.pop("model.norm.weight"))
    assert "'model.norm.weight' is in" in tried()
    change(damaged(folders, tmp_path), lambda s: s.update({"lm_head.weight": torch.zeros(41, 16)}))
    assert "'lm_head.weight' has the shape (40, 16) in" in tried()
    change(damaged(folders, tmp_path), lambda s: s["model.norm.weight"].fill_(float("nan")))
    message = tried()
    assert "'model.norm.weight' of" in message
    assert "not finite" in message
    path = damaged(folders, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "cut short" in tried()
    path = damaged(folders, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "header is incomplete" in tried()
    bad = damaged(folders, tmp_path)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "tie_word_embeddings is False in" in tried()
    bad = damaged(folders, tmp_path)
    for place, vocabulary in ((folders["a"], {"x": 0, "y": 1}), (bad, {"x": 0, "z": 1})):
        (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    message = tried()
    (folders["a"] / "tokenizer.json").unlink()
    assert "the token 'y' is 1 in one and missing in the other" in message
    shutil.copytree(folders["a"], tmp_path / "bad")
    assert "the merged model equals models[0]" in tried()
    damaged(folders, tmp_path)
    assert "equals the base" in tried(method="task_arithmetic", base=folders["base"], scale=0.0)
    damaged(folders, tmp_path)
    assert "dtype='float32'" in tried(method="linear", weights=[1e5, 1.0], normalize=False, dtype="float16")
    damaged(folders, tmp_path)
    assert "there is no folder" in tried(models=[folders["a"], str(tmp_path / "nowhere")])
    damaged(folders, tmp_path)
    assert "give base=" in tried(method="ties")
    damaged(folders, tmp_path)
    assert "did you mean 'ties'" in tried(method="tiess")


def test_methods_that_need_no_base_may_be_given_one(folders, tmp_path):
    models, options = [folders["a"], folders["b"]], {"t": 0.3, "dtype": "float32"}
    merge(method="slerp", models=models, output=tmp_path / "without", **options)
    merge(method="slerp", base=folders["a"], models=models, output=tmp_path / "with", **options)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_of_other_methods_and_foreign_folders_are_refused(folders, tmp_path):
    models = [folders["a"], folders["b"]]
    with pytest.raises(TypeError, match="the method slerp takes no 'density'"):
        merge("slerp", models=models, output=tmp_path / "out", density=0.5)
    with pytest.raises(ValueError, match=r"rows is 'x\.jsonl', and ties measures nothing: remove rows"):
        merge("ties", base=folders["base"], models=models, output=tmp_path / "out", rows="x.jsonl")
    with pytest.raises(ValueError, match="'nowhere'"):
        merge("linear", base="nowhere", models=models, output=tmp_path / "out")
    with pytest.raises(ValueError, match="'nowhere'"):
        greedy_soup(models, tmp_path / "out", evaluate=lambda folder: 1 / 0, base="nowhere")
    with pytest.raises(ValueError, match="no regular expression"):
        merge("slerp", models=models, output=tmp_path / "out", layers={"(": {"t": 0.5}})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not written by this package"):
        merge("linear", models=models, output=mine)
    with pytest.raises(ValueError, match="is one of the models"):
        merge("linear", models=models, output=folders["a"])
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_an_earlier_merge_is_replaced(folders, tmp_path):
    models = [folders["a"], folders["b"]]
    merge("linear", models=models, output=tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    merge("linear", models=models, output=tmp_path / "out", weights=[1.0, 2.0])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_methods_are_built_by_name():
    assert build_method("ties", {"weights": [1, 2], "density": 0.5}).weights == (1.0, 2.0)


def test_headers_are_read_like_safetensors_does(folders):
    path = folders["a"] / "model.safetensors"
    for name, tensor in load_file(path).items():
        stored = read_header(path)[name]
        assert stored.shape == tuple(tensor.shape)
        assert torch.equal(stored.rows(0, 10**6).view(tensor.shape), tensor)
    assert open_source(folders["a"]).config["model_type"] == "llama"


def test_a_disk_that_fails_while_it_is_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_FLUSHED_PART", 16)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:  # a system tells once
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(tensor_files.os, "fsync", fsync)
    with (tmp_path / "file").open("wb") as file:
        writer = tensor_files.HashingWriter(file)
        writer.write(b"x" * 20)
        writer.write(b"y" * 20)
        with pytest.raises(OSError, match="Input/output error"):
            writer.finish()
    calls[:] = [0]
    with (tmp_path / "file").open("wb") as file:
        writer = tensor_files.HashingWriter(file)
        writer.write(b"x" * 40)
        assert writer.finish() == hashlib.sha256(b"x" * 40).hexdigest()
    assert len(calls) > 2  # early, and in the end


_SCRIPT = """
import sys
from rlhf_lightning.merging import merge
from rlhf_lightning.merging.methods import base
base.BLOCK_ELEMENTS = 64
print("begun", flush=True)
merge("ties", base=sys.argv[1], models=sys.argv[2:4], output=sys.argv[4], max_shard_size="2KB", density=0.3)
"""


def run_merge(folders, output: Path) -> subprocess.Popen:
    arguments = [folders["base"], folders["a"], folders["b"], output]
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_merge_resumes_to_the_same_bytes(folders, tmp_path):
    whole = tmp_path / "whole"
    process = run_merge(folders, whole)
    process.stdout.readline()
    started = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in whole.iterdir() if path.suffix == ".safetensors"}
    chance = random.Random(0)
    for attempt in range(10):
        output = tmp_path / f"killed{attempt}"
        while True:
            process = run_merge(folders, output)
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.7 * seconds))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
            # Nothing that loads as finished, unless it is.
            if output.exists():
                assert verify(output) == []
                break
            if chance.random() < 0.5:
                assert run_merge(folders, output).wait() == 0
                break
        found = {path.name: path.read_bytes() for path in output.iterdir() if path.suffix == ".safetensors"}
        assert found == expected
        assert verify(output) == []


def test_a_merge_that_is_killed_while_it_replaces_another_loses_neither(folders, tmp_path):
    """Nor is half of the replaced model put back, where the new one is deleted afterwards."""
    halves = {"base": folders["base"], "models": [folders["a"], folders["b"]]}
    for moment in range(100):
        output = tmp_path / str(moment)
        merge("task_arithmetic", **halves, output=output, scale=0.5)
        names = {path.name for path in output.iterdir()}
        try:
            with killed_after(moment, JOURNAL):
                merge("task_arithmetic", **halves, output=output)
            killed = False
        except Killed:
            killed = True
        places = [output, output.with_name(f".{output.name}{REPLACED}")]
        assert any(place.exists() for place in places)
        shutil.rmtree(output, ignore_errors=True)

        # The next merge cleans up, and fails.
        with pytest.raises(ValueError, match="the merged model equals the base"):
            merge("task_arithmetic", **halves, output=output, scale=0.0)
        if output.exists():
            assert verify(output) == []
            assert {path.name for path in output.iterdir()} == names
        if not killed:
            break
    assert not killed
    assert moment > 5
