"""K-quants: mixes of types by hand, llama.cpp's quantiser against the format's own reader, and proved files."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.export import export_gguf, gguf_mixes, gguf_tensors
from rlhf_lightning.export import gguf as exporting
from rlhf_lightning.export.gguf_mixes import mixed_type, quantise
from rlhf_lightning.models import load_causal_lm

from ..helpers import tiny_model
from .test_gguf import PROMPTS, SIZES, byte_tokenizer, tensors_of

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module")
def quantiser() -> Any:
    try:
        return gguf_mixes.quantiser()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that 256 divides, and in the MLP's second matrix rows that it does not."""
    place = tmp_path_factory.mktemp("models") / "llama"
    sizes = {**SIZES, "hidden_size": 256, "num_hidden_layers": 8}
    tiny_model("llama", bos_token_id=2, **sizes).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def chosen(part: str, type: str, kind: str, layers: int = 16) -> set[int]:
    names = [f"blk.{n}.{part}.weight" for n in range(layers)]
    return {n for n, name in enumerate(names) if mixed_type(name, type, layers=layers, tied=False) == kind}


def test_mixes() -> None:
    """Of 16 layers: an eighth at each end, and every third between."""
    many = {0, 1, 4, 7, 10, 13, 14, 15}
    for part in ("attn_v", "ffn_down"):
        assert chosen(part, "q4_k_m", "q6_k") == chosen(part, "q5_k_m", "q6_k") == many
        assert chosen(part, "q4_k_m", "q4_k") == set(range(16)) - many
    assert chosen("attn_v", "q4_k_s", "q5_k") == {0, 1, 2, 3}
    assert chosen("ffn_down", "q4_k_s", "q5_k") == {0, 1}
    assert chosen("attn_v", "q5_k_s", "q5_k") == chosen("attn_v", "q6_k", "q6_k") == set(range(16))
    assert chosen("ffn_gate", "q4_k_m", "q4_k") == set(range(16))
    assert chosen("attn_qkv", "q4_k_m", "q5_k") == chosen("attn_qkv", "q5_k_m", "q6_k") == set(range(16))
    for tied, expected in ((False, ["q4_k", "q6_k"]), (True, ["q6_k", "q4_k"])):
        names = ("token_embd.weight", "output.weight")
        assert [mixed_type(name, "q4_k_m", layers=2, tied=tied) for name in names] == expected


@pytest.mark.parametrize(("kind", "narrow"), [("q4_k_s", "q5_0"), ("q5_k_s", "q5_1"), ("q6_k", "q8_0")])
def test_short_rows_have_other_types(kind: str, narrow: str) -> None:
    find = gguf_tensors.tensor_type
    assert find("blk.9.attn_q.weight", (8, 384), kind, layers=16) == narrow
    assert find("blk.9.attn_q.weight", (8, 48), kind, layers=16) == "f16"
    assert find("blk.9.attn_norm.weight", (256,), kind, layers=16) == "f32"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "Q5_1"])
def test_the_library_gives_the_bytes_of_the_package(name: str, quantiser: Any) -> None:
    """Of the types that both write: the call's arguments are right, and its rounding is the format's."""
    rows = np.random.default_rng(0).standard_normal((5, 512), dtype=np.float32)
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.quantize(rows, kind)
    np.testing.assert_array_equal(quantise(rows, int(kind), expected.shape[-1]), expected)


@pytest.mark.parametrize(("kind", "bits"), [("q4_k", 4), ("q5_k", 5), ("q6_k", 6)])
def test_rounding(kind: str, bits: int, quantiser: Any) -> None:
    """No value is farther off than three quarters of a step of its block; the mean error is a part of that."""
    rows = torch.randn(6, 768, generator=torch.Generator().manual_seed(0))
    error = (gguf_tensors.rounded(rows, kind) - rows).abs().reshape(-1, 256)
    blocks = rows.reshape(-1, 256)
    step = (blocks.amax(-1) - blocks.amin(-1)) / (2**bits - 1)
    assert bool((error.amax(-1) <= 0.75 * step).all())
    assert 0.02 < float(error.mean() / step.mean()) < 0.3
    for matrix in (rows[:, :256], rows[:1]):
        whole = gguf_tensors.rounded(rows, kind)[: len(matrix), : matrix.shape[1]]
        assert torch.equal(gguf_tensors.rounded(matrix, kind), whole)  # blocks know nothing of each other


def test_files_are_the_rounded_model(quantiser: Any, folder: Path, tmp_path: Path) -> None:
    found = export_gguf(folder, tmp_path / "model.gguf", type="q4_k_m", check_prompts=PROMPTS)
    # Rows of 96 in ffn_down: of 8 layers, 0, 3, 6 and 7 would have q6_k.
    assert found.types == {"q4_k": 1 + 8 * 5 + 4, "q6_k": 1 + 4, "q5_0": 4, "q8_0": 4, "f32": 17}
    assert found.logit_error <= 1e-4
    assert found.rounding > 1e-4
    written = tensors_of(gguf, tmp_path / "model.gguf")
    state = load_causal_lm(folder, dtype=torch.float32, trainable=False).state_dict()
    source = state["model.layers.2.mlp.up_proj.weight"].numpy()
    error = np.abs(written["blk.2.ffn_up.weight"] - source)
    assert 0 < error.max() <= (source.max() - source.min()) / 15


@pytest.mark.parametrize("type", ["q4_k_m", "q6_k"])
def test_a_wrong_file_is_caught(
    type: str, quantiser: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporting.quantised
    monkeypatch.setattr(exporting, "quantised", lambda tensor, kind: original(tensor.flip(-1), kind))
    with pytest.raises(ValueError, match="the export is not the model, and was removed"):
        export_gguf(folder, tmp_path / "model.gguf", type=type, check_prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_the_quantiser_is_optional(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_mixes.quantiser.cache_clear()
    monkeypatch.setattr(gguf_mixes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"K-quants need llama.cpp's quantiser: pip install 'rlhf-"):
        export_gguf(folder, tmp_path / "model.gguf", type="q4_k_m", check_prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("type", ["q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"])
def test_llama_cpp_quantises_a_file_to_the_same_tensors(type: str, folder: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    for name in ("f32", type):
        export_gguf(folder, tmp_path / f"{name}.gguf", type=name, check_prompts=PROMPTS)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf_tensors.FILE_TYPES[type], 1
    paths = [str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0
    ours, theirs = (
        {t.name: (t.tensor_type, np.array(t.data)) for t in gguf.GGUFReader(str(tmp_path / f"{name}.gguf")).tensors}
        for name in (type, "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, (kind, data) in ours.items():
        assert kind == theirs[name][0], name
        np.testing.assert_array_equal(data, theirs[name][1], err_msg=name)
