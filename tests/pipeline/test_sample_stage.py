"""Which two of a prompt's answers become a pair, and what a pipeline's figures show."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rlhf_lightning.generation.options import remote_engine, sampling_params
from rlhf_lightning.models import load_tokenizer
from rlhf_lightning.pipeline.figures import TRAIN_SECONDS, points
from rlhf_lightning.pipeline.sample_stage import run_sample
from rlhf_lightning.pipeline.stages import SampleStage
from rlhf_lightning.self_improvement import Sample, ScoredPrompt, preference_pairs

from ..inference.served import completion, serve


def answers(*given: tuple[str, float | None, str]) -> ScoredPrompt:
    samples = tuple(Sample(text, reward, ended=reason == "stop") for text, reward, reason in given)
    return ScoredPrompt("1+1=?", samples, {"answer": "2", "chosen": "of the source"})


def ranked_pair(group: ScoredPrompt) -> dict[str, Any] | None:
    pairs = [{name: pair[name] for name in pair if name != "provenance"} for pair in preference_pairs([group])]
    return pairs[0] if pairs else None


def test_the_first_best_and_the_first_worst_make_a_pair():
    group = answers(("a", 0.0, "stop"), ("b", 0.5, "stop"), ("c", 1.0, "stop"), ("d", 1.0, "stop"), ("e", 0.0, "stop"))
    assert ranked_pair(group) == {"prompt": "1+1=?", "chosen": "c", "rejected": "a", "answer": "2"}


@pytest.mark.parametrize(
    "group",
    [
        answers(("a", 1.0, "stop"), ("b", 1.0, "stop")),  # equally good
        answers(("a", 1.0, "stop"), ("b", 0.0, "length")),  # cut off: how it would have ended is not known
        answers(("a", 1.0, "stop"), ("b", None, "stop")),  # not judged
        answers(("a", 1.0, "stop"), ("", 0.0, "stop")),  # empty: no token to learn from
        answers(),
    ],
)
def test_no_pair(group):
    assert ranked_pair(group) is None


def test_sampling_settings_are_checked():
    assert sampling_params({"temperature": 0.7, "max_new_tokens": 5}).temperature == 0.7
    with pytest.raises(ValueError, match="sampling has no key 'temperatur_'; did you mean 'temperature'"):
        sampling_params({"temperatur_": 1.0})
    with pytest.raises(ValueError, match="sampling has no key 'seed'"):
        sampling_params({"seed": 1})
    with pytest.raises(ValueError, match=r"sampling is \{'temperature': 'hot'\}; one of its values has the wrong type"):
        sampling_params({"temperature": "hot"})


def test_points_count_steps_taken():
    history = [
        {"step": 0, "val/loss": 3.0},
        {"step": 0, "train/loss": 2.0},
        {"step": 1, "train/loss": 1.5},
        {"step": 1, "val/loss": 1.0},
        {"step": 3, "val/loss": None},
    ]
    assert points(history, "val/loss") == ([0.0, 2.0], [3.0, 1.0])
    assert points(history, "train/loss") == ([0.0, 1.0], [2.0, 1.5])


def test_a_server_samples_in_place_of_the_model(tmp_path):
    """Its completions are verified and ranked like the model's own; of `model` only the tokenizer is read."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=?", "answer": str(n + 1)}) + "\n" for n in (1, 2)))

    def answer(path: str, body: dict[str, Any] | None, number: int) -> dict[str, Any]:
        assert path == "/v1/completions"
        right = body["seed"] % 2 == 0
        return completion("#2" if right else "#9")

    with serve(answer) as served:
        stage = SampleStage(
            model="configs/models/nano",
            prompts=str(rows),
            num_samples=8,
            sampling={"temperature": 1.0, "max_new_tokens": 4},
            server={"url": served.url, "model": "large"},
        )
        metrics = run_sample(stage, tmp_path, 0, "float32")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("1+1=?", "#2", "#9")]
    tokenizer = load_tokenizer("configs/models/nano")
    assert {tuple(body["prompt"]) for body in served.bodies} == {
        tuple(tokenizer(f"{n}+1=?")["input_ids"]) for n in (1, 2)
    }
    assert metrics["samples"] == 16


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"url": "http://localhost:1", "modle": "x"}, "server has no key 'modle'; did you mean 'model'?"),
        ({"model": "x"}, "server has no url"),
    ],
)
def test_mistakes_in_a_server(server, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        remote_engine(server, None)


def test_points_over_the_seconds_of_training():
    history = [
        {"step": 0, "val/accuracy": 0.5},
        {"step": 0, "train/loss": 1.0},
        {"step": 3, "val/accuracy": 0.75, TRAIN_SECONDS: 2.5},
    ]
    assert points(history, "val/accuracy", "seconds") == ([0.0, 2.5], [0.5, 0.75])
    assert points(history, "val/accuracy") == ([0.0, 4.0], [0.5, 0.75])
