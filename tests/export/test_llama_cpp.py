"""Exported files in llama.cpp: the same tokens, the same logits, the same greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.export import export_gguf

from ..helpers import tiny_model
from .test_gguf import EXTRA, FAMILIES, PROMPTS, SIZES, byte_tokenizer

llama_cpp = pytest.importorskip("llama_cpp_py_sync", reason="the extra llama-cpp is not installed")
pytestmark = pytest.mark.slow
ANSWER = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for arch in FAMILIES:
        found[arch] = tmp_path_factory.mktemp("models") / arch
        tiny_model(arch, bos_token_id=2, **{**SIZES, **EXTRA.get(arch, {})}).save_pretrained(found[arch])
        byte_tokenizer(bos=arch != "qwen2").save_pretrained(found[arch])
    return found


def last_logits(llama: Any, row: list[int]) -> torch.Tensor:
    """Logits after a text, computed from its beginning."""
    llama._clear_context_state()
    llama._eval_tokens(row, 0)
    found = llama._lib.llama_get_logits_ith(llama._ctx, -1)
    return torch.tensor([found[n] for n in range(llama.n_vocab)])


@pytest.mark.parametrize(("type", "tolerance"), [("f32", 1e-4), ("q8_0", 0.1)])
@pytest.mark.parametrize("arch", FAMILIES)
def test_llama_cpp_computes_the_model(
    arch: str, type: str, tolerance: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    export_gguf(folders[arch], tmp_path / "model.gguf", type=type, check_prompts=PROMPTS)
    options = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn_type": 0}
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), **options)
    model = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[arch])
    for prompt in PROMPTS:
        row = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt) == row
        for _ in range(ANSWER):
            with torch.no_grad():
                expected = model(torch.tensor([row])).logits[0, -1]
            found = last_logits(llama, row)
            spread = float((expected - expected.mean()).square().mean().sqrt())
            # With q8_0 it rounds activations to 8 bits as well.
            assert float((found - expected).abs().max()) <= tolerance * spread
            if type == "f32":
                assert int(found.argmax()) == int(expected.argmax())
            row.append(int(expected.argmax()))
    llama.close()
