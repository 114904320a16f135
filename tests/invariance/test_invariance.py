"""Trained weights do not depend on how rows were batched, padded, packed or ordered: every method, every row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.models import OutputHead, TokenStats
from rlhf_lightning.models.gpu_logprob_chunks import ChunkedLogProbs
from rlhf_lightning.sequences import Example, Segment, SequenceBatch

from ..helpers import save_tiny_model
from .harness import TOLERANCE, Outcome, assert_same, assert_same_metrics, step, validate
from .methods import METHODS as LAID_OUT
from .methods import PACKED

METHODS = LAID_OUT | PACKED
NUM_ROWS = 7
# The fast run makes all comparisons of one entry of every module, and every fourth of each other entry, in turn: every
# comparison is made with some of these. The others are slow; `make invariance` runs both.
COMPLETE = {"sft", "dpo-coupled", "simpo", "kto", "process", "reward", "grpo-coupled", "grpo-tree", "ppo"}
COMPLETE |= {"compression"}
EVERY = 4


def compared(methods: Iterable[str], number: int, *values: Any) -> list[Any]:
    """The parameters of a comparison: what it takes, then the method."""
    position = {name: n for n, name in enumerate(METHODS)}
    return [
        pytest.param(
            *values,
            name,
            marks=() if name in COMPLETE or (position[name] + number) % EVERY == 0 else pytest.mark.slow,
        )
        for name in methods
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # LayerNorm computes in the model's own precision; RMSNorm in fp32 always, which would hide what fp64 shows.
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


@pytest.fixture(scope="module")
def baselines() -> dict[tuple[str, str], Outcome]:
    return {}


@pytest.fixture
def baseline(baselines: dict[tuple[str, str], Outcome], folder: str, method: str) -> Outcome:
    """The whole batch as one packed micro-batch with shared prompts."""
    key = (method, "64-true")
    if key not in baselines:
        baselines[key] = step(METHODS[method], folder, METHODS[method].rows(NUM_ROWS))
    return baselines[key]


VARIATIONS: dict[str, dict[str, Any]] = {
    "budget-1-row": {"micro_batch_tokens": 1},
    "budget-uneven": {"micro_batch_tokens": 41},
    "padded": {"layout": "padded"},
    "padded-budget": {"layout": "padded", "micro_batch_tokens": 60},
    "repeated-prompts": {"share_prefix": False},
    "repeated-prompts-budget": {"share_prefix": False, "micro_batch_tokens": 41},
    "checkpointed": {"gradient_checkpointing": True},
    "cascade": {"attention": "cascade"},
    "cascade-budget": {"attention": "cascade", "micro_batch_tokens": 60},
}


CASES = [
    case
    for number, (variation, options) in enumerate(VARIATIONS.items())
    for case in compared(LAID_OUT if "layout" in options else METHODS, number, variation)
]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with LayerNorm whose layers see four tokens back."""
    place = save_tiny_model(tmp_path_factory.mktemp("model"), "mistral")
    sizes = AutoConfig.from_pretrained(place).to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "bos_token_id",
    )
    kept += ("num_key_value_heads", "max_position_embeddings", "sliding_window", "eos_token_id", "pad_token_id")
    config = AutoConfig.for_model(
        "starcoder2",
        **{name: sizes[name] for name in kept},
        initializer_range=0.3,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return str(place)


@pytest.mark.parametrize(
    "method", [m if m in ("sft", "dpo", "grpo-tree") else pytest.param(m, marks=pytest.mark.slow) for m in LAID_OUT]
)
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_the_cascade_with_windows(method: str, windowed: str) -> None:
    rows = METHODS[method].rows(NUM_ROWS)
    padded = step(METHODS[method], windowed, rows, layout="padded", share_prefix=False)
    for budget in (8192, 60):
        outcome = step(METHODS[method], windowed, rows, attention="cascade", micro_batch_tokens=budget)
        assert_same(outcome, padded, TOLERANCE["64-true"])


def chain(depth: int, number: int) -> Segment:
    """A tree of so many levels, whose segments have siblings and count on every second level."""
    tokens = [3 + (number + depth + n) % 50 for n in range(2 + (number + depth) % 3)]
    below = (Segment([5, 6 + depth, 7], [1.0, 1.0, 0.0]), chain(depth - 1, number)) if depth > 1 else ()
    return Segment(tokens, [float(depth % 2 and n > 0) for n in range(len(tokens))], children=below)


@pytest.mark.parametrize("of", ["folder", "windowed"])
def test_the_cascade_five_levels_deep(of: str, request: pytest.FixtureRequest) -> None:
    model, rows = request.getfixturevalue(of), [Example(f"rows:{n}", chain(5, n)) for n in range(4)]
    alone = step(METHODS["sft"], model, rows, layout="padded", share_prefix=False)
    for options in ({}, {"micro_batch_tokens": 41}):
        outcome = step(METHODS["sft"], model, rows, attention="cascade", **options)
        assert_same(outcome, alone, TOLERANCE["64-true"])


PADDED = [("left", 0), ("right", 5), ("left", 7)]
PADDINGS = [
    case for number, padding in enumerate(PADDED, len(VARIATIONS)) for case in compared(LAID_OUT, number, *padding)
]


@pytest.mark.parametrize(("variation", "method"), CASES)
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_layout_and_budget(method: str, variation: str, folder: str, baseline: Outcome) -> None:
    outcome = step(METHODS[method], folder, METHODS[method].rows(NUM_ROWS), **VARIATIONS[variation])
    assert_same(outcome, baseline, TOLERANCE["64-true"])


@pytest.mark.parametrize(("side", "extra", "method"), PADDINGS)
def test_padding(
    method: str, side: str, extra: int, folder: str, baseline: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceBatch, "padded", partialmethod(SequenceBatch.padded, side=side, extra=extra))
    outcome = step(METHODS[method], folder, METHODS[method].rows(NUM_ROWS), layout="padded")
    assert_same(outcome, baseline, TOLERANCE["64-true"])


def full_logits(
    hidden_ND: Tensor, head: OutputHead, target_ids: Tensor, *, temperature: float = 1.0, **asked: bool
) -> TokenStats:
    """The definition of the fused head, on the whole (tokens x vocabulary) matrix."""
    log_p = (head.logits(hidden_ND) / temperature).log_softmax(dim=-1)
    return TokenStats(
        logprobs=log_p.gather(1, target_ids[:, None])[:, 0],
        correct=log_p.argmax(dim=1) == target_ids,
        entropy=-(log_p.exp() * log_p).sum(dim=1),
        mean_logprobs=log_p.mean(dim=1),
        log_sum_p2=(2 * log_p).logsumexp(dim=1).detach(),
    )


@pytest.mark.parametrize("method", compared(METHODS, 12))
def test_full_logits(method: str, folder: str, baseline: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.models.backbone.fused_logprobs", full_logits)
    outcome = step(METHODS[method], folder, METHODS[method].rows(NUM_ROWS))
    assert_same(outcome, baseline, TOLERANCE["64-true"])


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo"])
def test_chunks_of_a_gpu(method: str, folder: str, baseline: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a GPU in place of the CPU's tiles; the embeddings are tied to it."""
    monkeypatch.setattr("rlhf_lightning.models.fused_head._implementation", lambda device: ChunkedLogProbs)
    monkeypatch.setattr("rlhf_lightning.models.gpu_logprob_chunks.CHUNK_BYTES", 5000)
    outcome = step(METHODS[method], folder, METHODS[method].rows(NUM_ROWS))
    assert_same(outcome, baseline, TOLERANCE["64-true"])


@pytest.mark.parametrize("method", compared(METHODS, 13))
def test_order_of_examples(method: str, folder: str, baseline: Outcome) -> None:
    rows = METHODS[method].rows(NUM_ROWS)
    shuffled = [rows[n] for n in torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(3)).tolist()]
    assert_same(step(METHODS[method], folder, shuffled), baseline, TOLERANCE["64-true"])


@pytest.fixture(scope="module")
def usual_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights as wide as real models have them, for fp32; wide weights would measure the model's own conditioning."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", initializer_range=0.05))


@pytest.mark.parametrize("method", compared(METHODS, 14))
def test_single_precision(method: str, usual_folder: str) -> None:
    rows = METHODS[method].rows(NUM_ROWS)
    whole = step(METHODS[method], usual_folder, rows, "32-true")
    options = {"micro_batch_tokens": 41, "share_prefix": False, "layout": "auto" if method in PACKED else "padded"}
    split = step(METHODS[method], usual_folder, rows, "32-true", **options)
    assert_same(split, whole, TOLERANCE["32-true"])


@pytest.mark.parametrize("method", compared(METHODS, 15))
def test_evaluation_batch_size(method: str, folder: str) -> None:
    rows = METHODS[method].rows(NUM_ROWS)
    whole = validate(METHODS[method], folder, rows, NUM_ROWS)
    for batch_size in (1, 3):
        parts = validate(METHODS[method], folder, rows, batch_size, micro_batch_tokens=50)
        assert_same_metrics(parts, whole, TOLERANCE["64-true"])
