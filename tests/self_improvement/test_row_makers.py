"""Rows of scored samples: against naive loops, and SPIN's loss against its formula."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
import torch

from rlhf_lightning.data.formats import demonstration, preference, unpaired
from rlhf_lightning.losses.preference import preference_loss
from rlhf_lightning.self_improvement import (
    Sample,
    ScoredPrompt,
    demonstrations,
    hinted_rows,
    mix_rows,
    preference_pairs,
    scored_rows,
    spin_pairs,
    unpaired_rows,
    without_hints,
)


def prompt(*drawn: tuple[str, float | None], text: str = "1+1=?", **columns) -> ScoredPrompt:
    samples = tuple(Sample(answer, score, seed) for seed, (answer, score) in enumerate(drawn))
    return ScoredPrompt(text, samples, {"answer": "2", **columns}, "rows:7", "sha")


def random_prompts(seed: int) -> list[ScoredPrompt]:
    random = Random(seed)
    found = []
    for number in range(20):
        samples = tuple(
            Sample(
                random.choice(["", "a", "b", "c", "d"]),
                random.choice([None, math.nan, 0.0, 0.5, 1.0]),
                seed=place,
                ended=random.random() < 0.8,
            )
            for place in range(6)
        )
        found.append(ScoredPrompt(f"prompt {number}", samples, {"answer": "2"}, f"rows:{number}", "sha"))
    return found


def usable(scored: ScoredPrompt) -> list[Sample]:
    return [s for s in scored.samples if s.ended and s.text != "" and s.score in (0.0, 0.5, 1.0)]


def test_the_best_of_each_prompt():
    rows = demonstrations([prompt(("a", 0.2), ("b", 0.9), ("c", 0.9)), prompt(("d", -3.0), text="2+2=?")])
    assert rows == [
        {
            "prompt": "1+1=?",
            "completion": "b",
            "answer": "2",
            "provenance": {"row_id": "rows:7", "model": "sha", "seed": 1, "score": 0.9},
        },
        {
            "prompt": "2+2=?",
            "completion": "d",
            "answer": "2",
            "provenance": {"row_id": "rows:7", "model": "sha", "seed": 0, "score": -3.0},
        },
    ]


@pytest.mark.parametrize("keep", [1, 2, None])
@pytest.mark.parametrize("threshold", [None, 0.5, 2.0])
def test_right_samples_are_those_of_a_naive_loop(keep, threshold):
    prompts = random_prompts(seed=0)
    expected = []
    for scored in prompts:
        kept: list[str] = []
        for level in (1.0, 0.5, 0.0):
            for sample in usable(scored):
                first = next(s for s in usable(scored) if s.text == sample.text)
                enough = threshold is None or level >= threshold
                if first is sample and sample.score == level and enough and (keep is None or len(kept) < keep):
                    kept.append(sample.text)
        expected += [(scored.prompt, text) for text in kept]
    rows = demonstrations(prompts, threshold=threshold, keep=keep)
    assert [(row["prompt"], row["completion"]) for row in rows] == expected
    assert bool(rows) == (threshold != 2.0)


def test_all_pairs_are_those_of_a_naive_loop():
    prompts = random_prompts(seed=1)
    expected = set()
    for scored in prompts:
        firsts = {s.text: s for s in reversed(usable(scored))}.values()
        for one, other in itertools.permutations(firsts, 2):
            if one.score > other.score + 0.25:
                expected.add((scored.prompt, one.text, other.text))
    rows = preference_pairs(prompts, pairing="all", margin=0.25)
    assert len(rows) == len(expected) > 5
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in rows} == expected


def test_a_pair_tells_where_both_come_from():
    (row,) = preference_pairs([prompt(("a", 0.0), ("b", 1.0), ("c", 0.0), chosen="of the source")])
    assert row == {
        "prompt": "1+1=?",
        "chosen": "b",
        "rejected": "a",
        "answer": "2",
        "provenance": {
            "row_id": "rows:7",
            "model": "sha",
            "chosen": {"seed": 1, "score": 1.0},
            "rejected": {"seed": 0, "score": 0.0},
        },
    }


def test_no_pair_of_equal_scores_or_texts_or_of_a_difference_within_the_margin():
    equal = prompt(("a", 1.0), ("b", 1.0))
    noisy = prompt(("a", 1.0), ("a", 0.0))
    close = prompt(("a", 1.0), ("b", 0.75))
    assert preference_pairs([equal, noisy]) == []
    assert preference_pairs([close], margin=0.25) == []
    assert len(preference_pairs([close], margin=0.2)) == 1
    with pytest.raises(ValueError, match="pairing is 'worst'; it must be one of best_worst, all"):
        preference_pairs([equal], pairing="worst")
    with pytest.raises(ValueError, match="margin is -1"):
        preference_pairs([equal], margin=-1)


def test_labels_are_scores_above_the_threshold():
    rows = unpaired_rows([prompt(("a", 0.4), ("b", 0.5), ("b", 0.1), ("c", None))], threshold=0.5)
    assert [(row["completion"], row["label"]) for row in rows] == [("a", False), ("b", True)]


def test_every_sample_has_a_row_with_its_score():
    scored = ScoredPrompt("p", (Sample("a", 1.0, 5), Sample("", None, 6, ended=False)), {"score": 9.0})
    rows = scored_rows([scored])
    assert [(r["completion"], r["score"], r["ended"], r["provenance"]["seed"]) for r in rows] == [
        ("a", 1.0, True, 5),
        ("", None, False, 6),
    ]


def test_spin_compares_demonstrations_with_samples():
    drawn = (("#3", None), ("right", None), ("#3", None), ("#4", 1.0))
    rows = spin_pairs([prompt(*drawn, completion="right")])
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("right", "#3"), ("right", "#4")]
    assert "completion" not in rows[0]
    assert rows[1]["provenance"]["rejected"] == {"seed": 3, "score": 1.0}
    with pytest.raises(
        ValueError, match=r"the prompt 'rows:7' has no text in the column 'completion' \(it has answer\)"
    ):
        spin_pairs([prompt(("a", None))])


def test_the_loss_of_spin_is_that_of_dpo():
    """SPIN's objective, written out: l(lambda (log-ratio of the demonstration - log-ratio of the sample)), logistic."""
    torch.manual_seed(0)
    real, own, real_before, own_before = torch.randn(4, 6, dtype=torch.float64)
    strength = 0.3
    naive = [
        math.log(1 + math.exp(-strength * ((real[n] - real_before[n]) - (own[n] - own_before[n])))) for n in range(6)
    ]
    ones = torch.ones(6, dtype=torch.float64)
    losses = preference_loss(
        real, own, real_before, own_before, chosen_lengths=ones, rejected_lengths=ones, beta=strength
    )
    assert torch.allclose(losses, torch.tensor(naive, dtype=torch.float64), atol=1e-12)


def test_prompts_that_nothing_solved_get_a_hint():
    solved, unsolved = prompt(("#2", 1.0)), prompt(("#3", 0.0), ("#2", None), text="{answer}?")
    rows = hinted_rows([solved, unsolved], "{prompt} (it is {answer})", threshold=0.5)
    assert [(row["prompt"], row["answer"]) for row in rows] == [("{answer}? (it is 2)", "2")]

    # Its samples are demonstrations of the prompt as it was.
    fields = dict(rows[0])
    again = ScoredPrompt(fields.pop("prompt"), (Sample("#2", 1.0, 9),), fields, "rows:1", "sha")
    (row,) = demonstrations(without_hints([again]))
    assert (row["prompt"], row["completion"], row["provenance"]["row_id"]) == ("{answer}?", "#2", "rows:7")
    assert "unhinted" not in row

    chat = ScoredPrompt([{"role": "user", "content": "1+1=?"}], (Sample("#3", 0.0),), {"answer": "2"})
    (row,) = hinted_rows([chat], "{prompt} It is {answer}.", threshold=0.5)
    assert row["prompt"] == [{"role": "user", "content": "1+1=? It is 2."}]
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        hinted_rows([unsolved], "It is {answer}", threshold=0.5)
    with pytest.raises(ValueError, match=r"has the place \{solution\}; known are answer, prompt"):
        hinted_rows([unsolved], "{prompt} {solution}", threshold=0.5)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.2, 5), (0.5, 20), (0.9, 30)])
def test_seed_rows_are_a_share(ratio, expected):
    rows = [{"prompt": str(n), "completion": "x", "provenance": {"seed": n}} for n in range(20)]
    seeds = [{"prompt": f"s{n}", "completion": "y"} for n in range(30)]
    mixed = mix_rows(rows, seeds, ratio=ratio, seed=3)
    added = mixed[20:]
    assert mixed[:20] == rows
    assert len(added) == expected
    assert len({row["prompt"] for row in added}) == expected  # none twice
    assert all(row["prompt"] == f"s{row['provenance']['seed_row']}" for row in added)
    assert mixed == mix_rows(rows, seeds, ratio=ratio, seed=3)
    if 0 < expected < 30:
        assert added != mix_rows(rows, seeds, ratio=ratio, seed=4)[20:]


def test_seed_rows_of_another_kind_are_refused():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    with pytest.raises(ValueError, match="seed row 0 has no 'chosen', which the rows it is mixed with have"):
        mix_rows(rows, [{"prompt": "p", "completion": "a"}], ratio=0.5)
    with pytest.raises(ValueError, match=r"ratio is 1.0; it must be in \[0, 1\)"):
        mix_rows(rows, rows, ratio=1.0)


def test_what_a_prompts_own_row_says_of_its_answers_is_not_said_of_the_samples():
    pair = {"chosen_response": "2", "rejected_response": "3", "score_chosen": 1.0, "score_rejected": 9.0, "margin": -8}
    rated = {"response": "3", "kto_tag": False, "ratings": {"help": 1}, "tie": True, "ended": False, "score": -1.0}
    drawn = [prompt(("a", 0.0), ("b", 1.0), **pair, **rated)]

    # As the datamodules read them: no margin, no tie, no second answer, no second verdict.
    (chosen,) = preference_pairs(drawn)
    read = preference(chosen)
    assert (read.completions, read.fields) == (("b", "a"), {"answer": "2", "provenance": chosen["provenance"]})
    (best,) = demonstrations(drawn)
    assert demonstration(best).completions == ("b",)
    assert [unpaired(row)[0].fields["label"] for row in unpaired_rows(drawn, threshold=0.5)] == [False, True]
    assert [(row["score"], row["ended"]) for row in scored_rows(drawn)] == [(0.0, True), (1.0, True)]

    # A demonstration is read where it is, and then stands once.
    (against, _) = spin_pairs([prompt(("a", None), ("b", None), response="2")], column="response")
    assert preference(against).completions == ("2", "a")
