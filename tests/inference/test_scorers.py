"""Scorers: each candidate's score is that of the model alone, in tokens or texts, shared prefixes computed once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from rlhf_lightning.inference import (
    BeamSearch,
    BestOfN,
    Budget,
    JudgeScorer,
    LikelihoodScorer,
    LocalEngine,
    ProcessScorer,
    RewardScorer,
    SamplingParams,
    TextScorer,
    VerifierScorer,
    WeightedScorer,
    build_scorer,
)
from rlhf_lightning.inference.strategy import Candidate, Query, Scores
from rlhf_lightning.models import ProcessRewardModel, RewardModel, load_causal_lm
from rlhf_lightning.models.process_reward_options import ProcessRewardModelOptions
from rlhf_lightning.models.scoring import prefix_examples
from rlhf_lightning.sequences import Segment

from ..helpers import EOS_ID, char_tokenizer, save_tiny_model
from ..models.test_reward_model import ids, made, naive
from .served import completion, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def engine(folder) -> LocalEngine:
    return LocalEngine(AutoModelForCausalLM.from_pretrained(folder), char_tokenizer())


def candidate(query: Query, text: str, finish: str | None = "stop") -> Candidate:
    tokens = (*ids(text), *([EOS_ID] if finish == "stop" else []))
    return Candidate(query, tokens, text, (-0.5,) * len(tokens), finish)


class Silent:
    """A scorer that does not tell what it costs."""

    def score(self, candidates):
        return Scores([0.0] * len(candidates), [0] * len(candidates))


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

    # Scorers that share a model have rules of their own.
    lowest, last = ProcessScorer(model, aggregation="min"), ProcessScorer(model, aggregation="last")
    steps = model.score_steps([c.query.prompt for c in CANDIDATES], [c.text for c in CANDIDATES])
    assert any(min(values) != values[-1] for values in steps)
    assert lowest.score(CANDIDATES).values == pytest.approx([min(values) for values in steps], abs=1e-6)
    assert last.score(CANDIDATES).values == pytest.approx([values[-1] for values in steps], abs=1e-6)
    assert model.options.aggregation == "product"
    assert scorer.score(CANDIDATES).values == pytest.approx(expected, abs=1e-6)

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


def test_a_judge_on_a_server_scores():
    def answer(path, body, number):
        # The request decides, so that the order of requests does not matter.
        asked = body["prompt"]
        return completion("Yes." if "it is 2" in asked else "no" if "it is 3" in asked else "maybe")

    given = [candidate(ONE, "it is 2"), candidate(ONE, "it is 3"), candidate(ONE, "hm")]
    with serve(answer) as served:
        judge = {
            "class_path": "rlhf_lightning.rewards.EngineJudge",
            "init_args": {
                "engine": {
                    "class_path": "rlhf_lightning.inference.RemoteEngine",
                    "init_args": {"url": served.url, "model": "m"},
                }
            },
        }
        question = "{prompt} {completion}?"
        spec = {"class_path": "JudgeScorer", "init_args": {"judge": judge, "question": question, "no_verdict": 0.25}}
        scorer = build_scorer(spec)
        with pytest.warns(UserWarning, match="the judge has failed on a solution, which gets 0.25: the judge wrote"):
            found = scorer.score(given)
        assert sorted(body["prompt"] for body in served.bodies) == ["1+1= hm?", "1+1= it is 2?", "1+1= it is 3?"]
    assert (found.values, found.tokens) == ([1.0, 0.0, 0.25], [0, 0, 0])
    chat = Query([{"role": "user", "content": "hi"}], (5,), 0)
    seen = []
    JudgeScorer(lambda questions: seen.extend(questions) or [0.5], question="{prompt}|{completion}").score(
        [Candidate(chat, (), "yes")]
    )
    assert seen == ["user: hi|yes"]
    with pytest.raises(ValueError, match="the prompt was given as token ids"):
        scorer.score([Candidate(Query([5, 6], (5, 6), 0), (), "yes")])
    with pytest.raises(ValueError, match="the judge gave 1 values for 3 solutions"):
        JudgeScorer(lambda questions: [1.0]).score(given)


def test_any_sequence_classifier_scores(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        id2label={0: "bad", 1: "good"},
        pad_token_id=0,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    scorer = RewardScorer(str(tmp_path), label="good")
    found = scorer.score(CANDIDATES)
    for c, value in zip(CANDIDATES, found.values, strict=True):
        with torch.no_grad():
            logits = model(**char_tokenizer()(c.query.prompt, c.text, return_tensors="pt")).logits[0]
        assert value == pytest.approx(float(logits[1]), abs=1e-5)
    assert found.tokens == [scorer.cost(c) for c in CANDIDATES] == [4 + len(c.text) for c in CANDIDATES]
    with pytest.raises(ValueError, match="has the outputs bad, good: name one with label="):
        RewardScorer(str(tmp_path))


def test_an_account_does_not_depend_on_the_batch(folder, engine):
    """Two equal prompts pay what each pays alone, and a budget of scorer tokens holds to the token."""
    options = {"scorer": RewardScorer(made(folder, {})), "n": 3, "sampling": SamplingParams(max_new_tokens=4)}
    together = BestOfN(engine, **options).search(["1+1=", "1+1="], seeds=[3, 3])
    alone = BestOfN(engine, **options).search(["1+1="], seeds=[3])
    assert [result.scorer_tokens for result in together] == [alone[0].scorer_tokens] * 2
    # Cut off, a solution of four tokens is read with its end: 4 + 4 + 1 tokens.
    for limit, scored in ((8, 0), (9, 1), (17, 1), (18, 2)):
        budget = Budget(scorer_tokens=limit)
        result = BestOfN(engine, **{**options, "budget": budget}).search(["1+1="], seeds=[4])[0]
        assert [len(c.token_ids) for c in result.candidates] == [4, 4, 4]
        assert sum(c.score is not None for c in result.candidates) == scored
        assert result.scorer_tokens <= limit


@pytest.mark.parametrize(
    ("scorer", "costs"),
    [
        (VerifierScorer(lambda prompts, completions: [0.0] * len(prompts)), 0),
        (JudgeScorer(lambda questions: [0.0] * len(questions)), 0),
        (LikelihoodScorer(), 0),
        (TextScorer("length"), 0),
        (WeightedScorer([(TextScorer("length"), 1.0), (Silent(), 1.0)]), 9),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_reads_no_tokens_costs_none(scorer, costs):
    assert scorer.cost(CANDIDATES[0]) == costs


def test_both_scorers_of_a_step_search_meet_the_engine(engine):
    class Noted:
        def attach(self, engine):
            self.engine = engine

        def score(self, candidates):
            return Scores([0.0] * len(candidates), [0] * len(candidates))

    whole, partial = Noted(), Noted()
    BeamSearch(engine, scorer=whole, value=partial)
    assert whole.engine is partial.engine is engine


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
        (lambda f: RewardScorer(made(f, {}), label="helpful"), "label is 'helpful', and the model is loaded already"),
        (lambda f: RewardScorer(made(f, {}), dtype="bfloat16"), "dtype is 'bfloat16', and the model is loaded already"),
        (lambda f: RewardScorer(f, dtype="int8"), "dtype is 'int8'"),
        (lambda f: ProcessScorer(f, micro_batch_tokens=0), "micro_batch_tokens is 0"),
        (lambda f: ProcessScorer(f, aggregation="sum"), "aggregation is 'sum'"),
        (lambda f: ProcessScorer(f, outcome_weight=2.0), r"outcome_weight is 2.0; it must be in \[0, 1\]"),
        (lambda f: TextScorer("format"), "needs a pattern"),
        (lambda f: TextScorer("lenght"), "did you mean 'length'"),
        (lambda f: WeightedScorer([]), "at least one scorer"),
        (lambda f: JudgeScorer("no function"), "judge is a str: give a function of questions"),
        (lambda f: JudgeScorer(len, question="{answer}"), "question has the wrong field 'answer': its fields are"),
        (lambda f: build_scorer({"class_path": "JudgeScorer", "init_args": {"judge": {"a": 1}}}), "judge has the keys"),
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
