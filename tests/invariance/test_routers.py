"""A mixture of experts whose routers have a loss over the global batch makes the same step however it is split."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest

from rlhf_lightning.sequences import SequenceBatch

from ..helpers import save_tiny_model
from .harness import TOLERANCE, Outcome, assert_same, assert_same_metrics, step, validate
from .methods import EXPERTS
from .test_ranks import on_ranks

NUM_ROWS = 7
VARIATIONS: dict[str, dict[str, Any]] = {
    "budget-1-row": {"micro_batch_tokens": 1},
    "padded": {"layout": "padded"},
    "everything": {
        "micro_batch_tokens": 41,
        "layout": "padded",
        "share_prefix": False,
        "gradient_checkpointing": True,
    },
    "checkpointed": {"gradient_checkpointing": True},
    "repeated-prompts-budget": {"share_prefix": False, "micro_batch_tokens": 41},
}
FAST = {
    ("sft-experts", "everything"),
    ("dpo-experts", "budget-1-row"),
    ("dpo-coupled-experts", "everything"),
    ("kto-experts", "everything"),
    ("grpo-experts", "everything"),
}
CASES = [
    pytest.param(method, variation, marks=() if (method, variation) in FAST else pytest.mark.slow)
    for method in EXPERTS
    if method != "dpo-checkpointed-experts"
    for variation in VARIATIONS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", initializer_range=0.05))


@pytest.fixture(scope="module")
def baselines() -> dict[str, Outcome]:
    return {}


@pytest.fixture
def baseline(baselines: dict[str, Outcome], folder: str, method: str) -> Outcome:
    """The whole batch as one packed micro-batch with shared prompts."""
    if method not in baselines:
        baselines[method] = step(EXPERTS[method], folder, EXPERTS[method].rows(NUM_ROWS), "32-true")
        assert baselines[method].metrics["train/aux_loss"] > 1.9
    return baselines[method]


@pytest.mark.parametrize(("method", "variation"), CASES)
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_layout_and_budget_of_experts(method: str, variation: str, folder: str, baseline: Outcome) -> None:
    outcome = step(EXPERTS[method], folder, EXPERTS[method].rows(NUM_ROWS), "32-true", **VARIATIONS[variation])
    assert_same(outcome, baseline, TOLERANCE["32-true"])


@pytest.mark.parametrize("method", ["sft-experts", pytest.param("ppo-experts", marks=pytest.mark.slow)])
def test_padding_of_experts(method: str, folder: str, baseline: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceBatch, "padded", partialmethod(SequenceBatch.padded, side="left", extra=5))
    outcome = step(EXPERTS[method], folder, EXPERTS[method].rows(NUM_ROWS), "32-true", layout="padded")
    assert_same(outcome, baseline, TOLERANCE["32-true"])


RANKED = ["sft-experts", "dpo-checkpointed-experts", "dpo-coupled-experts", "kto-experts", "ppo-experts"]


@pytest.fixture(scope="module", params=[("ddp", 7), ("fsdp2", 7), ("fsdp2", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def ranked(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    strategy, num_rows = request.param
    runs = {f"{strategy}:{method}": method for method in RANKED}
    results = on_ranks(folder, tmp_path_factory.mktemp("ranks") / "two.pt", num_rows, [*runs])
    return num_rows, {runs[run]: found for run, found in results.items()}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("method", RANKED)
@pytest.mark.timeout(900)
def test_experts_on_two_ranks(method: str, ranked: tuple[int, Any], folder: str) -> None:
    num_rows, results = ranked
    rows, found = EXPERTS[method].rows(num_rows), results[method]
    expected = step(EXPERTS[method], folder, rows, "32-true")
    assert_same(Outcome(found["updates"], found["metrics"]), expected, TOLERANCE["32-true"])
    metrics = validate(EXPERTS[method], folder, rows, 3, trainer_options={"precision": "32-true"})
    assert_same_metrics(found["validation"], metrics, TOLERANCE["32-true"])
