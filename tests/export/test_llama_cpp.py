"""Exported files in llama.cpp: the same tokens, the same log-probs, the same greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.export import export_gguf

from ..helpers import tiny_model
from .test_gguf import EXTRA, FAMILIES, PROMPTS, SIZES, byte_tokenizer

llama_cpp = pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")
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


def answers(path: Path, prompt: str) -> list[dict[str, Any]]:
    """The greedy answer to a text: for each token its number, and the log-probs of all tokens by number."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama_cpp.Server(params)
    request = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0.0, "logprobs": SIZES["vocab_size"]}
    result = server.handle_completions({**request, "cache_prompt": False, "ignore_eos": True})
    steps = result["choices"][0]["logprobs"]["content"]
    return [{"id": s["id"], "logprobs": {t["id"]: t["logprob"] for t in s["top_logprobs"]}} for s in steps]


@pytest.mark.parametrize(("type", "tolerance"), [("f32", 1e-4), ("q8_0", 0.1)])
@pytest.mark.parametrize("arch", FAMILIES)
def test_llama_cpp_computes_the_model(
    arch: str, type: str, tolerance: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    """From a text: other tokens would give other log-probs. With q8_0 it rounds activations to 8 bits as well."""
    export_gguf(folders[arch], tmp_path / "model.gguf", type=type, check_prompts=PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[arch])
    for prompt in PROMPTS:
        row = tokenizer(prompt)["input_ids"]
        steps = answers(tmp_path / "model.gguf", prompt)
        assert len(steps) == ANSWER
        for step in steps:
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1]
            expected, spread = logits.log_softmax(-1), float((logits - logits.mean()).square().mean().sqrt())
            assert len(step["logprobs"]) > 200
            for token, logprob in step["logprobs"].items():
                assert logprob == pytest.approx(float(expected[token]), abs=tolerance * spread)
            if type == "f32":
                assert step["id"] == int(expected.argmax())
            row.append(step["id"])
