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
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.merging import merge, tensor_files, verify
from rlhf_lightning.merging.data import estimate_fisher, estimate_products
from rlhf_lightning.merging.merge import build_method
from rlhf_lightning.merging.methods import METHODS, merge_tensors
from rlhf_lightning.merging.methods import base as base_module
from rlhf_lightning.merging.sources import open_source
from rlhf_lightning.merging.tensor_files import read_header

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


def test_options_of_other_methods_and_foreign_folders_are_refused(folders, tmp_path):
    models = [folders["a"], folders["b"]]
    with pytest.raises(TypeError, match="the method slerp takes no 'density'"):
        merge("slerp", models=models, output=tmp_path / "out", density=0.5)
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
