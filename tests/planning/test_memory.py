"""Formulas of memory are the allocations of small models on a pretended GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import nn

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import OutputHead, fused_logprobs, gpu_logprob_chunks
from rlhf_lightning.models.adapters import add_adapter, lora_config
from rlhf_lightning.models.backbone import hidden_states
from rlhf_lightning.models.decoder_sizes import PRECISIONS, Adapter, Blocks, Decoder, Training
from rlhf_lightning.models.dropout import switch_off_dropout
from rlhf_lightning.models.loading import _enable_checkpointing
from rlhf_lightning.models.memory import (
    activation_bytes,
    cache_bytes,
    cast_bytes,
    head_bytes,
    trained_weights,
    weight_bytes,
)
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.sequences import Example, Segment, SequenceBatch, pack, register_attention

from ..helpers import tiny_config, tiny_model
from .device_memory import counted_cuda

ARCHITECTURES = ("llama", "qwen3", "gemma3_text")
KNOWN = (*ARCHITECTURES, "qwen2", "mistral")
# With an adapter, layers below the first one that is adapted keep less.
TOLERANCE, ADAPTER_TOLERANCE = 0.02, 0.05


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sizes(arch: str, **more: Any) -> dict[str, Any]:
    """Sizes that differ, so that no term of a formula can stand for another."""
    found = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512, **more}
    if arch == "gemma3_text":  # windows keep what full attention keeps
        found |= {"layer_types": ["full_attention"] * 2, "sliding_window": 512, "head_dim": 16}
        found["final_logit_softcapping"] = None
    return found | ({"head_dim": 16} if arch == "qwen3" else {})


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted(arch: str, tied: bool) -> None:
    more = {"attention_bias": True, "mlp_bias": True} if arch == "llama" else {}
    model = tiny_model(arch, **sizes(arch, tie_word_embeddings=tied, **more))
    decoder = Decoder.of(model.config)
    assert decoder.weights == sum(parameter.numel() for parameter in model.parameters())
    for name, precision in PRECISIONS.items():
        size = 2 if name in ("16-true", "bf16-true") else 4
        assert weight_bytes(decoder, Training(precision)) == size * decoder.weights


def test_four_bits_are_those_of_bitsandbytes() -> None:
    decoder = Decoder.of(tiny_config("llama", **sizes("llama")))
    exact = Training(PRECISIONS["bf16-true"])
    quantised = Training(PRECISIONS["bf16-true"], four_bits=True)
    saved = weight_bytes(decoder, exact) - weight_bytes(decoder, quantised)
    matrix = torch.randn(1024, 2048, dtype=torch.bfloat16)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    size = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert saved / decoder.matrices == pytest.approx(2 - size / matrix.numel(), rel=1e-4)


def forest(device: str) -> SequenceBatch:
    """Prompts with two completions of different lengths."""
    draw = np.random.default_rng(0)

    def scored(count: int) -> Segment:
        return Segment(draw.integers(3, 60, size=count), np.ones(count))

    roots = [Segment(draw.integers(3, 60, size=4), children=(scored(n), scored(n + 3))) for n in (30, 28, 24, 20)]
    return pack([Example(str(n), root) for n, root in enumerate(roots)], device=torch.device(device))


def blocks_of(batch: SequenceBatch) -> Blocks:
    """Blocks as the geometry has them; their masks are not counted, since no kernel keeps them here."""
    blocks = batch.geometry.blocks
    return Blocks(sum(block.query_index.numel() for block in blocks), sum(block.key_index.numel() for block in blocks))


def kept(model: nn.Module, precision: str, batch: SequenceBatch, memory: Any) -> int:
    """The bytes that the second forward keeps for its backward."""
    mixed = PRECISIONS[precision].mixed
    for _ in range(2):
        before = memory.now
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed, cache_enabled=False):
            states = hidden_states(model, batch, "packed")
            read = states.read(batch.source_index, batch.source_path, batch.source_depth)
            del states
            read = read.to(torch.bfloat16) if mixed else read
        found = memory.now - before
        read.float().sum().backward()
        del read
        model.zero_grad()
    return int(found)


def compare(arch: str, precision: str, training: Training, lora: dict[str, Any] | None = None) -> None:
    half = precision == "bf16-true"
    model: Any = tiny_model(
        arch, dtype=torch.bfloat16 if half else torch.float32, **sizes(arch, tie_word_embeddings=True)
    )
    decoder = Decoder.of(model.config)
    set_attention(model, register_attention(training.attention))
    if lora is not None:
        model = add_adapter(model, lora_config(lora), "base")
    if training.checkpointing:
        _enable_checkpointing(model)
    holder = nn.ModuleList([model.train()])
    switch_off_dropout(holder)
    assert trained_weights(decoder, training) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with counted_cuda() as memory:
        batch = forest("cuda")
        found = kept(model.to("cuda"), precision, batch, memory)
        blocks = blocks_of(batch)
    scored = len(batch.target_ids)
    expected = activation_bytes(decoder, training, batch.num_tokens, scored=scored, blocks=blocks)
    total = expected.layers + expected.ends + cast_bytes(decoder, training)
    assert found == pytest.approx(total, rel=TOLERANCE if lora is None else ADAPTER_TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["blocks", "cascade"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activations_are_what_a_forward_keeps(arch: str, attention: Any, checkpointing: bool) -> None:
    # Flash attention is for half precision.
    for name in ("32-true", "bf16-mixed", "bf16-true")[attention == "cascade" :]:
        compare(arch, name, Training(PRECISIONS[name], attention, checkpointing, headless=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activations_with_an_adapter(arch: str, checkpointing: bool) -> None:
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name, targets in (("32-true", every), ("bf16-mixed", every), ("bf16-true", every), ("32-true", every[:1])):
        kernel: Any = "blocks" if name == "32-true" else "cascade"
        training = Training(PRECISIONS[name], kernel, checkpointing, Adapter(8, targets), headless=True)
        compare(arch, name, training, {"r": 8, "target_modules": list(targets)})


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_takes_a_chunk_and_its_gradients(
    dtype: torch.dtype, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 40 * 512 * 4)
    config = tiny_config("llama", **sizes("llama"))
    decoder, half = Decoder.of(config), dtype == torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    with counted_cuda() as memory:
        hidden, weight = (torch.randn(n, 96, generator=draw).to(dtype).to("cuda") for n in (200, 512))
        targets = torch.arange(200).to("cuda")
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        before = memory.peak = memory.now
        stats = fused_logprobs(leaves[0], OutputHead(leaves[1]), targets, entropy=entropy)
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        taken = memory.peak - before
    training = Training(PRECISIONS["bf16-true" if half else "32-true"])
    assert taken == pytest.approx(head_bytes(decoder, training, 200, entropy=entropy), rel=0.1)


@pytest.mark.parametrize("kind", ["dynamic", "static", "int8"])
def test_caches_are_those_of_the_engine(kind: Any) -> None:
    model = tiny_model("qwen3", num_hidden_layers=3, head_dim=64)
    engine = LocalEngine(model, None, cache=kind)
    engine.generate([list(range(3, 13))], 4, SamplingParams(max_new_tokens=30, min_new_tokens=30, seed=0))
    # Forty columns for each of four samples; others have one more, and static ones a power of two.
    columns = {"dynamic": 40, "static": 65, "int8": 41}[kind]
    expected = cache_bytes(Decoder.of(model.config), 4 * columns, size=4, kind=kind)
    assert engine.statistics()["cache_bytes"] == expected


def test_caches_of_mixed_precision_are_in_single_precision() -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, None)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        engine.generate([list(range(3, 13))], 4, SamplingParams(max_new_tokens=30, min_new_tokens=30, seed=0))
    # Rotated keys are in the precision of the angles, and the cache holds values in that of the keys.
    assert engine.statistics()["cache_bytes"] == cache_bytes(Decoder.of(model.config), 4 * 40, size=4)


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="memory of model type 'gpt2' is not known: it is for llama, mistral"):
        Decoder.of(tiny_config("gpt2"))
