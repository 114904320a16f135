from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_lightning.inference.completion import Request
from rlhf_lightning.inference.lanes import Lanes, read, remaining, sample_next_tokens, streams, uniforms_on_device
from rlhf_lightning.inference.sampling import SamplingParams, uniforms

from .toy import sample

CPU = torch.device("cpu")
STOPS = (3, 7)


def requests(params: SamplingParams, begun: tuple[int, ...] = (0, 0, 0)) -> list[Request]:
    made = []
    for row, count in enumerate(begun):
        made.append(Request((row + 1, row + 2), (row, 0), 100 + row, 50, params, frozenset(STOPS), None))
        for token in range(count):
            made[-1].push(10 + token, 0.0, None)
    return made


def test_uniforms_on_the_device_are_the_hosts_bit_for_bit() -> None:
    generator = np.random.default_rng(0)
    seeds = [0, -1, 2**63, 2**64 - 1, 2**70 + 5, *generator.integers(0, 2**62, 5000).tolist()]
    steps = np.array([0, 2**31, 7, 0, 1, *generator.integers(0, 10_000, 5000).tolist()])
    found = uniforms_on_device(torch.from_numpy(streams(seeds)), torch.from_numpy(steps))
    assert found.dtype == torch.float64
    assert found.tolist() == uniforms(seeds, steps).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, min_new_tokens=3),
        SamplingParams(temperature=1.3, top_p=0.8, model_logprobs=True),
        SamplingParams(min_new_tokens=4, repetition_penalty=1.7, top_k=9),
    ],
    ids=["greedy", "nucleus", "penalty"],
)
def test_lanes_draw_what_each_sample_draws_alone(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = requests(params, begun=(0, 2, 5))
    lanes = Lanes(samples[:2], params, STOPS, CPU, vocabulary=20)
    lanes.append(Lanes(samples[2:], params, STOPS, CPU, vocabulary=20))
    order = [2, 0, 1]
    for step in range(6):
        if step == 3:  # rows may change places
            lanes.keep(order)
            samples = [samples[row] for row in order]
        logits_NV = torch.randn((3, 20), generator=generator) * 3
        expected = []
        for request, logits_V in zip(samples, logits_NV, strict=True):
            seen_NV = torch.zeros((1, 20), dtype=torch.bool)
            seen_NV[0, [*request.prompt, *request.token_ids]] = True
            early = len(request.token_ids) < params.min_new_tokens
            banned = (torch.tensor([0]), torch.tensor(STOPS)) if early else None
            numbers_N = torch.from_numpy(uniforms([request.seed], [len(request.token_ids)]))
            expected.append(sample(logits_V[None], numbers_N, params, seen_NV=seen_NV, banned=banned))
        read([lanes.draw(logits_NV)], samples, params)
        for request, drawn in zip(samples, expected, strict=True):
            if request.finish_reason is None or request.token_ids[-1] in STOPS:
                request.finish_reason = None  # as if it went on
                assert request.token_ids[-1] == int(drawn.tokens_N)
                assert request.logprobs[-1] == drawn.logprobs_N.item()
                if drawn.model_logprobs_N is not None:
                    assert request.model_logprobs[-1] == drawn.model_logprobs_N.item()
        assert lanes.tokens_N.tolist() == [request.token_ids[-1] for request in samples]


def test_what_is_drawn_after_the_end_is_dropped() -> None:
    params = SamplingParams(temperature=0)
    samples = requests(params)
    lanes = Lanes(samples, params, STOPS, CPU, vocabulary=20)
    drawn = []
    for tokens in ([5, 3, 6], [7, 8, 9], [4, 4, 4]):
        logits_NV = torch.zeros((3, 20))
        logits_NV[range(3), tokens] = 1.0
        if tokens[0] == 4:
            logits_NV[1] = math.nan  # of a sample that has ended
        drawn.append(lanes.draw(logits_NV))
    read(drawn, samples, params)
    assert [request.token_ids for request in samples] == [[5, 7], [3], [6, 9, 4]]
    assert [request.finish_reason for request in samples] == ["stop", "stop", None]


@pytest.mark.parametrize("vocabulary", [9, 2049, 5003])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3, top_p=0.5), SamplingParams(min_p=0.1)],
)
def test_scores_that_are_not_finite_are_refused_by_whoever_reads_them(params: SamplingParams, vocabulary: int) -> None:
    logits_NV = torch.randn((3, vocabulary), generator=torch.Generator().manual_seed(1))
    logits_NV[1, vocabulary - 1] = math.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        sample_next_tokens(logits_NV, requests(params), params, STOPS)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_last_rows_take_the_places_of_those_that_leave(count: int) -> None:
    for bits in range(2**count):
        leaving = [row for row in range(count) if bits >> row & 1]
        order = remaining(count, leaving)
        assert sorted(order) == [row for row in range(count) if row not in leaving]
        # A row moves only to a smaller index: into a place that is free.
        assert all(source == target or (source > target and target in leaving) for target, source in enumerate(order))
        assert all(source >= len(order) for target, source in enumerate(order) if source != target)
