from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_lightning.models import load_causal_lm, load_tokenizer
from rlhf_lightning.models.reference import AdapterReference

from ..helpers import (
    ARCHITECTURES,
    EOS,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    char_tokenizer,
    save_tiny_model,
    tiny_config,
)

Folder = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8}


def token_ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(token_ids(seed=seed)).logits.float()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss that every logit enters, by parameter name."""
    model.zero_grad()
    model(token_ids()).logits.float().logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shake_adapters(model: nn.Module, seed: int = 0) -> None:
    """Gives adapters weights that change the output (peft starts them at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ".default" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def adapter_folder(tiny_model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that peft alone made and wrote, on the tiny llama."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake_adapters(model)
    model.save_pretrained(folder)
    return folder


# Tokenizers.


def test_tokenizer_round_trip(tiny_model_folder: Folder) -> None:
    tokenizer = load_tokenizer(str(tiny_model_folder("llama")))
    assert tokenizer("3+4=7").input_ids == char_tokenizer()("3+4=7").input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)
    assert tokenizer.decode(tokenizer("3+4=7").input_ids) == "3+4=7"


def test_end_of_sequence_pads_where_there_is_no_padding_token(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == EOS


def test_tokenizer_of_an_adapter_is_its_base_models(adapter_folder: Path) -> None:
    assert not (adapter_folder / "tokenizer.json").exists()
    assert load_tokenizer(adapter_folder)("3+4").input_ids == char_tokenizer()("3+4").input_ids


def test_missing_tokenizer_says_what_to_pass(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^no tokenizer in .*pass as tokenizer a folder.*, or a hub id$"):
        load_tokenizer(tmp_path)
    # The folder of a run instead of the export in it.
    char_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"^no tokenizer in .*; did you mean '{re.escape(str(tmp_path / 'model'))}'\?$"
    ):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


# Whole models.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pretrained_weights_are_the_stored_ones(arch: str, tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder(arch)
    model = load_causal_lm(str(folder), dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model.eval()), logits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_dtype_is_explicit_and_the_model_trains(dtype: torch.dtype, init: str, tiny_model_folder: Folder) -> None:
    model = load_causal_lm(str(tiny_model_folder("qwen3")), dtype=dtype, init=init)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_random_weights_follow_the_global_seed_and_the_config(tiny_model_folder: Folder) -> None:
    folder = str(tiny_model_folder("llama"))
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(load_causal_lm(folder, init="random", dtype=torch.float32))
    weights = [model.get_input_embeddings().weight.detach() for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    # 64 x 32 draws of N(0, 0.2): the standard error of their deviation is 0.2 / sqrt(2 * 2048) = 0.003.
    assert float(weights[0].std()) == pytest.approx(0.2, abs=0.015)


def test_random_needs_only_a_config(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, init="random", dtype=torch.float32)
    assert isinstance(model.config, GPT2Config)
    with pytest.raises(ValueError, match=r"cannot load a causal language model.*no file named model.safetensors"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_frozen_model_for_a_reference(tiny_model_folder: Folder) -> None:
    model = load_causal_lm(str(tiny_model_folder("llama")), dtype=torch.float32, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_attention_by_name_and_ours_is_registered(tiny_model_folder: Folder) -> None:
    folder = str(tiny_model_folder("llama"))
    eager = load_causal_lm(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_causal_lm(folder, dtype=torch.float32, attn_implementation="rlhf_tree")
    assert ours.config._attn_implementation == "rlhf_tree"
    assert torch.allclose(logits(ours), logits(eager), atol=1e-5)


def test_missing_weight_is_an_error_and_not_a_random_number(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^1 weights of LlamaForCausalLM are missing .*layers\.1\.mlp\.down_proj.*$"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_wrong_shape_is_one_line(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE + 1}))
    with pytest.raises(ValueError, match=r"^cannot load a causal language model from .*$"):
        load_causal_lm(tmp_path, dtype=torch.float32)


# LoRA.


def test_lora_starts_as_the_base_and_trains_adapters_only(tiny_model_folder: Folder) -> None:
    folder = str(tiny_model_folder("llama"))
    model = load_causal_lm(folder, dtype=torch.float32, lora=LORA)
    assert torch.equal(logits(model), logits(load_causal_lm(folder, dtype=torch.float32)))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    # r * (inputs + outputs) of every linear layer but the output projection, in 2 layers:
    # q 32+32, k 32+16, v 32+16, o 32+32, gate 32+48, up 32+48, down 48+32.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert all(module.training for module in model.modules())


def test_lora_computes_w_plus_scaled_b_a(tiny_model_folder: Folder) -> None:
    model = load_causal_lm(str(tiny_model_folder("llama")), dtype=torch.float32, lora={"r": 4, "lora_alpha": 12})
    shake_adapters(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)


def test_adapters_stay_in_fp32_with_half_precision_weights(tiny_model_folder: Folder) -> None:
    model = load_causal_lm(str(tiny_model_folder("llama")), dtype=torch.bfloat16, lora=LORA)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 4, "lora_alfa": 8}, r"^lora has no option 'lora_alfa': did you mean 'lora_alpha'\?$"),
        ({"rank": 4}, r"^lora has no option 'rank': "),
        ({"r": 4, "task_type": "SEQ_CLS"}, r"^lora's task_type is 'SEQ_CLS': remove it"),
        ({"r": 4, "target_modules": ["q_prog"]}, r"^cannot add a LoRA adapter to LlamaForCausalLM: .*q_prog.*$"),
        ({"r": 0}, r"^cannot add a LoRA adapter to LlamaForCausalLM: .*$"),
    ],
)
def test_lora_mistakes_are_one_line(lora: dict, message: str, tiny_model_folder: Folder) -> None:
    with pytest.raises(ValueError, match=message):
        load_causal_lm(str(tiny_model_folder("llama")), dtype=torch.float32, lora=lora)


# Adapters that exist.


def test_loaded_adapter_trains_on_and_keeps_its_start(adapter_folder: Path, tiny_model_folder: Folder) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, adapter_folder))
    model = load_causal_lm(adapter_folder, dtype=torch.float32)
    assert torch.equal(logits(model.eval()), expected)
    model.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name and ".default." in name
    }

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with AdapterReference(model).scoring() as reference:
        assert torch.equal(logits(reference), expected)
    assert distance(logits(model), expected) > 0.01
    with model.disable_adapter():
        assert distance(logits(model), expected) > 0.01, "with adapters off the base answers, which is another model"


def test_loaded_adapter_for_a_reference_has_no_copy(adapter_folder: Path) -> None:
    model = load_causal_lm(adapter_folder, dtype=torch.float32, trainable=False)
    assert list(model.peft_config) == ["default"]
    assert not any(p.requires_grad for p in model.parameters())


def test_adapter_with_lora_is_refused(adapter_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^.*holds an adapter, which is trained further: remove lora and init.*$"):
        load_causal_lm(adapter_folder, dtype=torch.float32, lora=LORA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, r"there is no folder '/no/such/base'.*base_model_name_or_path"),
        ({"base_model_name_or_path": None}, r"names no base model: set base_model_name_or_path"),
        ({"peft_type": "PREFIX_TUNING"}, r"of type 'PREFIX_TUNING': only LORA"),
    ],
)
def test_broken_adapter_config(changes: dict, message: str, adapter_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_causal_lm(tmp_path / "copy", dtype=torch.float32)


def test_adapter_with_missing_weights_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^cannot load the adapter in .*missing adapter keys"):
        load_causal_lm(tmp_path / "copy", dtype=torch.float32)


# Quantisation, for real.


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers fill whole quantisation blocks, with weights of the usual small spread."""
    folder = tmp_path_factory.mktemp("wide")
    return save_tiny_model(folder, "llama", hidden_size=64, intermediate_size=128, initializer_range=0.05)


# The sixteen levels of each code: NF4 from appendix E of arXiv 2305.14314; FP4 has one sign, two exponent bits and one
# bit of mantissa, with magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1.
NF4 = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
FP4 = [sign * level for sign in (1, -1) for level in (0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1)]


def quantised_by_hand(weight: Tensor, quantization: str) -> Tensor:
    """Each weight as its nearest level times the largest magnitude of its block of 64, or of its row in 8 bits."""
    if quantization == "int8":
        weight = weight.half().float()  # where bitsandbytes starts from
        scale = weight.abs().amax(1, keepdim=True)
        return (weight / scale * 127).round() / 127 * scale
    levels = torch.tensor(NF4 if quantization == "nf4" else FP4)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


# The remaining difference: 4-bit scales are themselves kept in 8 bits, under one per cent off.
@pytest.mark.parametrize(("quantization", "bound"), [("nf4", 0.01), ("fp4", 0.01), ("int8", 1e-3)])
def test_quantised_weights_are_the_papers(quantization: str, bound: float, wide_folder: Path) -> None:
    full = load_causal_lm(wide_folder, dtype=torch.float32)
    model = load_causal_lm(wide_folder, dtype=torch.float32, quantization=quantization, lora=LORA)
    for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        layer = model.get_base_model().model.layers[1].get_submodule(name).base_layer
        weight = full.model.layers[1].get_submodule(name).weight
        assert layer.weight.dtype == (torch.int8 if quantization == "int8" else torch.uint8)
        assert layer.weight.numel() == weight.numel() // (1 if quantization == "int8" else 2)
        restored = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
        assert distance(restored, quantised_by_hand(weight.detach(), quantization)) < bound


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_lora_computes_with_the_dequantised_weights(quantization: str, wide_folder: Path) -> None:
    """An independent oracle: the same adapters on plain layers that hold the dequantised weights."""
    model = load_causal_lm(wide_folder, dtype=torch.float32, quantization=quantization, lora=LORA)
    shake_adapters(model)
    plain = load_causal_lm(wide_folder, dtype=torch.float32, lora=LORA)
    shake_adapters(plain)
    twins = dict(plain.named_modules())
    gradients(model)  # 8-bit layers move their numbers into their state on first use
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt) and name.endswith("base_layer"):
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            twins[name].weight.data = weight.float()
    assert distance(logits(model), logits(plain)) < 1e-5
    expected, actual = gradients(plain), gradients(model)
    assert expected.keys() == actual.keys()
    for name, gradient in actual.items():
        assert distance(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_neither_differs_from_training_nor_spoils_it(
    quantization: str, dtype: torch.dtype, wide_folder: Path
) -> None:
    """Bitsandbytes alone fails this on a CPU: evaluation computes otherwise, and cuts 4-bit layers off the graph."""
    model = load_causal_lm(wide_folder, dtype=dtype, quantization=quantization, lora=LORA)
    shake_adapters(model)
    training, before = logits(model), gradients(model)
    assert torch.equal(logits(model.eval()), training)
    after = gradients(model.train())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_row_does_not_depend_on_its_batch(quantization: str, wide_folder: Path) -> None:
    model = load_causal_lm(wide_folder, dtype=torch.float32, quantization=quantization, trainable=False)
    alone = torch.cat([model(row[None]).logits for row in token_ids(rows=3)])
    assert torch.allclose(model(token_ids(rows=3)).logits, alone, atol=1e-5)


def test_quantised_conv1d_layers(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "gpt2", hidden_size=64, initializer_range=0.05)
    full = logits(load_causal_lm(folder, dtype=torch.float32))
    model = load_causal_lm(folder, dtype=torch.float32, quantization="nf4", lora=LORA)
    assert distance(logits(model), full) < 0.15


def test_quantised_base_under_a_loaded_adapter(wide_folder: Path, tmp_path: Path) -> None:
    plain = load_causal_lm(wide_folder, dtype=torch.float32, lora=LORA)
    shake_adapters(plain)
    plain.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype=torch.float32, quantization="int8")
    assert 1e-5 < distance(logits(model), logits(plain)) < 0.02
    assert set(model.peft_config) == {"default", "ref"}


def test_weights_that_are_stored_quantised(wide_folder: Path, tmp_path: Path) -> None:
    load_causal_lm(wide_folder, dtype=torch.float32, quantization="nf4", trainable=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised already: remove quantization='nf4'"):
        load_causal_lm(tmp_path, dtype=torch.float32, quantization="nf4", lora=LORA)
    with pytest.raises(ValueError, match=r"are quantised and stay frozen: pass lora="):
        load_causal_lm(tmp_path, dtype=torch.float32)
    stored = load_causal_lm(tmp_path, dtype=torch.float32, lora=LORA)
    fresh = load_causal_lm(wide_folder, dtype=torch.float32, quantization="nf4", lora=LORA)
    assert torch.equal(logits(stored), logits(fresh))


# Gradient checkpointing.


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("lora", [None, LORA, {"r": 4, "layers_to_transform": [1]}], ids=["full", "lora", "last layer"])
def test_checkpointed_gradients_are_the_same(arch: str, lora: dict | None, tiny_model_folder: Folder) -> None:
    if arch == "gpt2" and lora is not None:
        lora = {**lora, "fan_in_fan_out": True}
        lora.update({"layers_pattern": "h"} if "layers_to_transform" in lora else {})
    elif lora is not None and "layers_to_transform" in lora:
        lora = {**lora, "layers_pattern": "layers"}
    if lora is not None and "layers_pattern" in lora:
        lora = {**lora, "target_modules": ["c_attn"] if arch == "gpt2" else ["q_proj"]}
    results = []
    for checkpointing in (False, True):
        folder = str(tiny_model_folder(arch))
        model = load_causal_lm(folder, dtype=torch.float32, lora=lora, gradient_checkpointing=checkpointing)
        shake_adapters(model)
        results.append(gradients(model))
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in results[0].items():
        assert torch.allclose(gradient, results[1][name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_checkpointed_quantised_gradients_are_the_same(quantization: str, wide_folder: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = load_causal_lm(
            wide_folder,
            dtype=torch.float32,
            quantization=quantization,
            lora=LORA,
            gradient_checkpointing=checkpointing,
        )
        shake_adapters(model)
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-6) for name in results[0])


def test_checkpointing_forgets_layer_insides(tiny_model_folder: Folder) -> None:
    """Fewer bytes are saved for the backward pass."""
    saved = []
    for checkpointing in (False, True):
        model = load_causal_lm(
            str(tiny_model_folder("llama")), dtype=torch.float32, lora=LORA, gradient_checkpointing=checkpointing
        )
        parameters = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict = kept, parameters: set = parameters) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(token_ids()).logits
        saved.append(sum(kept.values()))
        del output
    assert saved[1] < saved[0] / 3


# Places and options.


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=rf"^there is no folder '{missing}' to load the model from$"):
        load_causal_lm(missing, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^there is no folder '.*/runs/sft/export' to load the tokenizer from$"):
        load_tokenizer("runs/sft/export")
    with pytest.raises(ValueError, match=r"holds no config.json: pass a folder"):
        load_causal_lm(tmp_path, dtype=torch.float32)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.safetensors' is a file: pass the folder that holds it$"):
        load_causal_lm(tmp_path / "weights.safetensors", dtype=torch.float32)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^cannot read .*config.json: .*not a valid JSON.*$"):
        load_causal_lm(tmp_path, dtype=torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"^cannot build a causal language model .*ViTConfig.*$"):
        load_causal_lm(tmp_path, dtype=torch.float32, init="random")


def test_hub_id_that_cannot_be_loaded_names_the_folder_that_was_tried() -> None:
    with pytest.raises(ValueError, match=r"^'acme/no-such-model' is not a folder \(looked for '/.*/acme/no-such"):
        load_causal_lm("acme/no-such-model", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"^no tokenizer in 'acme/no-such-model' \(not a folder, '/.*/acme/no-such-model',"
    ):
        load_tokenizer("acme/no-such-model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf4"}, r"^quantization='nf4' without lora leaves nothing to train: pass lora="),
        ({"quantization": "nf4", "init": "random"}, r"^quantization='nf4' with init='random'"),
        ({"lora": LORA, "init": "random"}, r"^lora with init='random'"),
        ({"quantization": "int4", "lora": LORA}, r"^quantization is 'int4': use 'nf4', 'fp4' or 'int8'"),
        ({"init": "rand"}, r"^init is 'rand': use 'pretrained' or 'random'$"),
        ({"dtype": torch.int8}, r"^dtype is torch.int8: use one of torch.float32, "),
        ({"dtype": torch.float64, "quantization": "nf4", "lora": LORA}, r"does not compute in float64"),
        ({"trainable": False, "lora": LORA}, r"^trainable=False with a new adapter"),
        ({"attn_implementation": "no_such"}, r"^cannot load a causal language model .*no_such.*$"),
    ],
)
def test_options_that_contradict_each_other(options: dict, message: str, tiny_model_folder: Folder) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_causal_lm(str(tiny_model_folder("llama")), **{"dtype": torch.float32, **options})
    assert "\n" not in str(raised.value)
