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
ANSWER = 12
TEXTS = [*PROMPTS, "hello is 2", "ell 1 + 1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for arch in FAMILIES:
        found[arch] = tmp_path_factory.mktemp("models") / arch
        tiny_model(arch, bos_token_id=2, **{**SIZES, **EXTRA.get(arch, {})}).save_pretrained(found[arch])
        byte_tokenizer(bos=arch != "qwen2").save_pretrained(found[arch])
    return found


def server_of(path: Path) -> Any:
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama_cpp.Server(params)


def next_token(server: Any, prompt: str | list[int]) -> tuple[int, dict[int, float]] | None:
    """The greedy token after a text, or after tokens, and the log-probs of all tokens; not of a part of a character."""
    request = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": SIZES["vocab_size"]}
    result = server.handle_completions({**request, "cache_prompt": False})
    if result["choices"][0]["logprobs"] is None:
        return None
    (step,) = result["choices"][0]["logprobs"]["content"]
    return step["id"], {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


@pytest.mark.parametrize("arch", FAMILIES)
def test_llama_cpp_computes_the_model(arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """In f32, but for its functions that are tables in half precision; quantised, it rounds activations as well."""
    export_gguf(folders[arch], tmp_path / "model.gguf", type="f32", check_prompts=PROMPTS)
    server = server_of(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[arch])
    compared = 0
    for prompt in TEXTS:
        row, given = tokenizer(prompt)["input_ids"], prompt
        for _ in range(ANSWER):
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1]
            expected, spread = logits.log_softmax(-1), float((logits - logits.mean()).square().mean().sqrt())
            # First after the text, which it splits: other tokens would give other log-probs.
            answer = next_token(server, given)
            row = given = [*row, int(expected.argmax())]
            if answer is None:
                continue
            token, logprobs = answer
            compared += 1
            assert len(logprobs) == SIZES["vocab_size"]
            found = torch.tensor([logprobs[n] for n in range(len(expected))])
            assert float((found - expected).abs().max()) <= 1e-3 * spread
            assert token == int(expected.argmax())
    assert compared >= len(TEXTS) * ANSWER // 3
