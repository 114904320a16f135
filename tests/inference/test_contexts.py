"""Prompts after compressed contexts: the engine's log-probs are those of the packed forest that training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import CompressedContext, CompressorOptions, ContextCompressor, context_states
from rlhf_lightning.sequences import Example, Segment, pack

from ..helpers import char_tokenizer, save_tiny_model, tiny_model

CONTEXTS = [list(range(5, 27)), list(range(9, 14)), None, list(range(5, 27))]
PROMPTS = [[30, 31, 32], [33], [34, 35], [36, 37, 38, 39, 40]]


def made(arch: str, **options: Any) -> ContextCompressor:
    chosen: dict[str, Any] = {"ratio": 2, "segment_length": 8, "encoder_rank": 2, **options}
    compressor = ContextCompressor(tiny_model(arch), CompressorOptions(**chosen))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in compressor.weights.outer.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return compressor.eval()


def packed_logprobs(compressor: ContextCompressor, number: int, answer: list[int]) -> np.ndarray:
    """The log-probs of an answer in the packed forest of its context, its prompt and itself."""
    tree = Segment(PROMPTS[number], children=(Segment(answer, [1.0] * len(answer)),))
    context = CONTEXTS[number]
    root = tree if context is None else compressor.options.tree(context, [tree], PROMPTS[number])
    with torch.no_grad():
        return compressor.token_stats(pack([Example("rows:0", root)])).logprobs.numpy()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options", [{}, {"recurrence": "replace"}, {"reads_query": True, "condense_every": 2, "segment_length": 4}]
)
def test_sampled_as_trained(arch: str, cache: Any, options: dict[str, Any]) -> None:
    """Rows of different contexts in one batch; few columns, so that rows leave and others come."""
    compressor = made(arch, **options)
    engine = LocalEngine(compressor.model, None, cache=cache, max_batch_tokens=90, compressor=compressor)
    sampling = SamplingParams(max_new_tokens=9, seed=1, model_logprobs=True, stop_token_ids=tuple(range(20, 40)))
    samples = engine.generate(PROMPTS, 3, sampling, contexts=CONTEXTS)
    assert len({len(sample.token_ids) for group in samples for sample in group}) > 1
    for number, group in enumerate(samples):
        for sample in group:
            assert sample.model_logprobs is not None
            expected = packed_logprobs(compressor, number, sample.token_ids)
            assert np.abs(np.array(sample.model_logprobs) - expected).max() < 2e-3 * np.abs(expected).max()
    # Without a context a prompt is answered as by an engine that knows of none.
    plain = LocalEngine(tiny_model(arch), None).generate(PROMPTS[2:3], 3, sampling, seeds=[[5, 6, 7]])
    seeds = [[1, 2, 3], [1, 2, 3], [5, 6, 7], [1, 2, 3]]
    again = engine.generate(PROMPTS, 3, sampling, seeds=seeds, contexts=CONTEXTS)
    assert [s.token_ids for s in again[2]] == [s.token_ids for s in plain[0]]


def test_the_cache_holds_summaries_alone() -> None:
    compressor = made("llama", recurrence="accumulate")
    sampling = SamplingParams(max_new_tokens=4, min_new_tokens=4, seed=0)
    context = list(range(5, 25)) * 5
    used = []
    for contexts, prompts in (([context], [[30, 31]]), (None, [[*context, 30, 31]])):
        engine = LocalEngine(compressor.model, None, compressor=compressor)
        engine.generate(prompts, 1, sampling, contexts=contexts)
        used.append(engine.statistics()["cache_bytes"])
    layers, heads, size = 2, 2, 8
    # 50 summaries, 2 tokens of the prompt and 4 new ones (and a column that is not read): fp32 keys and values.
    assert used[0] == (100 // 2 + 2 + 4 + 1) * layers * heads * size * 2 * 4
    assert used[1] >= (100 + 2 + 4) * layers * heads * size * 2 * 4


def test_a_whole_context_is_a_prompt() -> None:
    """Entries of all tokens of a context are the context in front of the prompt."""
    model = tiny_model("qwen3")
    context = list(range(5, 25))
    sampling = SamplingParams(max_new_tokens=8, seed=3, model_logprobs=True)
    whole = context_states(model, context)
    [[found]] = LocalEngine(model, None).generate([[30, 31]], 1, sampling, contexts=[whole])
    [[expected]] = LocalEngine(model, None).generate([[*context, 30, 31]], 1, sampling)
    assert found.token_ids == expected.token_ids
    assert found.model_logprobs == pytest.approx(expected.model_logprobs, rel=1e-3)

    # Some entries of it: those of the last tokens are not a truncated context, whose tokens have seen no others.
    kept = whole.select(range(10, 20))
    assert (kept.size, kept.position, kept.num_tokens) == (10, 20, 20)
    assert kept.nbytes == whole.nbytes // 2


def test_eight_bits_and_texts(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    compressor = ContextCompressor.from_pretrained(folder, ratio=4, segment_length=8)
    compressor.save_pretrained(tmp_path / "compressor")
    sampling = SamplingParams(max_new_tokens=5, seed=2)
    answers = []
    tokenizer = char_tokenizer()
    as_tokens = tokenizer("a1b2c3d4e5f6")["input_ids"], tokenizer("?a")["input_ids"]
    for cache in ("dynamic", "int8"):
        engine = LocalEngine.from_pretrained(folder, cache=cache, compressor=tmp_path / "compressor", device="cpu")
        assert isinstance(engine.compressor, ContextCompressor)
        [[text]] = engine.generate(["?a"], 1, sampling, contexts=["a1b2c3d4e5f6"])
        [[ids]] = engine.generate([as_tokens[1]], 1, sampling, contexts=[as_tokens[0]])
        assert text.token_ids == ids.token_ids
        answers.append(text.token_ids)
    assert answers[0][0] == answers[1][0]


def test_bad_contexts(tmp_path: Path) -> None:
    compressor = made("llama")
    engine = LocalEngine(compressor.model, None, compressor=compressor)
    with pytest.raises(ValueError, match="prompts has 2 entries and contexts 1"):
        engine.generate([[3], [4]], contexts=[[5]])
    with pytest.raises(ValueError, match="context 0 has no tokens: leave it out, or give it one"):
        engine.generate([[3]], contexts=[[]])
    with pytest.raises(ValueError, match="context 0 is the string 'abc': without a tokenizer, give token ids"):
        engine.generate([[3]], contexts=["abc"])
    with pytest.raises(ValueError, match="the engine has no compressor: give it compressor="):
        LocalEngine(compressor.model, None).generate([[3]], contexts=[[5]])
    with pytest.raises(ValueError, match="contexts are given with cache='paged': use the caches 'dynamic'"):
        LocalEngine(compressor.model, None, cache="paged", compressor=compressor).generate([[3]], contexts=[[5]])
    with pytest.raises(ValueError, match="a prompt of 128 tokens leaves no room in the model's 128 positions"):
        engine.generate([[3] * 28], contexts=[[5] * 100])
    # As many new tokens as positions are left after the whole context.
    far = CompressedContext(compressor.compress([[5] * 100])[0].states, 100, 100)
    [[sample]] = engine.generate([[3] * 25], 1, SamplingParams(max_new_tokens=9, min_new_tokens=9), contexts=[far])
    assert len(sample.token_ids) == 3
    other = save_tiny_model(tmp_path / "other", seed=1)
    folder = save_tiny_model(tmp_path / "model")
    ContextCompressor.from_pretrained(other).save_pretrained(tmp_path / "compressor")
    with pytest.raises(ValueError, match="is of another model"):
        LocalEngine.from_pretrained(folder, compressor=tmp_path / "compressor", device="cpu")
