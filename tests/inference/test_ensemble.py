"""Several models that sample as one, against distributions that are combined by hand."""

from __future__ import annotations

import functools
import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.inference import EnsemblePolicy, LocalEngine, MajorityVote, SamplingParams, generate
from rlhf_lightning.inference.pooling import arithmetic_likelihood, maximize_on_simplex, pooled_scores
from rlhf_lightning.inference.sampling import uniforms
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.runner import run_pipeline

from ..helpers import EOS_ID, VOCAB_SIZE, char_tokenizer, save_tiny_model, tiny_model
from .test_engine import flat, random_prompts

WEIGHTS = (0.2, 0.5, 0.3)
POOLS = ("arithmetic", "geometric", "vote")


@pytest.fixture(scope="module")
def models():
    """Three architectures of one vocabulary."""
    return [tiny_model("llama"), tiny_model("gemma2", seed=1), tiny_model("gpt2", seed=2)]


@functools.cache
def distribution(model, tokens):
    """A model's own distribution after some tokens, in fp64; a search asks for the same ones again and again."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.double().softmax(-1).numpy()


def pooled(models, tokens, pool, weights):
    """The combined distribution after some tokens, by its definition, in fp64."""
    probabilities = [distribution(model, tuple(tokens)) for model in models]
    if pool == "arithmetic":
        return sum(w * p for w, p in zip(weights, probabilities, strict=True))
    if pool == "geometric":
        raised = math.prod(p**w for w, p in zip(weights, probabilities, strict=True))
        return raised / raised.sum()
    votes = np.zeros(VOCAB_SIZE)
    for w, p in zip(weights, probabilities, strict=True):
        votes[p.argmax()] += w
    return votes


def naive_sample(models, prompt, pool, weights, seed, params):
    tokens, logprobs = [], []
    while len(tokens) < params.max_new_tokens and tokens[-1:] != [EOS_ID]:
        mass = pooled(models, prompt + tokens, pool, weights) ** (1 / params.temperature)
        if params.top_k:
            mass[mass < np.sort(mass)[-params.top_k]] = 0
        mass /= mass.sum()
        token = int(np.searchsorted(mass.cumsum(), uniforms([seed], [len(tokens)])[0], side="right"))
        tokens.append(token)
        logprobs.append(math.log(mass[token]))
    return tokens, logprobs


@pytest.mark.parametrize("pool", POOLS)
def test_distributions_are_those_of_the_definition(models, pool):
    policy = EnsemblePolicy(models, combine=pool, weights=WEIGHTS)
    prompts = random_prompts((3, 11, 1, 7))
    found = policy.next_token_logprobs(prompts).exp().numpy()
    for row, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(row, pooled(models, prompt, pool, WEIGHTS), atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_samples_and_logprobs_are_those_of_the_combined_distribution(models, pool):
    policy = EnsemblePolicy(models, combine=pool, weights=WEIGHTS, max_batch_tokens=50)
    params = SamplingParams(max_new_tokens=8, temperature=0.8, top_k=20)
    prompts, seeds = random_prompts((2, 9, 5)), [[10, 11], [12, 13], [14, 15]]
    for prompt, group, row in zip(prompts, policy.generate(prompts, 2, params, seeds=seeds), seeds, strict=True):
        for sample, seed in zip(group, row, strict=True):
            tokens, logprobs = naive_sample(models, prompt, pool, WEIGHTS, seed, params)
            assert sample.token_ids == tokens
            np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_greedy_tokens_are_the_most_likely(models, pool):
    weights = (0.4, 0.35, 0.25)  # no votes of these are tied
    policy = EnsemblePolicy(models, combine=pool, weights=weights)
    prompts = random_prompts((6, 2))
    for prompt, (sample,) in zip(
        prompts, policy.generate(prompts, 1, SamplingParams(max_new_tokens=12, temperature=0)), strict=True
    ):
        tokens = []
        while len(tokens) < 12 and tokens[-1:] != [EOS_ID]:
            tokens.append(int(pooled(models, prompt + tokens, pool, weights).argmax()))
        assert sample.token_ids == tokens
        assert sample.logprobs == [0.0] * len(tokens)


@pytest.mark.parametrize("pool", POOLS)
def test_frequencies_are_the_probabilities(models, pool):
    policy = EnsemblePolicy(models, combine=pool, weights=WEIGHTS)
    (prompt,) = random_prompts((5,))
    count, params = 20_000, SamplingParams(max_new_tokens=1)
    (samples,) = policy.generate([prompt], count, params, seeds=[range(count)])
    expected = count * pooled(models, prompt, pool, WEIGHTS)
    observed = np.bincount([sample.token_ids[0] for sample in samples], minlength=VOCAB_SIZE)
    assert (observed[expected == 0] == 0).all()
    statistic, bound = chi_square(observed, expected)
    assert statistic < bound
    # The control: another pool of the same models is told apart by the same count.
    if pool == "geometric":
        statistic, bound = chi_square(observed, count * pooled(models, prompt, "arithmetic", WEIGHTS))
        assert statistic > 2 * bound


def chi_square(observed, expected):
    """The statistic, tokens of less than ten expected draws being one class, and a bound at 4.5 deviations."""
    rare = expected < 10
    observed = [*observed[~rare], observed[rare].sum()]
    expected = [*expected[~rare], max(float(expected[rare].sum()), 1.0)]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(expected) - 1
    return statistic, freedom + 4.5 * math.sqrt(2 * freedom)


def test_equal_models_are_that_model_and_weight_0_is_nobody(models):
    params = SamplingParams(max_new_tokens=10, temperature=1.3, top_p=0.9, repetition_penalty=1.3, model_logprobs=True)
    prompts, seeds = random_prompts((4, 8)), [[1, 2], [3, 4]]
    alone = LocalEngine(models[0], None).generate(prompts, 2, params, seeds=seeds)
    for given, weights in ([models[0]] * 2, None), (models, (3.0, 0.0, 0.0)):
        for pool in ("arithmetic", "geometric"):
            policy = EnsemblePolicy(given, combine=pool, weights=weights)
            together = policy.generate(prompts, 2, params, seeds=seeds)
            assert flat(together) == flat(alone)
            for group, expected in zip(together, alone, strict=True):
                for sample, other in zip(group, expected, strict=True):
                    np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-4)
                    np.testing.assert_allclose(sample.model_logprobs, other.model_logprobs, atol=1e-4)


@pytest.mark.parametrize(("pool", "budget"), [("arithmetic", 1), ("geometric", 70), ("vote", 333)])
def test_a_sample_depends_neither_on_its_neighbours_nor_on_the_budget(models, pool, budget):
    prompts = random_prompts((9, 2, 14, 2))
    params = SamplingParams(max_new_tokens=12, temperature=1.5, stop_token_ids=tuple(range(3, 9)))
    seeds = [[100 * row + column for column in range(3)] for row in range(len(prompts))]
    alone = [
        sample
        for prompt, row in zip(prompts, seeds, strict=True)
        for sample in EnsemblePolicy(models, combine=pool).generate([prompt], 3, params, seeds=[row])[0]
    ]
    together = EnsemblePolicy(models, combine=pool, max_batch_tokens=budget).generate(prompts, 3, params, seeds=seeds)
    assert flat(together) == [sample.token_ids for sample in alone]
    for sample, other in zip((s for group in together for s in group), alone, strict=True):
        np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-4)


def test_tied_votes_go_to_the_more_probable_token():
    scores = torch.tensor([[[0.6, 0.3, 0.1]], [[0.1, 0.2, 0.7]]]).log()
    half = torch.tensor([0.5, 0.5])
    assert pooled_scores(scores, half, "vote", greedy=True).argmax() == 2  # 0.4 on average against 0.35
    assert pooled_scores(scores, half, "vote").softmax(-1).tolist() == [[0.5, 0.0, 0.5]]
    scores[1, 0, 0] = math.nan
    for pool in POOLS:
        assert torch.isnan(pooled_scores(scores, half, pool)).any()


# Weights of greatest likelihood.


ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}!"} for a in range(3, 8) for b in (2, 9)]


def likelihood(models, pool, weights):
    """The mean log-likelihood of the rows' completions, by its definition."""
    tokenizer = char_tokenizer()
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        completion = [*tokenizer.encode(row["completion"], add_special_tokens=False), EOS_ID]
        for n, token in enumerate(completion):
            total += math.log(pooled(models, prompt + completion[:n], pool, weights)[token])
            count += 1
    return total / count


@pytest.mark.parametrize("pool", ["arithmetic", "geometric"])
def test_learned_weights_are_the_optimum_of_a_search(models, pool):
    policy = EnsemblePolicy(models[:2], char_tokenizer(), combine=pool)
    (first, _) = policy.learn_weights(ROWS)
    assert policy.weights == pytest.approx([first, 1 - first])

    # Golden section on the definition.
    low, high, ratio = 0.0, 1.0, (math.sqrt(5) - 1) / 2
    for _ in range(14):
        one, other = high - ratio * (high - low), low + ratio * (high - low)
        values = [likelihood(models[:2], pool, (max(w, 1e-12), max(1 - w, 1e-12))) for w in (one, other)]
        low, high = (low, other) if values[0] > values[1] else (one, high)
    assert low - 1e-3 <= first <= high + 1e-3


def test_the_optimum_of_many_weights_is_that_of_a_grid():
    generator = torch.Generator().manual_seed(3)
    table_TM = torch.rand(40, 3, generator=generator, dtype=torch.float64).log()
    table_TM[:, 2] -= 1.0  # a worse model
    objective = arithmetic_likelihood(table_TM, torch.full((40,), 1 / 40, dtype=torch.float64))
    found = maximize_on_simplex(objective, 3)
    steps = range(201)
    grid = [(a / 200, b / 200, 1 - a / 200 - b / 200) for a, b in product(steps, steps) if a + b <= 200]
    values = (table_TM.exp() @ torch.tensor(grid, dtype=torch.float64).T.clamp(min=0)).log().mean(0)
    assert objective(found).value >= float(values.max())
    assert found.tolist() == pytest.approx(list(grid[int(values.argmax())]), abs=0.01)
    # Its conditions: no model is worth more than the mixture, and those in it as much.
    slopes = objective(found).gradient_M
    assert float(slopes.max()) == pytest.approx(1.0, abs=1e-9)

    # A useless model gets nothing, and equal ones share.
    table_TM[:, 2] = table_TM.min(dim=1).values - 5
    assert maximize_on_simplex(objective, 3)[2] == 0
    assert maximize_on_simplex(
        arithmetic_likelihood(table_TM[:, :1].expand(-1, 2), torch.full((40,), 1 / 40).double()), 2
    ).tolist() == [0.5, 0.5]


# Used as an engine.


def test_strategies_generate_and_stages_take_it(models, tmp_path):
    tokenizer = char_tokenizer()
    policy = EnsemblePolicy(models, tokenizer, combine="geometric")
    params = SamplingParams(max_new_tokens=3, seed=2)
    (result,) = MajorityVote(policy, n=5).search(["2+2="], seeds=[0], sampling=params)
    assert len(result.candidates) == 5
    text = generate(policy, "2+2=", temperature=0.0, max_new_tokens=4)
    assert text == policy.generate(["2+2="], 1, SamplingParams(max_new_tokens=4, temperature=0))[0][0].text

    folders = [str(save_tiny_model(tmp_path / arch, arch, seed=n)) for n, arch in enumerate(("llama", "qwen3"))]
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
run_dir: {tmp_path / "run"}
stages:
  pairs:
    kind: sample
    model: {{class_path: EnsemblePolicy, init_args: {{models: [{", ".join(folders)}], weights: [1, 3]}}}}
    prompts: sums:prompts?split=train&rows=8
    verifier: tests.inference.test_ensemble.length
    sampling: {{max_new_tokens: 6, stop_token_ids: {list(range(3, 20))}}}
"""
    )
    manifest = run_pipeline(load_pipeline(file), say=lambda line: None)
    assert manifest.stages["pairs"]["metrics"]["samples"] == 32
    assert set(folders) <= set(manifest.stages["pairs"]["inputs"])


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "arithmetik"}, "did you mean 'arithmetic'"),
        ({"weights": ["1", "2", "3"]}, "it must be a list of numbers, one for each model"),
        ({"weights": [1.0]}, "weights has 1 numbers for 3 models: give one for each"),
        ({"weights": [1.0, -0.5, 1.0]}, "all must be finite, at least 0, and some above 0"),
        ({"weights": [0.0, 0.0, 0.0]}, "some above 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 is not allowed"),
    ],
)
def test_bad_options(models, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EnsemblePolicy(models, **options)


def test_other_mistakes_are_named(models, tmp_path):
    with pytest.raises(ValueError, match="it must be a list of at least one folder or model"):
        EnsemblePolicy([])
    with pytest.raises(ValueError, match=r"vocab_size is 64 in models\[0\] and 70 in models\[1\]"):
        EnsemblePolicy([models[0], tiny_model("llama", vocab_size=70)])
    votes = EnsemblePolicy(models, char_tokenizer(), combine="vote")
    with pytest.raises(ValueError, match="min_new_tokens=2 is not allowed with combine='vote'"):
        votes.generate([[5]], 1, SamplingParams(min_new_tokens=2))
    with pytest.raises(ValueError, match="weights of greatest likelihood need combine='arithmetic' or 'geometric'"):
        votes.learn_weights(ROWS)
    with pytest.raises(ValueError, match="give tokenizer="):
        EnsemblePolicy(models).learn_weights(ROWS)
    with pytest.raises(ValueError, match="the model's tokens are 0 to"):
        EnsemblePolicy(models).generate([[VOCAB_SIZE]])

    # Folders whose tokenizers number a token differently.
    folders = [save_tiny_model(tmp_path / name) for name in "ab"]
    path = folders[1] / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"a": ', '"A": '))
    with pytest.raises(ValueError, match=r"the token 'a' is \d+ in one and missing in the other"):
        EnsemblePolicy(folders)
    with pytest.raises(ValueError, match="which models that decode together have to: leave it out"):
        EnsemblePolicy([recurrent()]).generate([[5, 6]])


def recurrent():
    """A model whose rows cannot share a batch with padding."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": EOS_ID}
    config = AutoConfig.for_model("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()
