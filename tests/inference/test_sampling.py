from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_lightning.inference.sampling import SamplingParams, derive_seed, uniforms

from .toy import sample

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.6),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.8),
    SamplingParams(temperature=1.3, top_p=0.9, min_p=0.15),
    SamplingParams(temperature=0.8, top_k=6, min_p=0.1),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.7, min_p=0.3),
]


def transformers_probabilities(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that transformers would sample from, in double precision."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(len(logits_NV), 1, dtype=torch.long), logits_NV.double()).softmax(-1)


def chi_square_p_value(counts_V: np.ndarray, expected_V: np.ndarray) -> float:
    """How likely counts at least this far from their expectation are: the upper regularised gamma function."""
    statistic = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    half_freedom = torch.tensor((len(counts_V) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def name(params: SamplingParams) -> str:
    return f"T{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}"


@pytest.mark.parametrize("params", SETTINGS, ids=name)
def test_drawn_tokens_follow_the_filtered_distribution(params: SamplingParams) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    expected_V = transformers_probabilities(logits_V[None], params)[0].numpy()
    draws = 20_000
    numbers = torch.from_numpy(uniforms(np.full(draws, 5), np.arange(draws)))
    drawn = sample(logits_V.expand(draws, -1), numbers, params)
    counts_V = np.bincount(drawn.tokens_N.numpy(), minlength=12)
    kept = expected_V > 0
    assert counts_V[~kept].sum() == 0
    if kept.sum() > 1:
        assert chi_square_p_value(counts_V[kept], expected_V[kept] * draws) > 1e-3
    np.testing.assert_allclose(drawn.logprobs_N, np.log(expected_V[drawn.tokens_N]), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [5, 2048, 2049, 4096, 5003])
@pytest.mark.parametrize("params", SETTINGS, ids=name)
def test_a_draw_inverts_the_cumulative_distribution(params: SamplingParams, vocabulary: int) -> None:
    logits_NV = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    numbers_N = torch.from_numpy(uniforms(np.arange(64), np.zeros(64, dtype=int)))
    drawn = sample(logits_NV, numbers_N, params)
    cumulative_NV = transformers_probabilities(logits_NV, params).cumsum(-1)
    above_N = cumulative_NV.gather(-1, drawn.tokens_N[:, None]).squeeze(-1)
    below_N = torch.where(
        drawn.tokens_N > 0, cumulative_NV.gather(-1, (drawn.tokens_N - 1).clamp(min=0)[:, None])[:, 0], 0
    )
    assert (below_N - 1e-6 <= numbers_N).all()
    assert (numbers_N <= above_N + 1e-6).all()
    np.testing.assert_allclose(drawn.logprobs_N, (above_N - below_N).log(), atol=2e-4)


@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_tokens_without_mass_are_never_drawn_at_either_end(vocabulary: int) -> None:
    logits_NV = torch.full((2, vocabulary), -math.inf)
    logits_NV[:, 3] = 1.0
    logits_NV[:, vocabulary - 3] = 2.0
    ends_N = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits_NV, ends_N, SamplingParams()).tokens_N.tolist() == [3, vocabulary - 3]


def test_top_p_takes_the_full_sort_where_the_best_candidates_do_not_reach_the_mass() -> None:
    flat_NV = torch.linspace(0.0, 0.01, 3000).expand(2, -1).clone()
    flat_NV[1, 0] = 50.0
    params = SamplingParams(top_p=0.95)
    expected_NV = transformers_probabilities(flat_NV, params)
    numbers_N = torch.tensor([1e-9, 1e-9], dtype=torch.float64)
    drawn = sample(flat_NV, numbers_N, params)
    assert drawn.tokens_N.tolist() == [int((expected_NV[0] > 0).nonzero()[0]), 0]


def test_greedy_takes_the_maximum_with_certainty() -> None:
    logits_NV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    drawn = sample(logits_NV, None, SamplingParams(temperature=0, model_logprobs=True))
    assert drawn.tokens_N.tolist() == [1, 0]
    assert drawn.logprobs_N.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(drawn.model_logprobs_N, logits_NV.log_softmax(-1)[[0, 1], [1, 0]], rtol=1e-6)


def test_model_logprobs_ignore_temperature_and_filters() -> None:
    logits_NV = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    numbers_N = torch.from_numpy(uniforms(np.arange(8), np.zeros(8, dtype=int)))
    drawn = sample(logits_NV, numbers_N, SamplingParams(temperature=0.3, top_k=4, model_logprobs=True))
    expected_N = logits_NV.log_softmax(-1).gather(-1, drawn.tokens_N[:, None])[:, 0]
    np.testing.assert_allclose(drawn.model_logprobs_N, expected_N, atol=1e-6)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_NV = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    tokens_NT = torch.tensor([[1, 2, 2], [5, 6, 7], [19, 0, 0]])
    seen_NV = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, tokens_NT, True)
    params = SamplingParams(repetition_penalty=1.8)
    numbers_N = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    expected_NV = RepetitionPenaltyLogitsProcessor(1.8)(tokens_NT, logits_NV)
    assert torch.equal(
        sample(logits_NV, numbers_N, params, seen_NV=seen_NV).tokens_N,
        sample(expected_NV, numbers_N, replace(params)).tokens_N,
    )
    drawn = sample(logits_NV, numbers_N, params, seen_NV=seen_NV)
    np.testing.assert_allclose(
        drawn.logprobs_N, expected_NV.log_softmax(-1).gather(-1, drawn.tokens_N[:, None])[:, 0], atol=1e-6
    )


def test_banned_tokens_are_not_drawn() -> None:
    banned = torch.tensor([1]), torch.tensor([1, 3])
    logits_NV = torch.tensor([[0.0, 100.0, 1.0, 100.0]] * 2)
    before_NV = logits_NV.clone()
    assert sample(logits_NV, None, SamplingParams(temperature=0), banned=banned).tokens_N.tolist() == [1, 2]
    halves_N = torch.tensor([0.4, 0.5], dtype=torch.float64)
    drawn = sample(logits_NV, halves_N, SamplingParams(model_logprobs=True), banned=banned)
    assert drawn.tokens_N.tolist() == [1, 2]
    np.testing.assert_allclose(drawn.logprobs_N, [-math.log(2), 1 - math.log(math.e + 1)], atol=1e-6)
    np.testing.assert_allclose(drawn.model_logprobs_N, [-math.log(2), -99 - math.log(2)], atol=2e-5)
    assert torch.equal(logits_NV, before_NV)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits_NV = torch.zeros(2, 4)
    logits_NV[1, 2] = bad
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        sample(logits_NV, torch.full((2,), 0.5, dtype=torch.float64), SamplingParams(temperature=temperature))


def test_sampling_leaves_the_scores_as_they_are() -> None:
    logits_NV = torch.randn(2, 9)
    before_NV = logits_NV.clone()
    sample(logits_NV, torch.full((2,), 0.5, dtype=torch.float64), SamplingParams(temperature=0.5, top_k=2))
    assert torch.equal(logits_NV, before_NV)


def test_uniforms_are_uniform_and_functions_of_seed_and_step() -> None:
    by_step = uniforms(np.full(20_000, 9), np.arange(20_000))
    by_seed = uniforms(np.arange(20_000), np.full(20_000, 4))
    for numbers in (by_step, by_seed):
        counts = np.bincount((numbers * 100).astype(int), minlength=100)
        assert chi_square_p_value(counts, np.full(100, 200.0)) > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        assert numbers.min() > 0
        assert numbers.max() < 1
    assert uniforms([9], [17])[0] == by_step[17]
    assert uniforms([-1], [0])[0] == uniforms([2**64 - 1], [0])[0]


def test_derived_seeds_differ_by_every_part_and_its_type() -> None:
    seeds = {derive_seed(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0), ("1;int:2",)]}
    assert len(seeds) == 6
    assert derive_seed(1, "a") == derive_seed(1, "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("stop", ("",)),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^sampling\.{field}=.* is not allowed: it must be [^\n]+$"):
        SamplingParams(**{field: value})


def test_one_stop_string_need_not_be_a_tuple() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
