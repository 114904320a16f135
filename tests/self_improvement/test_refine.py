"""Refinement with a scripted engine: who is asked what, when it stops, and which pairs come out."""

from __future__ import annotations

import pytest

from rlhf_lightning.evaluation.answers import read_prompts
from rlhf_lightning.inference import SamplingParams
from rlhf_lightning.self_improvement import Refine, demonstrations, preference_pairs, refine

from ..evaluation.scripted import ScriptedEngine

SETTINGS = {"critique": "{prompt}|{answer}|{principle}?", "revision": "{prompt}|{answer}|{critique}!"}
SAMPLING = SamplingParams(max_new_tokens=16)
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def exact(prompts, completions, answer):
    """Ten less the distance from the answer."""
    return [
        10.0 - abs(int(text.removeprefix("#")) - int(right)) for text, right in zip(completions, answer, strict=True)
    ]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(
        {
            "1+1=": ["#5"],
            "1+1=|#5|be right?": ["too high"],
            "1+1=|#5|too high!": ["#3"],
            "1+1=|#3|be short?": ["still"],
            "1+1=|#3|still!": ["#2"],
            "2+2=": ["#4"],
        }
    )


def run(engine, **settings):
    examples = read_prompts(ROWS, engine.tokenizer)
    options = Refine(**SETTINGS, principles=["be right", "be short"], **settings)
    return refine(engine, engine.tokenizer, examples, exact, options, sampling=SAMPLING, seed=1, model="sha")


def test_drafts_are_revised_until_they_are_good_enough(engine):
    first, second = run(engine, revisions=3, threshold=10.0)
    assert [(sample.text, sample.score) for sample in first.drafts.samples] == [("#5", 7.0), ("#3", 9.0), ("#2", 10.0)]
    assert first.critiques == ("too high", "still")
    assert first.best is first.last
    assert [sample.text for sample in second.drafts.samples] == ["#4"]  # good at once, and never asked about
    assert [text for text, _ in engine.calls] == [
        *("1+1=", "2+2=", "1+1=|#5|be right?", "1+1=|#5|too high!", "1+1=|#3|be short?", "1+1=|#3|still!"),
    ]
    seeds = [seed for _, row in engine.calls for seed in row]
    assert len(set(seeds)) == len(seeds)
    assert [sample.seed for sample in first.drafts.samples] == [seeds[0], seeds[3], seeds[5]]


def test_drafts_with_different_scores_become_rows(engine):
    refined = [one.drafts for one in run(engine, revisions=3, threshold=10.0)]
    (pair,) = preference_pairs(refined)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["answer"]) == ("1+1=", "#2", "#5", "2")
    assert pair["provenance"]["model"] == "sha"
    assert len(preference_pairs(refined, pairing="all")) == 3
    assert [row["completion"] for row in demonstrations(refined, threshold=10.0)] == ["#2", "#4"]


def test_the_number_of_revisions_is_a_limit(engine):
    first, _ = run(engine, revisions=1, threshold=10.0)
    assert [sample.text for sample in first.drafts.samples] == ["#5", "#3"]


def test_without_a_threshold_every_draft_is_revised(engine):
    engine.answers |= {"2+2=|#4|be right?": ["fine"], "2+2=|#4|fine!": ["#6"]}
    _, second = run(engine, revisions=1)
    assert [(sample.text, sample.score) for sample in second.drafts.samples] == [("#4", 10.0), ("#6", 8.0)]
    assert second.best is not None
    assert second.best.text == "#4"


def test_a_prompt_is_refined_alike_whatever_its_neighbours_are(engine):
    examples = read_prompts(ROWS, engine.tokenizer)
    options = Refine(**SETTINGS, principles=["be right", "be short"], threshold=10.0)
    both = refine(engine, engine.tokenizer, examples, exact, options, sampling=SAMPLING, seed=1)
    alone = refine(engine, engine.tokenizer, examples[1:], exact, options, sampling=SAMPLING, seed=1, first=1)
    assert both[1] == alone[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critique": "{prompt}?"}, r"critique has no \{answer\}: write where it stands"),
        ({"revision": "{prompt} {answer}"}, r"revision has no \{critique\}"),
        ({"critique": "{prompt} {answer} {mood}"}, r"critique has the place \{mood\}; it may have prompt, answer"),
        ({"revisions": 0}, "revisions is 0; it must be a whole number of at least 1"),
        ({"threshold": float("nan")}, "threshold is nan; it must be finite"),
    ],
)
def test_mistakes_in_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Refine(**settings)
