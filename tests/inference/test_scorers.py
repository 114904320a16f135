"""Scorers: each candidate's score is that of the model alone, in tokens or texts, shared prefixes computed once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.inference import (
    LikelihoodScorer,
    LocalEngine,
    ProcessScorer,
    RewardScorer,
    TextScorer,
    VerifierScorer,
    WeightedScorer,
    build_scorer,
)
from rlhf_lightning.inference.strategy import Candidate, Query
from rlhf_lightning.models import ProcessRewardModel, RewardModel, load_causal_lm
from rlhf_lightning.models.process_reward_model import ProcessRewardModelOptions
from rlhf_lightning.models.scoring import prefix_examples
from rlhf_lightning.sequences import Segment

from ..helpers import EOS_ID, char_tokenizer, save_tiny_model
from ..models.test_reward_model import ids, made, naive


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def engine(folder) -> LocalEngine:
    return LocalEngine(AutoModelForCausalLM.from_pretrained(folder), char_tokenizer())


def candidate(query: Query, text: str, finish: str | None = "stop") -> Candidate:
    tokens = (*ids(text), *([EOS_ID] if finish == "stop" else []))
    return Candidate(query, tokens, text, (-0.5,) * len(tokens), finish)


def query(text: str, **columns) -> Query:
    return Query(text, tuple(ids(text)), 0, columns)


ONE, TWO = query("1+1=", answer="2"), query("2+2=", answer="4")
CANDIDATES = [
    candidate(ONE, "12\n3"),
    candidate(ONE, "12\n34"),
    candidate(TWO, "12\n3"),
    candidate(ONE, "12\n", None),
    candidate(ONE, "12\n3", None),
    candidate(ONE, "9", "length"),
    candidate(ONE, "12\n34"),
]


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"num_models": 3}], ids=str)
def test_rewards_are_those_of_the_model_alone(options, folder, engine):
    model = made(folder, options)
    scorer = RewardScorer(model, uncertainty_penalty=0.5 if "num_models" in options else 0.0)
    scorer.attach(engine)
    found = scorer.score(CANDIDATES)
    # Whole solutions end with the end-of-sequence token, also where they were cut off; partial ones do not.
    rows = [(list(c.query.token_ids), [*ids(c.text), *([EOS_ID] if c.finish_reason else [])]) for c in CANDIDATES]
    members_SM = naive(model, folder, rows)
    expected = members_SM.mean(1) - scorer.uncertainty_penalty * members_SM.std(1, correction=0)
    assert found.values == pytest.approx(expected.tolist(), abs=1e-5)
    alone = [scorer.score([c]).values[0] for c in CANDIDATES]
    assert found.values == pytest.approx(alone, abs=1e-6)
    # Counted by hand. Apart: 4 + (5 + 6 + 3 + 4 + 2 + 6) for the first prompt and 4 + 5 for the second. Sharing: of the
    # first 4, then "9" and its end, and "12" once, "\n", the two third tokens and their ends.
    assert sum(found.tokens) == (39 if options.get("pooling") == "mean" else found_by_hand())
    assert sum(scorer.score(CANDIDATES[:1]).tokens) == 9


def found_by_hand() -> int:
    prompt = 4
    nine = 2  # "9", end
    shared = 2  # "12"
    partial = 1  # "\n" as the end of the first partial one
    line = 1  # "\n" before the others
    three_partial = 1  # "3" as the end of the second partial one
    three = 1  # "3" before the others
    ends = 1 + 2  # the end of "12\n3"; "4" and the end of "12\n34"
    return prompt + nine + shared + partial + line + three_partial + three + ends + (4 + 5)


def test_prefixes_become_trees():
    trees = [
        Segment([7], None, (Segment(list(c), [1.0] * len(c)),)) for c in ((1, 2, 3), (1, 2), (1, 2, 4), (5,), (1, 2))
    ]
    examples, numbers = prefix_examples(trees, budget=100)
    assert len(examples) == 1

    def paths(segment, before=()):
        own = (*before, *segment.tokens.tolist())
        return [own] if not segment.children else [p for child in segment.children for p in paths(child, own)]

    assert paths(examples[0].root) == [(7, 1, 2), (7, 1, 2, 3), (7, 1, 2, 4), (7, 5)]
    assert numbers == [[[1, 4], [0], [2], [3]]]
    # A budget splits them, each with its own copy of the prompt.
    examples, numbers = prefix_examples(trees, budget=5)
    assert [paths(example.root) for example in examples] == [[(7, 1, 2)], [(7, 1, 2, 3)], [(7, 1, 2, 4), (7, 5)]]
    assert sorted(place for leaves in numbers for leaf in leaves for place in leaf) == [0, 1, 2, 3, 4]


def test_steps_are_read_as_in_training(folder, engine):
    decoder = load_causal_lm(folder, dtype=torch.float32)
    options = ProcessRewardModelOptions(outcome_head=True, aggregation="product")
    model = ProcessRewardModel(decoder, options, tokenizer=char_tokenizer(), seed=4)
    scorer = ProcessScorer(model)
    scorer.attach(engine)
    found = scorer.score(CANDIDATES)
    expected = model.score([c.query.prompt for c in CANDIDATES], [c.text for c in CANDIDATES])
    assert found.values == pytest.approx(expected, abs=1e-6)
    assert ProcessScorer(model, aggregation="min").model.options.aggregation == "min"

    # A share of the outcome head, read at the last step.
    blended = ProcessScorer(model, aggregation="product", outcome_weight=0.25)
    blended.attach(engine)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.load_state_dict(model.model.state_dict())
    for c, steps, value in zip(CANDIDATES, expected, blended.score(CANDIDATES).values, strict=True):
        tokens = ids(f"{c.query.prompt}{c.text}" + ("" if c.text.endswith("\n") else "\n"))
        state = plain.model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        outcome = float(model.head(state[None])[0, 0, 1].sigmoid())
        assert value == pytest.approx(0.75 * steps + 0.25 * outcome, abs=1e-5)

    # Nothing was written yet: no mistake.
    assert scorer.score([Candidate(ONE, (), "")]).values == [1.0]


def test_another_tokenizer_reads_texts_and_no_partial_solution(folder):
    model = made(folder, {})
    other = char_tokenizer()
    other.add_tokens(["zz"])
    scorer = RewardScorer(model)
    scorer.attach(LocalEngine(AutoModelForCausalLM.from_pretrained(folder), other))
    whole = [c for c in CANDIDATES if c.finish_reason]
    expected = model.score([c.query.prompt for c in whole], [c.text for c in whole])
    assert scorer.score(whole).values == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="a partial solution is scored in the policy's own tokens"):
        scorer.score(CANDIDATES)


def test_verifiers_get_the_columns_they_name():
    def right(prompts, completions, answer):
        return [None if a is None else float(a in c) for a, c in zip(answer, completions, strict=True)]

    given = [candidate(ONE, "it is 2"), candidate(TWO, "it is 2"), candidate(query("?"), "2")]
    assert VerifierScorer(right, no_verdict=-1.0).score(given).values == [1.0, 0.0, -1.0]
    assert VerifierScorer("rlhf_lightning.rewards.exact_answer").score([candidate(ONE, "#2")]).values == [1.0]
    everything = VerifierScorer(lambda prompts, completions, **columns: [sorted(columns)[0] == "answer"])
    assert everything.score([candidate(ONE, "x")]).values == [1.0]
    with pytest.raises(ValueError, match="gave 0 values for 1 solutions"):
        VerifierScorer(lambda prompts, completions: []).score([candidate(ONE, "x")])
    with pytest.raises(ValueError, match="function is a int"):
        VerifierScorer(3)


def test_sums_of_scorers():
    given = [candidate(ONE, "a a a a"), candidate(ONE, "a b c d"), candidate(TWO, "a b c d")]
    assert LikelihoodScorer().score(given).values == [-0.5] * 3
    assert TextScorer("length").score(given).values == [7.0] * 3
    assert TextScorer("repetition").score(given).values == [0.5, 0.0, 0.0]
    assert TextScorer("format", pattern="^a b").score(given).values == [0.0, 1.0, 1.0]
    # Four of seven characters match in order: 1 - 2 * 4 / 14; the other query's solution does not count.
    assert TextScorer("diversity").score(given).values == pytest.approx([3 / 7, 3 / 7, 0.0])
    whole = WeightedScorer([(TextScorer("length"), 0.1), (TextScorer("repetition"), -1.0)])
    assert whole.score(given).values == pytest.approx([0.2, 0.7, 0.7])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: RewardScorer(f), "holds no reward model"),
        (lambda f: RewardScorer(made(f, {}), uncertainty_penalty=1.0), "is no ensemble"),
        (lambda f: RewardScorer(made(f, {}), uncertainty_penalty=-1.0), "uncertainty_penalty is -1.0"),
        (lambda f: ProcessScorer(f), "holds no model that ProcessRewardModule exported"),
        (lambda f: ProcessScorer(f, outcome_weight=2.0), r"outcome_weight is 2.0; it must be in \[0, 1\]"),
        (lambda f: TextScorer("format"), "needs a pattern"),
        (lambda f: TextScorer("lenght"), "did you mean 'length'"),
        (lambda f: WeightedScorer([]), "at least one scorer"),
        (lambda f: build_scorer("RewardScorr"), "no scorer 'RewardScorr'; did you mean 'RewardScorer'"),
        (lambda f: build_scorer({"class_path": "VerifierScorr"}), "did you mean 'VerifierScorer'"),
    ],
)
def test_mistakes_are_errors(build, message, folder):
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_scorers_by_configuration(folder, tmp_path):
    made(folder, {}).save_pretrained(tmp_path / "reward")
    options = ProcessRewardModelOptions()
    decoder = load_causal_lm(folder, dtype=torch.float32)
    ProcessRewardModel(decoder, options, tokenizer=char_tokenizer()).save_pretrained(tmp_path / "process")
    assert isinstance(build_scorer(str(tmp_path / "reward")), RewardScorer)
    assert isinstance(build_scorer(str(tmp_path / "process")), ProcessScorer)
    terms = [["LikelihoodScorer", 1.0], [{"class_path": "TextScorer", "init_args": {"term": "length"}}, -0.1]]
    built = build_scorer({"class_path": "WeightedScorer", "init_args": {"terms": terms}})
    assert [weight for _, weight in built.terms] == [1.0, -0.1]
    with pytest.raises(TypeError, match="scorer ProcessScorer has no option 'aggregaton'; did you mean 'aggregation'"):
        build_scorer({"class_path": "ProcessScorer", "init_args": {"aggregaton": "min"}})
    assert isinstance(RewardModel.from_pretrained(tmp_path / "reward"), RewardModel)
