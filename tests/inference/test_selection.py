"""Selection: best-of-n and votes by hand-made tables, their budgets, and estimates against enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.data.final_answer import answer_key
from rlhf_lightning.inference import (
    BestOfN,
    Budget,
    Completion,
    LocalEngine,
    MajorityVote,
    SamplingParams,
    SelfConsistency,
    VerifierScorer,
    build_strategy,
    generate,
)
from rlhf_lightning.inference.selection import best_of_n_kl, probability_of_lead
from rlhf_lightning.inference.strategy import Scores
from rlhf_lightning.metrics.at_k import expected_best

from ..helpers import char_tokenizer, save_tiny_model


class Script:
    """An engine that answers the n-th sample of a search with the n-th text of its prompt, one token per character."""

    def __init__(self, **texts: list[str]) -> None:
        self.texts, self.drawn, self.limits = texts, Counter(), []

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None):
        found = []
        for prompt in prompts:
            text = self.texts[prompt][self.drawn[prompt]]
            self.drawn[prompt] += 1
            self.limits.append(sampling.max_new_tokens)
            cut = text[: sampling.max_new_tokens]
            tokens = [ord(c) for c in cut]
            found.append([Completion(tokens, cut, [0.0] * len(cut), "stop" if cut == text else "length")])
        return found


class ByTable:
    def __init__(self, **table: float) -> None:
        self.table = table

    def score(self, candidates):
        return Scores([self.table[c.text] for c in candidates], [10] * len(candidates))


TEXTS = ["a1", "b2", "c1", "d3", "e2"]


def test_best_of_n_takes_the_highest_score_and_the_first_of_equal_ones():
    scorer = ByTable(a1=0.2, b2=0.9, c1=0.3, d3=0.9, e2=0.1)
    result = BestOfN(Script(p=TEXTS), scorer=scorer, n=5).search(["p"], seeds=[0])[0]
    assert (result.text, result.score, result.chosen) == ("b2", 0.9, 1)
    assert [c.score for c in result.candidates] == [0.2, 0.9, 0.3, 0.9, 0.1]
    assert (result.tokens, result.scorer_tokens, result.expansions) == (10, 50, 5)


def test_weighted_best_of_n_adds_scores_of_equal_answers():
    # Sums by hand: answer 1: .8, answer 2: .7, answer 3: .75.
    scorer = ByTable(a1=0.35, b2=0.6, c1=0.45, d3=0.75, e2=0.1)
    result = BestOfN(Script(p=TEXTS), scorer=scorer, n=5, weighted=True).search(["p"], seeds=[0])[0]
    assert result.text == "c1"  # the best of the answer with the highest sum


def test_majority_takes_the_first_of_the_most_frequent_answer():
    result = MajorityVote(Script(p=["x", "b2", "c1", "d1", "e2", "f1"]), n=6, answer=answer_of).search(
        ["p"], seeds=[0]
    )[0]
    assert (result.text, result.score) == ("c1", 0.5)
    assert [c.score for c in result.candidates] == [0.0, 2 / 6, 0.5, 0.5, 2 / 6, 0.5]
    tie = MajorityVote(Script(p=["b2", "c1", "d1", "e2"]), n=4).search(["p"], seeds=[0])[0]
    assert tie.text == "b2"
    nothing = MajorityVote(Script(p=["", ""]), n=2).search(["p"], seeds=[0])[0]
    assert (nothing.text, nothing.score) == ("", 0.0)


def answer_of(text: str):
    return text[1:] or None


def test_answers_are_read_by_value():
    assert answer_key("x\n#1,000") == answer_key("so 1000.0") == answer_key(r"\boxed{10^3}") == 1000
    assert answer_key("the answer: Paris") == answer_key("The answer: paris ")
    assert answer_key("  ") is None


def test_self_consistency_stops_when_the_vote_is_decided():
    # After 4 equal votes P(lead) = 1 - 1/32 = .96875 > .95: one round of 4.
    engine = Script(p=["a1"] * 12, q=["a1", "b2", "c1", "d2", "e1", "f1", "g1", "h1", *["i1"] * 4])
    results = SelfConsistency(engine, n=12, round_size=4, confidence=0.95).search(["p", "q"], seeds=[0, 0])
    assert [result.expansions for result in results] == [4, 12]
    # By hand for q: (2, 2): .5, (6, 2): .910, (10, 2): .989.
    assert probability_of_lead(6, 2) < 0.95 < probability_of_lead(10, 2)
    share = SelfConsistency(Script(p=["a1"] * 20), n=20, round_size=3, confidence=0.8, rule="share")
    assert share.search(["p"], seeds=[0])[0].expansions == 6


def test_the_probability_of_a_lead_is_that_of_the_posterior():
    grid = torch.linspace(0.5, 1, 200_001, dtype=torch.float64)
    for first, second in ((0, 0), (1, 0), (3, 2), (7, 1), (5, 9)):
        density = grid**first * (1 - grid) ** second
        whole = torch.linspace(0, 1, 400_001, dtype=torch.float64)
        total = torch.trapezoid(whole**first * (1 - whole) ** second, whole)
        assert probability_of_lead(first, second) == pytest.approx(
            float(torch.trapezoid(density, grid) / total), abs=1e-8
        )


def test_budgets_stop_exactly():
    params = SamplingParams(max_new_tokens=4)

    def searched(texts, **budget):
        engine = Script(p=texts)
        strategy = BestOfN(engine, scorer=VerifierScorer(lambda p, c: [len(t) for t in c]), n=9, sampling=params)
        strategy.budget = Budget(**budget)
        return strategy.search(["p"], seeds=[0])[0], engine

    # 10 tokens pay for two at their full length; they leave six, which pay for one more, and so on, never more than 10.
    result, engine = searched(["ab"] * 9, tokens=10)
    assert (result.tokens, result.expansions, result.stopped_by) == (8, 4, None)
    assert engine.limits == [4] * 4
    result, _ = searched(["abcd"] * 9, tokens=12)
    assert (result.tokens, result.stopped_by) == (12, "tokens")
    # Below one sample: one that is cut off.
    result, engine = searched(["abcd"] * 9, tokens=3)
    assert (result.tokens, result.text, result.candidates[0].finish_reason) == (3, "abc", "length")
    result, _ = searched(["ab"] * 9, expansions=3)
    assert (result.expansions, result.stopped_by) == (3, "expansions")

    # Scorer tokens: each candidate has 2 here, without its prompt's.
    strategy = BestOfN(
        Script(p=TEXTS), scorer=ByTable(a1=1, b2=2, c1=9, d3=9, e2=9), n=5, budget=Budget(scorer_tokens=5)
    )
    result = strategy.search(["p"], seeds=[0])[0]
    assert [c.score for c in result.candidates] == [1, 2, None, None, None]
    assert result.text == "b2"


def test_a_truncated_solution_does_not_vote():
    texts = ["1aaaaaaaa2", "1aaaaaaaa3", "1aaaaaaaa4", "1aaaaaaaa5", "9aaaaaaaa2", "9aaaaaaaa2"]
    options = {"n": 6, "sampling": SamplingParams(max_new_tokens=10), "budget": Budget(tokens=43)}
    vote = MajorityVote(Script(p=texts), **options).search(["p"], seeds=[0])[0]
    rounds = SelfConsistency(Script(p=texts), round_size=2, **options).search(["p"], seeds=[0])[0]
    for result in (vote, rounds):
        assert [c.text for c in result.candidates] == texts[:4]
        assert (result.tokens, result.stopped_by) == (40, None)
    # Without a whole one, the truncated one is the result.
    options["budget"] = Budget(tokens=3)
    alone = SelfConsistency(Script(p=texts), round_size=2, **options).search(["p"], seeds=[0])[0]
    assert [c.text for c in alone.candidates] == ["1aa"]


def test_expected_best_is_the_mean_over_all_subsets():
    scores = [0.3, 0.1, 0.9, 0.3, 0.5]
    right = [1.0, 0.0, 1.0, 0.0, 0.0]
    for n in range(1, 6):
        subsets = list(itertools.combinations(range(5), n))
        best = [max(scores[i] for i in s) for s in subsets]
        assert expected_best(scores)[n - 1] == pytest.approx(sum(best) / len(best))
        chosen = []
        for s in subsets:
            top = [i for i in s if scores[i] == max(scores[j] for j in s)]
            chosen.append(sum(right[i] for i in top) / len(top))
        # Ties are broken at random among all samples of that score.
        ties = expected_best(scores, right)[n - 1]
        assert ties == pytest.approx(sum(chosen) / len(chosen), abs=1e-9)


def test_the_divergence_of_best_of_n_is_exact():
    p = [0.2, 0.5, 0.3]
    for n in (1, 2, 5):
        # By enumeration of all samples of n outcomes.
        q = [0.0] * 3
        for outcome in itertools.product(range(3), repeat=n):
            q[max(outcome)] += math.prod(p[i] for i in outcome)
        kl = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        assert best_of_n_kl(n, p) == pytest.approx(kl)
        assert best_of_n_kl(n, p) <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl(16, [1e-4] * 10_000) == pytest.approx(best_of_n_kl(16), abs=1e-2)


def test_best_of_n_samples_its_exact_policy(tmp_path):
    engine = LocalEngine(AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, "llama")), None)
    params = SamplingParams(max_new_tokens=1, temperature=2.0, top_k=4, seed=0)
    scorer = VerifierScorer(lambda prompts, completions, **c: [0.0] * len(completions))
    scorer.score = lambda candidates: Scores([float(c.token_ids[0]) for c in candidates], [0] * len(candidates))
    prompt = [5, 9, 11]
    logits = engine.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    top = logits.topk(4).indices.sort().values
    p = (logits[top] / 2).softmax(0)
    q = p.cumsum(0) ** 3 - (p.cumsum(0) - p) ** 3
    count = 1500
    results = BestOfN(engine, scorer=scorer, n=3, sampling=params).search([prompt] * count, seeds=list(range(count)))
    found = Counter(result.token_ids[0] for result in results)
    statistic = sum((found[int(t)] - count * float(x)) ** 2 / (count * float(x)) for t, x in zip(top, q, strict=True))
    assert statistic < 16.27  # chi-square, 3 degrees of freedom, p = .001
    control = sum((found[int(t)] - count * float(x)) ** 2 / (count * float(x)) for t, x in zip(top, p, strict=True))
    assert control > 16.27  # the policy itself is another distribution
    again = BestOfN(engine, scorer=scorer, n=3, sampling=params).search([[7, 8], prompt], seeds=[9, 4])
    assert again[1].token_ids == results[4].token_ids  # whichever prompts share the batch


def test_one_call_generates(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    char_tokenizer().save_pretrained(folder)
    engine = LocalEngine(AutoModelForCausalLM.from_pretrained(folder), char_tokenizer())
    greedy = SamplingParams(max_new_tokens=5, temperature=0.0)
    expected = [group[0].text for group in engine.generate(["1+1=", "2+2="], 1, greedy)]
    assert generate(str(folder), ["1+1=", "2+2="], max_new_tokens=5, temperature=0.0) == expected
    assert generate(engine, "1+1=", max_new_tokens=5, temperature=0.0) == expected[0]
    chat = generate(engine, [{"role": "user", "content": "1+1="}], max_new_tokens=5, temperature=0.0)
    assert chat == engine.generate(["<user>1+1=\n<assistant>"], 1, greedy)[0][0].text
    vote = {"class_path": "MajorityVote", "init_args": {"n": 3}}
    chosen = generate(engine, "1+1=", strategy=vote, max_new_tokens=4, seed=1)
    assert (
        chosen
        == build_strategy(vote, engine).generate(["1+1="], sampling=SamplingParams(max_new_tokens=4, seed=1))[0][0].text
    )
    with pytest.raises(ValueError, match="without a strategy"):
        generate(engine, "1+1=", scorer="somewhere")
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM"):
        generate(engine.model, "1+1=")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("BestOf", ValueError, "no strategy 'BestOf'; did you mean 'BestOfN'"),
        ({"class_path": "MajorityVote", "init_args": {"m": 3}}, TypeError, "has no option 'm'"),
        ({"class_path": "MajorityVote", "args": {}}, ValueError, "has the key 'args'"),
        ({"class_path": "MajorityVote", "init_args": {"n": 0}}, ValueError, "n is 0"),
        ({"class_path": "MajorityVote", "init_args": {"budget": {"token": 3}}}, TypeError, "did you mean 'tokens'"),
        ("VerifierScorer", ValueError, "no strategy 'VerifierScorer'"),
    ],
)
def test_mistakes_in_configurations_are_errors(spec, error, message):
    with pytest.raises(error, match=message):
        build_strategy(spec, None)


def test_strategies_by_configuration():
    spec = {
        "class_path": "rlhf_lightning.inference.BestOfN",
        "init_args": {"n": 3, "weighted": True, "budget": {"tokens": 50}, "sampling": {"temperature": 0.5}},
    }
    built = build_strategy(spec, None, scorer={"class_path": "TextScorer", "init_args": {"term": "length"}})
    assert (built.n, built.weighted, built.budget.tokens, built.sampling.temperature) == (3, True, 50, 0.5)
    assert built.scorer.term == "length"
