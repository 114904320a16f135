"""Rounds of drafts and checks sample the model's distribution: chi-square tests, and controls that must fail.

Legend: N samples, V vocabulary, K drafts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.inference.completion import Request
from rlhf_lightning.inference.lanes import Lanes
from rlhf_lightning.inference.speculation import check

from ..helpers import EOS_ID, tiny_model
from .test_speculation import KINDS, Eager

NUM = 20_000
VOCABULARY, DRAFTS = 6, 3
PROMPT = (2, 4)
SETTINGS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(temperature=0.8, top_k=3),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.2),
    "penalty": SamplingParams(repetition_penalty=1.6),
    "minimum": SamplingParams(min_new_tokens=2),
    "all": SamplingParams(temperature=1.2, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2, min_new_tokens=1),
}
Floats = npt.NDArray[np.float64]
# The next token's scores depend on the last token alone.
TARGET = torch.randn((VOCABULARY, VOCABULARY), generator=torch.Generator().manual_seed(1)) * 1.5
DRAFT = TARGET + torch.randn((VOCABULARY, VOCABULARY), generator=torch.Generator().manual_seed(2))


def p_value(observed: Floats, expected: Floats) -> float:
    """Of Pearson's test; cells in which fewer than five are expected are taken together."""
    rare = expected < 5
    if np.any(observed[expected == 0]):
        return 0.0
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    statistic = float(((observed - expected) ** 2 / expected).sum())
    half_freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def distribution(scores_V: Sequence[float], params: SamplingParams, seen: set[int], step: int) -> Floats:
    """The distribution of one token, filter by filter."""
    scores = np.array(scores_V, dtype=np.float64)
    for token in seen:
        penalty = params.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    if step < params.min_new_tokens:
        scores[EOS_ID] = -np.inf
    weights = np.exp((scores - scores.max()) / params.temperature)
    order = np.argsort(-weights)
    if params.top_k:
        weights[order[params.top_k :]] = 0
    if params.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= params.top_p * weights.sum()]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def exact_pairs(params: SamplingParams) -> Floats:
    """Probabilities of the first two tokens after the prompt, ``(V, V)``."""
    pairs = np.zeros((VOCABULARY, VOCABULARY))
    first = distribution(TARGET[PROMPT[-1]].tolist(), params, set(PROMPT), 0)
    for token in range(VOCABULARY):
        second = distribution(TARGET[token].tolist(), params, {*PROMPT, token}, 1)
        pairs[token] = first[token] * second
    return pairs


def lanes_of(params: SamplingParams, first_seed: int) -> Lanes:
    requests = [Request(PROMPT, (0, n), first_seed + n, 10, params, frozenset({EOS_ID}), None) for n in range(NUM)]
    return Lanes(requests, params, [EOS_ID], torch.device("cpu"), VOCABULARY)


def by_model(lanes: Lanes) -> Tensor:
    """Drafts as a draft model makes them."""
    ahead, drafts = lanes.copy(), []
    for _ in range(DRAFTS):
        ahead.draw(DRAFT[ahead.tokens_N])
        drafts.append(ahead.tokens_N)
    return torch.stack(drafts, dim=1)


def by_lookup(lanes: Lanes) -> Tensor:
    """One guess after each token, and none after some."""
    guesses, drafts = TARGET.argmax(-1), []
    guesses[1] = -1
    tokens_N = lanes.tokens_N
    for _ in range(DRAFTS):
        guess_N = guesses[tokens_N.clamp(min=0)].where(tokens_N >= 0, -1)
        drafts.append(guess_N)
        tokens_N = guess_N
    return torch.stack(drafts, dim=1)


def pairs_of(
    params: SamplingParams, drafter: Callable[[Lanes], Tensor], first_seed: int, accept_all: bool = False
) -> tuple[Floats, float]:
    """Counts of the first two tokens that two rounds give, and the share of first drafts that were accepted."""
    lanes = lanes_of(params, first_seed)
    given: list[list[int]] = [[] for _ in range(NUM)]
    accepted = 0.0
    for number in range(2):
        drafts_NK = drafter(lanes)
        tokens_NW = torch.cat((lanes.tokens_N[:, None], drafts_NK.clamp(min=0)), dim=1)
        drawn_NW, kept_N, _ = check(TARGET[tokens_NW], drafts_NK, lanes)
        if accept_all:
            drawn_NW = torch.cat((drafts_NK.clamp(min=0), drawn_NW[:, -1:]), dim=1)
            kept_N = torch.full_like(kept_N, DRAFTS + 1)
        counts = kept_N.tolist()
        for tokens, row, count in zip(given, drawn_NW.tolist(), counts, strict=True):
            tokens.extend(row[:count])
        lanes.take(drawn_NW, kept_N, counts)
        accepted = float((kept_N > 1).double().mean()) if number == 0 else accepted
    counted = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counted, tuple(np.array([tokens[:2] for tokens in given]).T), 1)
    return counted, accepted


@pytest.mark.parametrize("drafter", [by_model, by_lookup])
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_first_tokens_and_pairs_have_the_models_distribution(setting: str, drafter: Callable[[Lanes], Tensor]) -> None:
    params, expected = SETTINGS[setting], NUM * exact_pairs(SETTINGS[setting])
    counted, accepted = pairs_of(params, drafter, first_seed=7 * NUM)
    assert p_value(counted.sum(1), expected.sum(1)) > 1e-3
    assert p_value(counted.ravel(), expected.ravel()) > 1e-3
    assert 0.0 < accepted < 1.0


def test_a_check_that_accepts_every_draft_fails_the_test() -> None:
    expected = NUM * exact_pairs(SETTINGS["top-k"])
    counted, _ = pairs_of(SETTINGS["top-k"], by_model, first_seed=0, accept_all=True)
    assert p_value(counted.sum(1), expected.sum(1)) < 1e-6
    assert p_value(counted.ravel(), expected.ravel()) < 1e-6


@pytest.mark.parametrize("right", [True, False])
def test_rejection_sampling_with_a_q_that_was_not_sampled_from_fails_the_test(right: bool) -> None:
    """The usual acceptance, by hand: with the right q it passes, and the test notices q without top-k."""
    params, generator = SETTINGS["top-k"], np.random.default_rng(0)
    p = distribution(TARGET[3].tolist(), params, set(), 5)
    sampled = distribution(DRAFT[3].tolist(), params, set(), 5)
    q = sampled if right else distribution(DRAFT[3].tolist(), SamplingParams(temperature=0.8), set(), 5)
    residual = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
    drafts = generator.choice(VOCABULARY, NUM, p=sampled)
    accepted = generator.random(NUM) < np.minimum(1, p[drafts] / q[drafts])
    tokens = np.where(accepted, drafts, generator.choice(VOCABULARY, NUM, p=residual))
    value = p_value(np.bincount(tokens, minlength=VOCABULARY).astype(np.float64), NUM * p)
    assert value > 1e-3 if right else value < 1e-6


def test_acceptance_of_a_shared_uniform_is_the_overlap_of_its_intervals() -> None:
    params = SETTINGS["temperature"]
    _, accepted = pairs_of(params, by_model, first_seed=3)
    p, q = (distribution(scores[PROMPT[-1]].tolist(), params, set(), 5) for scores in (TARGET, DRAFT))
    upper, lower = np.minimum(p.cumsum(), q.cumsum()), np.maximum(p.cumsum() - p, q.cumsum() - q)
    share = np.maximum(upper - lower, 0).sum()
    assert abs(accepted - share) < 4 * (share * (1 - share) / NUM) ** 0.5


def exact_triples(model: torch.nn.Module, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probabilities of the first three tokens, or fewer up to the end, by full forwards."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for step in range(3):
        following: dict[tuple[int, ...], float] = {}
        for tokens, share in found.items():
            if EOS_ID in tokens or share == 0:
                following[tokens] = share
                continue
            with torch.no_grad():
                scores_V = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
            chances = distribution(scores_V.tolist(), params, {*prompt, *tokens}, step)
            following |= {(*tokens, token): share * float(chance) for token, chance in enumerate(chances)}
        found = following
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_samples_of_an_engine_have_the_models_distribution(kind: str, setting: str) -> None:
    model = tiny_model("llama", vocab_size=8, initializer_range=0.12)
    spec = {"draft": tiny_model("llama", seed=1, vocab_size=8, initializer_range=0.12), "early_exit": 1}
    engine = LocalEngine(model, None, speculation="ngram" if kind == "ngram" else {kind: spec[kind]})
    assert engine._speculation is not None
    engine._speculation.pace = Eager(3)
    settings = {**vars(SETTINGS[setting]), "max_new_tokens": 5, "seed": 11}
    prompt = [5, 6, 7, 4, 5, 6, 3, 7, 2, 5]
    samples = engine.generate([prompt], NUM, SamplingParams(**settings))[0]
    exact = exact_triples(model, prompt, SETTINGS[setting])

    counted = Counter(tuple(sample.token_ids[:3]) for sample in samples)
    assert set(counted) <= set(exact)
    observed, expected = np.array([counted[key] for key in exact], dtype=float), NUM * np.array(list(exact.values()))
    assert p_value(observed, expected) > 1e-3
    for length, start in itertools.product((1, 2), (0, 1)):
        # The first token of a sample follows its prompt; rounds begin with the second.
        parts = sorted({key[start : start + length] for key in exact})
        of_part = [np.array([key[start : start + length] == part for key in exact]) for part in parts]
        sums = (np.array([values[mine].sum() for mine in of_part]) for values in (observed, expected))
        assert p_value(*sums) > 1e-3
    counts = engine.statistics()["speculation"]
    assert 0 < counts["accepted"] < counts["drafted"]
