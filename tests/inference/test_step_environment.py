"""Steps: where they end, what a tree of them holds, and how exactly budgets stop a search."""

from __future__ import annotations

import math
import time

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.inference import (
    DVTS,
    MCTS,
    AStar,
    BeamSearch,
    Budget,
    Completion,
    LocalEngine,
    ParticleFilter,
    SamplingParams,
    derive_seed,
)
from tests.helpers import EOS_ID, char_tokenizer, tiny_model

from .toy import PROMPT, Judge, ToyEngine, random_table, step_scores

TABLE = random_table(3, 3, seed=5, early=True)
SCORES = step_scores(TABLE, seed=5)


def lowest(text: str) -> float:
    return min(SCORES(text))


def strategies(engine, judge, **options):
    return {
        "beam": BeamSearch(engine, scorer=judge, width=2, expand=3, **options),
        "lookahead": BeamSearch(engine, scorer=judge, width=2, expand=2, lookahead=2, **options),
        "dvts": DVTS(engine, scorer=judge, width=3, expand=2, **options),
        "mcts": MCTS(engine, scorer=judge, simulations=12, actions=3, **options),
        "mcts_rollouts": MCTS(
            engine, scorer=judge, simulations=8, actions=2, rollouts=2, rollout_weight=0.5, leaves=3, **options
        ),
        "mcts_widening": MCTS(
            engine, scorer=judge, simulations=12, actions=4, widening=(1, 0.5), rule="uct", **options
        ),
        "astar": AStar(engine, scorer=judge, actions=3, **options),
        "particles": ParticleFilter(engine, scorer=judge, particles=5, **options),
    }


NAMES = list(strategies(None, Judge(lowest)))


@pytest.mark.parametrize("name", NAMES)
def test_counted_tokens_are_generated_tokens(name):
    engine, judge = ToyEngine(TABLE), Judge(lowest)
    (result,) = strategies(engine, judge)[name].search([PROMPT], seeds=[3])
    assert result.stopped_by is None
    assert result.tokens == engine.generated > 0
    assert result.scorer_tokens == judge.read > 0
    assert result.best.finish_reason == "stop"
    assert result.score == lowest(result.text) == max(c.score for c in result.candidates if c.score is not None)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_stop_exactly_and_leave_a_result(name):
    full = strategies(ToyEngine(TABLE), Judge(lowest))[name].search([PROMPT], seeds=[3])[0]
    for tokens in range(1, full.tokens):
        engine = ToyEngine(TABLE)
        (result,) = strategies(engine, Judge(lowest), budget=Budget(tokens=tokens))[name].search([PROMPT], seeds=[3])
        assert (result.stopped_by, result.tokens, engine.generated) == ("tokens", tokens, tokens)
        assert result.candidates
        assert result.best.finish_reason in ("stop", "length")
    for limit in (1, 5, 9, full.scorer_tokens - 1):
        judge = Judge(lowest)
        (result,) = strategies(ToyEngine(TABLE), judge, budget=Budget(scorer_tokens=limit))[name].search(
            [PROMPT], seeds=[3]
        )
        assert result.stopped_by == "scorer_tokens"
        assert result.scorer_tokens == judge.read <= limit
        assert result.candidates
    for limit in range(1, full.expansions):
        (result,) = strategies(ToyEngine(TABLE), Judge(lowest), budget=Budget(expansions=limit))[name].search(
            [PROMPT], seeds=[3]
        )
        assert (result.stopped_by, result.expansions) == ("expansions", limit)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_is_large_enough_changes_nothing(name):
    free = strategies(ToyEngine(TABLE), Judge(lowest))[name].search([PROMPT], seeds=[3])[0]
    budget = Budget(tokens=free.tokens, scorer_tokens=free.scorer_tokens, expansions=free.expansions)
    tight = strategies(ToyEngine(TABLE), Judge(lowest), budget=budget, max_step_tokens=4)[name].search(
        [PROMPT], seeds=[3]
    )[0]
    # Reserves are asked for in several rounds, with the same draws.
    assert tight.tree.to_json()["nodes"] == free.tree.to_json()["nodes"]
    assert tight.stopped_by is None


@pytest.mark.parametrize("name", NAMES)
def test_a_result_does_not_depend_on_the_batch(name):
    together = strategies(ToyEngine(TABLE), Judge(lowest))[name].search([PROMPT] * 4, seeds=[7, 8, 7, 9])
    for seed, result in zip([7, 8, 7, 9], together, strict=True):
        (alone,) = strategies(ToyEngine(TABLE), Judge(lowest))[name].search([PROMPT], seeds=[seed])
        assert alone.tree.to_json() == result.tree.to_json()
        assert (alone.tokens, alone.scorer_tokens) == (result.tokens, result.scorer_tokens)


def test_seconds_stop_between_rounds():
    class Slow(ToyEngine):
        def generate(self, *arguments, **options):
            time.sleep(0.02)
            return super().generate(*arguments, **options)

    strategy = BeamSearch(Slow(TABLE), scorer=Judge(lowest), budget=Budget(seconds=0.001))
    (result,) = strategy.search([PROMPT], seeds=[0])
    assert result.stopped_by == "seconds"
    assert result.expansions == 1
    assert result.score is not None


def test_priors_and_multiplicities_are_those_of_the_draws():
    engine = ToyEngine(TABLE)
    (result,) = BeamSearch(engine, scorer=Judge(lowest), width=1, expand=40).search([PROMPT], seeds=[1])
    root = result.tree.root
    # By hand: the draws again, each with its own seed.
    steps = [engine._choose("", SamplingParams(), derive_seed(1, number), 0) for number in range(40)]
    assert {child.text: child.multiplicity for child in root.children} == {
        step: [s for s, _ in steps].count(step) for step, _ in steps
    }
    total = sum(probability for _, probability in steps)
    for child in root.children:
        mass = sum(probability for step, probability in steps if step == child.text)
        assert child.prior == pytest.approx(mass / total, abs=1e-12)
        assert child.path == (next(n for n, (step, _) in enumerate(steps) if step == child.text),)


def test_without_probabilities_priors_are_shares_of_draws():
    class Silent(ToyEngine):
        def generate(self, *arguments, **options):
            groups = super().generate(*arguments, **options)
            return [[Completion(c.token_ids, c.text, [], c.finish_reason) for c in group] for group in groups]

    (result,) = BeamSearch(Silent(TABLE), scorer=Judge(lowest), width=1, expand=40).search([PROMPT], seeds=[1])
    for child in result.tree.root.children:
        assert child.prior == pytest.approx(child.multiplicity / 40, abs=1e-12)
    with pytest.raises(ValueError, match="Silent reports no log-probabilities"):
        AStar(Silent(TABLE), policy_weight=1.0, heuristic_weight=0.0).search([PROMPT], seeds=[1])


class Script:
    """An engine that gives a list of completions, one per call, as token ids."""

    def __init__(self, tokenizer, *completions):
        self.tokenizer, self.end_token_ids = tokenizer, frozenset({EOS_ID})
        self.completions, self.prompts, self.settings = list(completions), [], []

    def encode(self, prompt):
        return tuple(self.tokenizer(prompt)["input_ids"])

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None, limits=None):
        self.prompts += [list(prompt) for prompt in prompts]
        self.settings += [(sampling, limit) for limit in limits]
        found = [self.completions.pop(0) for _ in prompts]
        return [[Completion(ids, "", [-1.0] * len(ids), reason)] for ids, reason in found]


def wide_tokenizer():
    """Characters, and one token that holds a line's end and what follows it."""
    vocab = {token: n for n, token in enumerate(("<pad>", "<eos>", "<unk>", "\n", "1", "2", "#", "?", "\n2"))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("\n", "2")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def test_steps_keep_their_tokens_wherever_these_cut_the_text():
    # "1", then a token that is the line's end and the next step's "2": encoding the text again would split it.
    engine = Script(wide_tokenizer(), ([4, 8], "stop"), ([4, 3], "stop"), ([6, 5, EOS_ID], "stop"))
    (result,) = BeamSearch(engine, scorer=Judge(len), width=1, expand=1).search(["?"], seeds=[0])
    assert result.token_ids == (4, 8, 4, 3, 6, 5, EOS_ID)
    assert result.text == "1\n21\n#2"
    assert engine.prompts == [[7], [7, 4, 8], [7, 4, 8, 4, 3]]
    assert [node.text for node in result.tree.nodes()] == ["", "1\n2", "1\n", "#2"]
    assert result.best.logprobs == (-1.0,) * 7


@pytest.mark.parametrize(
    ("options", "completions", "text", "reason"),
    [
        ({}, [([4, 3], "stop"), ([4, EOS_ID], "stop")], "1\n1", "stop"),
        # A stop string of the settings, begun in one step and ended in the next; the text ends before it.
        ({"sampling": SamplingParams(stop=("\n\n",))}, [([4, 3], "stop"), ([3], "stop")], "1", "stop"),
        ({"sampling": SamplingParams(stop_token_ids=(6,))}, [([4, 3], "stop"), ([4, 6], "stop")], "1\n1#", "stop"),
        ({"answer_pattern": r"#\d"}, [([4, 3], "stop"), ([6, 4, 3], "stop")], "1\n#1\n", "stop"),
        # A step that was cut off may yet continue: its text is not matched.
        (
            {"answer_pattern": r"#\d", "max_step_tokens": 2},
            [([6, 4], "length"), ([5, 3], "stop")],
            "#12\n",
            "stop",
        ),
        ({"sampling": SamplingParams(max_new_tokens=4)}, [([4, 3], "stop"), ([4, 4], "length")], "1\n11", "length"),
        # Fewer tokens than asked for: the model has no position left.
        ({}, [([4, 3], "stop"), ([4], "length")], "1\n1", "length"),
    ],
)
def test_how_solutions_end(options, completions, text, reason):
    engine = Script(wide_tokenizer(), *completions)
    (result,) = BeamSearch(engine, scorer=Judge(len), width=1, expand=1, **options).search(["?"], seeds=[0])
    assert not engine.completions
    assert (result.text, result.best.finish_reason, result.stopped_by) == (text, reason, None)


def test_limits_and_minimum_are_of_the_whole_solution():
    engine = Script(wide_tokenizer(), ([4, 4, 3], "stop"), ([4, 3], "stop"), ([4, EOS_ID], "stop"))
    sampling = SamplingParams(max_new_tokens=7, min_new_tokens=4)
    BeamSearch(engine, scorer=Judge(len), width=1, expand=1, max_step_tokens=5, sampling=sampling).search(
        ["?"], seeds=[0]
    )
    assert [limit for _, limit in engine.settings] == [5, 4, 2]
    assert [settings.min_new_tokens for settings, _ in engine.settings] == [4, 1, 0]
    assert engine.settings[0][0].stop == ("\n",)


def engine_and_sampling():
    return LocalEngine(tiny_model("llama"), char_tokenizer()), SamplingParams(max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "lengths"), [({"step_separator": "&&"}, {12}), ({"step_separator": "&&", "max_step_tokens": 5}, {2, 5})]
)
def test_without_a_separator_steps_are_as_long_as_they_may_be(options, lengths):
    engine, sampling = engine_and_sampling()
    judge = Judge(lambda text: -text.count("e"))
    (result,) = BeamSearch(engine, scorer=judge, width=2, expand=2, sampling=sampling, **options).search(
        ["1+2=?"], seeds=[4]
    )
    ended = [node for node in result.tree.nodes() if node.finish_reason == "stop"]
    assert {len(node.token_ids) for node in result.tree.nodes() if node.parent and node not in ended} == lengths


def test_searches_of_a_model_are_the_same_alone_and_together():
    engine, sampling = engine_and_sampling()
    judge = Judge(lambda text: 1 / (1 + text.count("e") + len(text) / 7))
    prompts = ["1+2=?", "9", "abc", "1+2=?"]
    for name, strategy in strategies(engine, judge, sampling=sampling, step_separator=None, max_step_tokens=4).items():
        together = strategy.search(prompts, seeds=[1, 2, 3, 4])
        for number in (1, 3):
            (alone,) = strategy.search([prompts[number]], seeds=[number + 1])
            found, expected = together[number].tree.to_json(), alone.tree.to_json()
            for row, other in zip(found["nodes"], expected["nodes"], strict=True):
                assert row["token_ids"] == other["token_ids"], name
                assert row["visits"] == other["visits"], name
                assert row["score"] == other["score"], name


def test_bad_options_are_refused():
    engine = ToyEngine(TABLE)
    for options, message in (
        ({"step_separator": ""}, "step_separator is ''"),
        ({"step_separator": None}, "without step_separator nothing ends a step"),
        ({"max_step_tokens": 0}, "max_step_tokens is 0"),
        ({"answer_pattern": "("}, r"answer_pattern is '\(', which is no regular expression"),
        ({"width": 0}, "width is 0"),
        ({"lookahead": -1}, "lookahead is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            BeamSearch(engine, scorer=Judge(lowest), **options)
    with pytest.raises(ValueError, match="BeamSearch needs a scorer"):
        BeamSearch(engine).search([PROMPT], seeds=[0])
    with pytest.raises(ValueError, match="scored a solution of prompt 0 with nan"):
        BeamSearch(engine, scorer=Judge(lambda text: math.nan)).search([PROMPT], seeds=[0])
    model, sampling = engine_and_sampling()
    with pytest.raises(ValueError, match="a prompt of 200 tokens leaves no room in the model's 128 positions"):
        BeamSearch(model, scorer=Judge(len), sampling=sampling).search(["1" * 200], seeds=[0])
