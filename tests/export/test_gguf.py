"""GGUF files, against the tensors and the logits of the models that they were made from."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.export import export_gguf, gguf_tensors
from rlhf_lightning.export import gguf as exporting
from rlhf_lightning.export.gguf_tokenizer import tokenizer_fields
from rlhf_lightning.models import load_causal_lm, load_tokenizer

from ..helpers import CHAT_TEMPLATE, char_tokenizer, save_tiny_model, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
PROMPTS = ["hello 2+2=", "what is it?"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272, "tie_word_embeddings": False}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},  # not hidden_size / heads
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},  # of 128 positions
}


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the extra gguf is not installed")


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level merges, as GPT-2's, with a token that begins every text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "i"), ("Ġi", "s")]
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for arch in FAMILIES:
        found[arch] = tmp_path_factory.mktemp("models") / arch
        tiny_model(arch, bos_token_id=2, **{**SIZES, **EXTRA.get(arch, {})}).save_pretrained(found[arch])
        byte_tokenizer(bos=arch != "qwen2").save_pretrained(found[arch])
    return found


def tensors_of(gguf: Any, path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(str(path))
    return {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_is_the_model(arch: str, gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    found = export_gguf(folders[arch], tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    assert found.logit_error <= 1e-5
    assert (found.rounding, found.greedy_agreement) == (0.0, 1.0)
    assert found.types == {"f32": sum(found.types.values())}
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

    # Every value is in the file, once: sums of squares need no names.
    state = load_causal_lm(folders[arch], dtype=torch.float32, trainable=False).state_dict()
    if arch == "gemma2":
        state = {name: w + 1 if "norm" in name else w for name, w in state.items() if name != "lm_head.weight"}
    squares = sorted(float(w.double().square().sum()) for w in state.values())
    written = sorted(
        float((w.astype(np.float64) ** 2).sum()) for w in tensors_of(gguf, tmp_path / "model.gguf").values()
    )
    assert written == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
def test_transformers_alone_loads_it(arch: str, gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Without a config of ours, where its reader knows all options of the family."""
    export_gguf(folders[arch], tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    source = AutoModelForCausalLM.from_pretrained(folders[arch]).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, source(ids).logits, atol=1e-4, rtol=0)


def test_rows_of_queries_and_keys_are_interleaved(gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(folders["llama"], tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    written = tensors_of(gguf, tmp_path / "model.gguf")
    state = load_causal_lm(folders["llama"], dtype=torch.float32, trainable=False).state_dict()
    for name, place, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        source = state[f"model.layers.1.self_attn.{name}.weight"].numpy()
        for head in range(heads):
            for pair in range(8):
                for half in range(2):
                    row = written[f"blk.1.{place}.weight"][head * 16 + 2 * pair + half]
                    assert (row == source[head * 16 + 8 * half + pair]).all()
    value = state["model.layers.1.self_attn.v_proj.weight"].numpy()
    assert (written["blk.1.attn_v.weight"] == value).all()


@pytest.mark.parametrize(
    ("type", "bound"),
    [
        ("f16", 2**-11),
        ("bf16", 2**-8),
        ("q8_0", 0.57 / 127),
        ("q5_1", 1.05 / 31),
        ("q5_0", 1.02 / 16),
        ("q4_1", 1.03 / 15),
        ("q4_0", 1.01 / 8),
    ],
)
def test_types_round_within_their_bounds(
    type: str, bound: float, gguf: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Relative to each value, or for blocks to the largest of 32: half a step, and the scale's own rounding in f16."""
    found = export_gguf(folders["qwen3"], tmp_path / "model.gguf", type=type, check_prompts=PROMPTS)
    assert found.logit_error <= 1e-4
    assert found.rounding > found.logit_error
    written = tensors_of(gguf, tmp_path / "model.gguf")
    state = load_causal_lm(folders["qwen3"], dtype=torch.float32, trainable=False).state_dict()
    for name, place in (("self_attn.o_proj", "attn_output"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):
        source = state[f"model.layers.0.{name}.weight"].numpy()
        error = np.abs(written[f"blk.0.{place}.weight"] - source)
        scale = np.abs(source)
        if type.startswith("q"):
            scale = np.abs(source.reshape(len(source), -1, 32)).max(-1).repeat(32, -1)
        assert (error <= bound * scale + 1e-7).all()
        assert error.max() > 0
    assert (written["output_norm.weight"] == state["model.norm.weight"].numpy()).all()


def test_a_small_model_of_characters(gguf: Any, tmp_path: Path) -> None:
    """Rows that no block divides are kept in f16; tokens of one character are spelled as bytes."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    with pytest.warns(UserWarning, match=r"no merges: transformers reads such a file, llama\.cpp does not"):
        found = export_gguf(folder, tmp_path / "model.gguf", type="q8_0", check_prompts=["2+2=\n", "a b"])
    assert found.types["f16"] == 2  # down_proj
    assert found.types["q8_0"] > 2


def test_the_packaged_model(gguf: Any, tmp_path: Path) -> None:
    model = load_causal_lm("configs/models/nano", init="random", dtype=torch.float32, trainable=False)
    model.save_pretrained(tmp_path / "nano")
    load_tokenizer("configs/models/nano").save_pretrained(tmp_path / "nano")
    found = export_gguf(tmp_path / "nano", tmp_path / "nano.gguf", check_prompts=["3+14=?\n"])
    assert found.types["q8_0"] == 1 + 7 * 3


@pytest.mark.slow
def test_a_trained_model(gguf: Any, tmp_path: Path) -> None:
    """The packaged model, trained until its answers depend on the prompt: rounding has margins to change there."""
    model = load_causal_lm("configs/models/nano", init="random", dtype=torch.float32)
    tokenizer = load_tokenizer("configs/models/nano")
    rows = [f"{row['prompt']}\n{row['completion']}" for row in open_task("sums:demonstrations?rows=640&seed=0")]
    ids = [torch.tensor(tokenizer(row)["input_ids"]) for row in rows]
    batches = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100).split(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long(), labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "nano")
    tokenizer.save_pretrained(tmp_path / "nano")

    prompts = ["3+18+3+15=?\n", "1+14+11+12=?\n", "20+7=?\n"]
    found = export_gguf(tmp_path / "nano", tmp_path / "f32.gguf", type="f32", check_prompts=prompts)
    assert found.logit_error <= 1e-4
    assert (found.rounding, found.greedy_agreement) == (0.0, 1.0)
    found = export_gguf(tmp_path / "nano", tmp_path / "q8_0.gguf", type="q8_0", check_prompts=prompts)
    assert found.logit_error <= 1e-4  # of the model with weights rounded alike, whose greedy tokens are equal
    assert 1e-4 < found.rounding < 0.1
    assert found.greedy_agreement > 0.9


def test_an_adapter_is_merged(gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    written = tensors_of(gguf, tmp_path / "model.gguf")
    merged = adapted.merge_and_unload().state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    np.testing.assert_allclose(written["blk.0.ffn_up.weight"], merged, atol=1e-6)


def test_scaled_frequencies_are_written(gguf: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = tiny_model("llama", rope_parameters=rope, bos_token_id=2, **SIZES)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    found = export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    assert found.logit_error <= 1e-5
    factors = tensors_of(gguf, tmp_path / "model.gguf")["rope_freqs.weight"]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)


def test_a_file_has_tokenizer_and_template(gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(folders["llama"], tmp_path / "model.gguf", type="bf16", check_prompts=PROMPTS)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(str(tmp_path / "model.gguf")).fields.items()}
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.bos_token_id"] == 2
    assert bool(fields["tokenizer.ggml.add_bos_token"])
    assert fields["tokenizer.ggml.tokens"][260:] == [
        "he",
        "ll",
        "hell",
        "hello",
        "Ġi",
        "Ġis",
        *[f"[PAD{n}]" for n in range(266, 272)],
    ]
    assert fields["tokenizer.ggml.merges"][3] == "hell o"
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.context_length"] == 128


def piece_tokenizer(*, prefix: bool) -> PreTrainedTokenizerFast:
    """Merges with bytes for unknown characters, as SentencePiece's; with a space before texts, or without."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "i"), ("▁i", "s")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789+-=?"]
    tokens = [*special, *(f"<0x{n:02X}>" for n in range(256)), *letters, *("".join(pair) for pair in merges)]
    vocab = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace_spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace_spaces]) if prefix else replace_spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@pytest.mark.parametrize(("arch", "prefix"), [("llama", True), ("mistral", True), ("phi3", True), ("gemma2", False)])
def test_tokenizers_of_pieces(arch: str, prefix: bool, gguf: Any, tmp_path: Path) -> None:
    sizes = {**SIZES, **EXTRA.get(arch, {}), "vocab_size": 320}
    tiny_model(arch, bos_token_id=2, **sizes).save_pretrained(tmp_path / "model")
    piece_tokenizer(prefix=prefix).save_pretrained(tmp_path / "model")
    prompts = ["hello is 2+2=", "hell Ünï is?"]
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32", check_prompts=prompts)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(str(tmp_path / "model.gguf")).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert bool(fields["tokenizer.ggml.add_space_prefix"]) == prefix
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    kinds = dict(zip(tokens, types, strict=True))
    assert [kinds[token] for token in ("<pad>", "<unk>", "<0x41>", "he", "[PAD319]")] == [3, 2, 6, 1, 5]

    # Merging the neighbours of the highest score first, as such readers do, gives the tokenizer's tokens.
    best = dict(zip(tokens, scores, strict=True))
    parts = list("hello▁is")
    while pairs := [n for n in range(len(parts) - 1) if kinds.get(parts[n] + parts[n + 1]) == 1]:
        n = max(pairs, key=lambda n: best[parts[n] + parts[n + 1]])
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    assert parts == ["hello", "▁is"]


# Exports that are not the model.


def wrong_rope(write: Any) -> Any:
    def changed(writer: Any, config: Any, architecture: str) -> None:
        other = copy.deepcopy(config)
        other.rope_parameters = {**other.rope_parameters, "rope_theta": 20000.0}
        write(writer, other, architecture)

    return changed


def without(name: str) -> Any:
    def wrapped(write: Any) -> Any:
        def changed(writer: Any, config: Any, architecture: str) -> None:
            other = copy.deepcopy(config)
            setattr(other, name, None)
            write(writer, other, architecture)

        return changed

    return wrapped


def with_fields(**given: Any) -> Any:
    def wrapped(make: Any) -> Any:
        def changed(*args: Any) -> Any:
            fields = make(*args)
            return replace(fields, **{name: value(fields) for name, value in given.items()})

        return changed

    return wrapped


def unordered(ordered: Any) -> Any:
    return lambda tensor, place, config, architecture: tensor


def swapped(named: Any) -> Any:
    def changed(*args: Any) -> Any:
        found = named(*args)
        a, b = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
        found[a], found[b] = found[b], found[a]
        return found

    return changed


SABOTAGE = [
    ("llama", gguf_tensors, "ordered", unordered, "logits on the prompt"),  # heads that are not permuted
    ("gemma2", gguf_tensors, "ordered", unordered, "logits on the prompt"),  # norms that lack 1
    ("qwen3", exporting, "write_config", wrong_rope, "logits on the prompt"),
    ("gemma2", exporting, "write_config", without("attn_logit_softcapping"), "logits on the prompt"),
    ("gemma2", exporting, "write_config", without("final_logit_softcapping"), "logits on the prompt"),
    ("gemma2", exporting, "write_config", without("sliding_window"), ""),
    (
        "llama",
        exporting,
        "tokenizer_fields",
        with_fields(special=lambda f: {**f.special, "bos": 1}),
        "the bos token is 2",
    ),
    ("llama", exporting, "tokenizer_fields", with_fields(add_bos=lambda f: False), "the prompt 'hello 2+2=' is [2,"),
    ("llama", exporting, "tokenizer_fields", with_fields(merges=lambda f: f.merges[2:]), "the prompt 'hello 2+2=' is"),
    (
        "llama",
        exporting,
        "tokenizer_fields",
        with_fields(chat_template=lambda f: "{{ 1 }}"),
        "the chat template differs",
    ),
]


@pytest.mark.parametrize("type", ["f32", "q8_0"])
@pytest.mark.parametrize(("arch", "place", "name", "change", "message"), SABOTAGE)
def test_a_wrong_export_is_caught(
    arch: str,
    place: Any,
    name: str,
    change: Any,
    message: str,
    type: str,
    gguf: Any,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "model.gguf"
    output.write_bytes(before := b"GGUF rlhf_lightning.export of before")
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    with pytest.raises(ValueError, match=f"the export is not the model, and was removed: .*{re.escape(message)}"):
        export_gguf(folders[arch], output, type=type, check_prompts=PROMPTS)
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_wrong_tensor_is_caught(
    gguf: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "quantised", lambda tensor, kind: gguf_tensors.quantised(tensor * 1.001, kind))
    with pytest.raises(ValueError, match="logits on the prompt 'hello 2"):
        export_gguf(folders["qwen2"], tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == []


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"type": "q3_k"},
            "type is 'q3_k'; it must be one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1",
        ),
        ({"check_prompts": []}, "check_prompts is []; it must be a list of at least one text"),
        ({"check_prompts": "2+2="}, "check_prompts is '2+2='; it must be a list"),
        ({"check_prompts": ["a" * 200]}, "the model has 128 positions: shorten it"),
    ],
)
def test_bad_options(options: Any, message: str, gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        export_gguf(folders["llama"], tmp_path / "model.gguf", **{"check_prompts": PROMPTS, **options})
    assert list(tmp_path.iterdir()) == []


def test_models_and_tokenizers_without_a_place_are_refused(gguf: Any, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match="model_type is 'gpt2'; GGUF files are written of llama, mistral"):
        export_gguf(tmp_path / "gpt2", tmp_path / "model.gguf")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    save_tiny_model(tmp_path / "yarn", "qwen3", rope_parameters=rope)
    with pytest.raises(ValueError, match="rope_type is 'yarn'; GGUF files are written of models with default, llama3"):
        export_gguf(tmp_path / "yarn", tmp_path / "model.gguf")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"word": 0, "x": 1}, unk_token="x")))
    with pytest.raises(ValueError, match="has no merges, and the token 'word', which is not one ASCII character"):
        tokenizer_fields(words, 2)
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)])))
    with pytest.raises(ValueError, match="the tokenizer is a Unigram of a kind that the format does not have"):
        tokenizer_fields(pieces, 2)
    with pytest.raises(ValueError, match="tokens up to 63, and the model's embedding 60"):
        tokenizer_fields(char_tokenizer(), 60)
    other = tmp_path / "notes.gguf"
    other.write_text("mine")
    save_tiny_model(tmp_path / "llama")
    with pytest.raises(ValueError, match="exists and was not written by this package: move it away"):
        export_gguf(tmp_path / "llama", other)
    assert other.read_text() == "mine"


def test_the_package_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gguf_tensors, "import_module", missing)
    with pytest.raises(ValueError, match=r"GGUF files need the package gguf: pip install 'rlhf-lightning\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
