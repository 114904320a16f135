"""Telemetry of engines and strategies, while they work and afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.inference import BestOfN, Completion, LocalEngine, SamplingParams, VerifierScorer
from rlhf_lightning.inference.completion import Request
from rlhf_lightning.inference.specs import scorer_spec, strategy_spec
from rlhf_lightning.inference.strategy import Scores
from rlhf_lightning.inference.telemetry import Telemetry

from ..generation.verifiers import letters
from ..helpers import char_tokenizer, tiny_model

PARAMS = SamplingParams(max_new_tokens=5, top_k=20, seed=1)


def plain(groups: list[list[Completion]]) -> list[list[Any]]:
    """Samples without log-probs, which other caches round differently."""
    return [[(sample.token_ids, sample.text, sample.finish_reason) for sample in group] for group in groups]


def engine(**options: Any) -> LocalEngine:
    return LocalEngine(tiny_model("llama"), char_tokenizer(), **options)


@pytest.mark.parametrize("options", [{}, {"cache": "static"}, {"cache": "paged"}, {"speculation": "ngram"}], ids=str)
def test_a_watcher_sees_every_token(options):
    seen: dict[tuple[int, int], list[list[int]]] = {}
    ended = []

    def watch(request: Request) -> None:
        seen.setdefault(request.position, []).append(list(request.token_ids))
        if request.finish_reason is not None:
            ended.append((request.position, request.completion()))

    found = engine(**options).generate(["1+1=", "22"], 2, PARAMS, watch=watch)
    assert plain(found) == plain(engine().generate(["1+1=", "22"], 2, PARAMS))
    for row, group in enumerate(found):
        for column, sample in enumerate(group):
            tokens = sample.token_ids
            assert seen[row, column] == [tokens[: n + 1] for n in range(len(tokens))]
            assert dict(ended)[row, column] == sample


def test_what_a_watcher_raises_ends_the_call():
    def watch(request: Request) -> None:
        if len(request.token_ids) == 3:
            raise KeyError("enough")

    paged = engine(cache="paged")
    with pytest.raises(KeyError, match="enough"):
        paged.generate(["1+1="], 2, PARAMS, watch=watch)
    assert plain(paged.generate(["1+1="], 2, PARAMS)) == plain(engine().generate(["1+1="], 2, PARAMS))


def test_counts_by_hand():
    paged = engine(cache="paged")
    prompt = "1234567890123456789"  # one page of 16 tokens and 3 more
    begun = Telemetry.of(paged)
    first = paged.generate([prompt, "7"], 2, PARAMS)
    between = Telemetry.of(paged)
    second = paged.generate([prompt + "5"], 1, PARAMS)
    found = Telemetry.of(paged)
    assert begun == Telemetry()
    assert (between.prompt_tokens, between.reused_tokens) == (19 + 1, 0)
    assert between.new_tokens == sum(len(sample.token_ids) for group in first for sample in group)
    later = found.since(between)
    assert (later.prompt_tokens, later.reused_tokens, later.cache_hit_rate) == (20, 16, 0.8)
    assert later.new_tokens == len(second[0][0].token_ids)
    assert later.prefill_seconds > 0 < later.decode_seconds
    assert between.plus(later).new_tokens == found.new_tokens
    metrics = later.metrics(batches=2)
    assert metrics["generation/prompt_tokens"] == 10
    assert metrics["generation/cache_hit_rate"] == 0.8
    assert metrics.keys() == {
        *("generation/prompt_tokens", "generation/new_tokens", "time/prefill", "time/decode"),
        "generation/cache_hit_rate",
    }
    assert Telemetry().metrics() == {}


def test_drafts_are_counted():
    guessing = engine(speculation="ngram")
    guessing.generate(["1212121212121212"], 1, SamplingParams(max_new_tokens=30, temperature=0.0))
    found, told = Telemetry.of(guessing), guessing.statistics()["speculation"]
    assert (found.drafted, found.accepted) == (told["drafted"], told["accepted"])
    assert found.acceptance_rate == told["acceptance_rate"]


def test_models_that_loop_are_counted(monkeypatch):
    from rlhf_lightning.inference.decoder import Decoder

    monkeypatch.setattr(Decoder, "agrees", lambda self: False)
    slow = engine()
    with pytest.warns(UserWarning, match="generating slowly"):
        found = slow.generate(["1+1=", "1+1=", "22"], 1, PARAMS)
    told = Telemetry.of(slow)
    assert told.prompt_tokens == 4 + 2
    assert told.new_tokens == sum(len(group[0].token_ids) for group in found)
    assert told.decode_seconds > 0


class Costly:
    """Reads three tokens of each candidate."""

    def score(self, candidates: Any) -> Scores:
        return Scores([float(len(c.text)) for c in candidates], [3] * len(candidates))


def test_searches_are_counted_and_told():
    strategy = BestOfN(engine(), scorer=Costly(), n=3, sampling=PARAMS)
    told = []
    found = strategy.search(["1+1=", "22"], [0, 1], watch=lambda number, result: told.append((number, result)))
    assert sorted(number for number, _ in told) == [0, 1]
    assert all(found[number] is result for number, result in told)
    telemetry = Telemetry.of(strategy)
    assert telemetry.new_tokens == sum(result.tokens for result in found)
    assert telemetry.scorer_tokens == sum(result.scorer_tokens for result in found) == 18
    assert telemetry.expansions == 6
    assert telemetry.scorer_calls == 1  # both prompts together
    assert telemetry.score_seconds > 0
    assert strategy.statistics()["search"]["searches"] == 2

    # A strategy of strategies: what each of them spends counts once.
    outer = BestOfN(strategy, scorer=Costly(), n=2, sampling=PARAMS)
    outer.search(["1+1="], [0])
    both = Telemetry.of(outer).since(telemetry)
    assert both.expansions == 2 + 2 * 3
    assert both.scorer_tokens == 3 * 2 + 3 * 6
    assert both.scorer_calls == 2


def test_tokens_of_a_prompt_may_be_given():
    seen: list[Any] = []

    def remember(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(prompts)
        return [float(len(text)) for text in completions]

    strategy = BestOfN(engine(), scorer=VerifierScorer(remember), n=2, sampling=PARAMS)
    messages = [{"role": "user", "content": "1+1="}]
    ids = char_tokenizer()("<user>1+1=\n<assistant>")["input_ids"]
    given = strategy.search([messages], [3], encoded=[ids])[0]
    assert seen == [messages] * 2
    assert given.text == strategy.search([ids], [3])[0].text
    with pytest.raises(ValueError, match="prompts has 1 entries and encoded 2"):
        strategy.search([messages], [3], encoded=[ids, ids])


# Specs.


@pytest.mark.parametrize("name", ["BestOfN", "best_of_n", "best-of-n", "bestofn", {"class_path": "best_of_n"}])
def test_names_in_any_spelling(name):
    spec = strategy_spec(name, "LikelihoodScorer", {"n": 2})
    assert spec["class_path"] == "BestOfN"
    assert spec["init_args"] == {"n": 2, "scorer": {"class_path": "LikelihoodScorer", "init_args": {}}}


def test_a_scorer_by_what_is_there(tmp_path):
    path = f"{letters.__module__}.letters"
    assert scorer_spec(path) == {"class_path": "VerifierScorer", "init_args": {"function": path}}
    with pytest.raises(ValueError, match="has nothing called 'lettres'"):
        scorer_spec(f"{letters.__module__}.lettres")
    (tmp_path / "model").mkdir()
    folder = str(tmp_path / "model")
    spec = scorer_spec(folder, {"micro_batch_tokens": 9})
    assert spec == {"class_path": "RewardScorer", "init_args": {"model": folder, "micro_batch_tokens": 9}}
    terms = {"class_path": "weighted_scorer", "init_args": {"terms": [["LikelihoodScorer", 1.0], [path, 0.5]]}}
    inner = [term["class_path"] for term, _ in scorer_spec(terms)["init_args"]["terms"]]
    assert inner == ["LikelihoodScorer", "VerifierScorer"]


def test_options_of_groups_are_overridden_one_by_one():
    spec = {"class_path": "BestOfN", "init_args": {"n": 3, "budget": {"tokens": 9, "expansions": 2}}}
    found = strategy_spec(spec, "LikelihoodScorer", {"budget": {"tokens": 7}})
    assert found["init_args"]["budget"] == {"tokens": 7, "expansions": 2}
    assert spec["init_args"]["budget"] == {"tokens": 9, "expansions": 2}
    with pytest.raises(TypeError, match="budget Budget has no option 'token'; did you mean 'tokens'"):
        strategy_spec(spec, "LikelihoodScorer", {"budget": {"token": 7}})
