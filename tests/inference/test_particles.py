"""Particle filtering: weights are those of the exact posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_lightning.inference import LocalEngine, ParticleFilter, SamplingParams
from rlhf_lightning.inference.particles import effective_size, resample
from tests.helpers import char_tokenizer, tiny_model

from .toy import PROMPT, Judge, ToyEngine, solutions, step_scores

TABLE = {
    "": [("a\n", 0.5), ("b\n", 0.3), ("z", 0.2)],
    "a\n": [("c\n", 0.5), ("d", 0.3), ("e\n", 0.2)],
    "b\n": [("c", 0.3), ("d\n", 0.7)],
    "a\nc\n": [("f", 0.6), ("g", 0.4)],
    "a\ne\n": [("f", 1.0)],
    "b\nd\n": [("f", 0.5), ("g", 0.5)],
}
SCORES = step_scores(TABLE, seed=8)
RUNS = 1500


def measured(strategy, posterior_of):
    """One row per run: the estimate of ``p(x) * potential(x)`` for each solution, whose mean is exact."""
    results = strategy.search([PROMPT] * RUNS, seeds=range(RUNS))
    names = sorted(posterior_of)
    rows = np.zeros((RUNS, len(names)))
    for run, result in enumerate(results):
        evidence = math.exp(result.tree.statistics["log_evidence"])
        for node in result.tree.nodes():
            if node.finish_reason == "stop":
                rows[run, names.index("".join(step.text for step in node.line))] += evidence * node.value
    return rows, np.array([posterior_of[name] for name in names])


def p_value(rows, expected):
    """Hotelling's test of a mean, in its chi-square limit."""
    difference = rows.mean(0) - expected
    covariance = np.cov(rows.T) / len(rows)
    statistic = float(difference @ np.linalg.solve(covariance, difference))
    half = torch.tensor([len(expected) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(
    ("options", "power"),
    [
        ({}, 1.0),
        pytest.param({"threshold": 1.0}, 1.0, marks=pytest.mark.slow),
        pytest.param({"threshold": 0.0}, 1.0, marks=pytest.mark.slow),
        ({"entropic": 0.9, "threshold": 0.95}, 1.0),
        pytest.param({"temperature": 0.5}, 2.0, marks=pytest.mark.slow),
    ],
)
def test_weights_match_the_exact_posterior(options, power):
    strategy = ParticleFilter(ToyEngine(TABLE), scorer=Judge(lambda t: math.prod(SCORES(t))), particles=6, **options)
    exact = {text: mass * math.prod(SCORES(text)) ** power for text, mass in solutions(TABLE).items()}
    rows, expected = measured(strategy, exact)
    assert p_value(rows, expected) > 1e-3
    # The negative control: weights that forget the last step.
    wrong = {text: mass * math.prod(SCORES(text)[:-1]) ** power for text, mass in solutions(TABLE).items()}
    assert p_value(rows, np.array([wrong[name] for name in sorted(wrong)])) < 1e-6


def test_rewards_weigh_by_their_exponential():
    reward = {text: math.log(max(1e-3, math.prod(SCORES(text)))) for text in solutions(TABLE)}
    judge = Judge(lambda text: reward.get(text, 0.0))
    strategy = ParticleFilter(ToyEngine(TABLE), scorer=judge, particles=6, potential="exponential", temperature=2.0)
    exact = {text: mass * math.exp(reward[text] / 2) for text, mass in solutions(TABLE).items()}
    assert p_value(*measured(strategy, exact)) > 1e-3


def test_many_particles_have_the_posterior_of_a_real_model():
    """Two tokens of a tiny model, enumerated: their total variation from the exact posterior."""
    engine = LocalEngine(tiny_model("llama", initializer_range=0.05), char_tokenizer())
    sampling = SamplingParams(max_new_tokens=2, top_k=4)

    def worth(text):
        return 1 / (1 + sum(map(ord, text)) % 5)

    strategy = ParticleFilter(
        engine, scorer=Judge(worth), particles=4000, step_separator=None, max_step_tokens=1, sampling=sampling
    )
    (result,) = strategy.search(["1+2=?"], seeds=[0])
    prompt = list(engine.encode("1+2=?"))
    exact: dict[tuple[int, ...], float] = {}
    tokenizer = engine.tokenizer
    first = engine.next_token_logprobs([prompt])[0].double().softmax(-1).topk(4)
    for p, token in zip((first.values / first.values.sum()).tolist(), first.indices.tolist(), strict=True):
        if token in engine.end_token_ids:
            exact[(token,)] = p * worth("")
            continue
        second = engine.next_token_logprobs([[*prompt, token]])[0].double().softmax(-1).topk(4)
        for q, other in zip((second.values / second.values.sum()).tolist(), second.indices.tolist(), strict=True):
            text = tokenizer.decode([token, other], skip_special_tokens=True)
            exact[(token, other)] = p * q * worth(text)
    total = sum(exact.values())
    found = {node.all_token_ids(): node.value for node in result.tree.nodes() if node.finish_reason is not None}
    assert found.keys() <= exact.keys()
    distance = 0.5 * sum(abs(found.get(key, 0.0) - mass / total) for key, mass in exact.items())
    assert distance < 0.04
    assert math.exp(result.tree.statistics["log_evidence"]) == pytest.approx(total, rel=0.03)


def test_values_are_posterior_weights():
    strategy = ParticleFilter(ToyEngine(TABLE), scorer=Judge(lambda t: math.prod(SCORES(t))), particles=16)
    (result,) = strategy.search([PROMPT], seeds=[2])
    assert result.tree.root.value == pytest.approx(1.0, abs=1e-12)
    for node in result.tree.nodes():
        if node.children:
            assert node.value == pytest.approx(sum(child.value for child in node.children), abs=1e-12)


def test_resampling_keeps_expectations():
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(7) * 0.3)
    # In the mean over the comb's offset, each particle keeps its weight, whatever the power.
    for entropic in (0.0, 0.5, 0.9):
        kept = np.zeros(7)
        for uniform in (np.arange(500) + 0.5) / 500:
            chosen, log_weights = resample(np.log(weights), float(uniform), entropic)
            np.add.at(kept, chosen, np.exp(log_weights) / 500)
        assert kept == pytest.approx(weights, abs=2e-3)
    chosen, _ = resample(np.log(weights), 0.5, 0.0)
    counts = np.bincount(chosen, minlength=7)
    assert (np.abs(counts - 7 * weights) < 1).all()


def test_an_entropic_resampling_reaches_its_size():
    log_weights = np.log([0.9, 0.05, 0.03, 0.02])
    _, rest = resample(log_weights, 0.5, 0.75)
    chosen, _ = resample(log_weights, 0.5, 0.0)
    assert effective_size(log_weights) < 0.75 * 4
    assert len(set(np.round(rest, 9))) > 1
    assert len(set(chosen)) == 1


def test_hopeless_particles_end_the_search():
    (result,) = ParticleFilter(ToyEngine(TABLE), scorer=Judge(lambda text: 0.0), particles=4).search(
        [PROMPT], seeds=[0]
    )
    assert result.tree.statistics["log_evidence"] == -math.inf
    assert result.candidates
    with pytest.raises(ValueError, match=r"the scorer gave 1.5; potential='probability' needs scores in \[0, 1\]"):
        ParticleFilter(ToyEngine(TABLE), scorer=Judge(lambda text: 1.5)).search([PROMPT], seeds=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles is 0"),
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"entropic": 1.0}, "entropic is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"potential": "odds"}, "potential is 'odds'; it must be one of probability, exponential"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParticleFilter(ToyEngine(TABLE), scorer=Judge(len), **options)
