"""New prompts of a scripted writer: near copies, cut-off ones, and any that is solved always or never are dropped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.inference import derive_seed
from rlhf_lightning.pipeline import challenge_stage
from rlhf_lightning.pipeline.challenge_stage import check_challenge, run_challenge
from rlhf_lightning.pipeline.row_files import NoRowsError
from rlhf_lightning.pipeline.stages import EXACT, ChallengeStage
from rlhf_lightning.self_improvement import agreement

from ..evaluation.scripted import ScriptedEngine

# A copy of the known prompt, a copy of a new one, one that was cut off.
WRITTEN = ["2+2=", "1+1=", "2+2=", "3+3=", "4+4=...", "5+5=", "6+6="]
# The tokenizer of the tests has no T.
ASKED = "<unk>ask: 1+1=!"
SOLVED = {
    "2+2=": ["#4", "#5", "it is #4.0", "4"],
    "3+3=": ["#6", "#6", "#6", "#6"],
    "5+5=": ["ten", "10", "", "?"],
    "6+6=": ["#11", "#12", "#12", "#12"],
}


class Writer(ScriptedEngine):
    """Writes the text that belongs to each seed, and solves by a script."""

    def generate(self, prompts: Any, num_samples: int = 1, *arguments: Any, seeds: Any = None, **options: Any) -> Any:
        if num_samples > 1:
            return super().generate(prompts, num_samples, *arguments, seeds=seeds, **options)
        texts = {derive_seed(0, "challenge", n): text for n, text in enumerate(WRITTEN)}
        asked = {self.tokenizer.decode(prompt): prompt for prompt in prompts}
        assert list(asked) == [ASKED]
        prompt, found = next(iter(asked.values())), []
        for (seed,) in seeds:
            self.answers = {**self.answers, ASKED: [texts[seed]]}
            found += super().generate([prompt], 1, *arguments, seeds=[[seed]], **options)
        return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Writer:
    engine = Writer(SOLVED)
    monkeypatch.setattr(challenge_stage, "stage_policy", lambda model, dtype: (engine, engine.tokenizer))
    return engine


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": "1+1="}) + "\n")
    known = str(tmp_path / "known.jsonl")
    return {"model": "m", "prompts": known, "number": len(WRITTEN), "template": "{examples}!"}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_new_prompts_that_are_solved_sometimes(engine, options, tmp_path):
    metrics = run_challenge(ChallengeStage(**options), tmp_path, 0, "float32")
    assert lines(tmp_path / "prompts.jsonl") == [
        {"prompt": p, "pass_rate": rate, "answer": answer, "provenance": {"row_id": f"challenge/{n}", "model": "m"}}
        for n, p, rate, answer in ((0, "2+2=", 0.5, "4"), (3, "6+6=", 0.75, "12"))
    ]
    assert metrics == {"requests": 7, "new_prompts": 4, "rows": 2, "pass_rate": 0.625}
    # A sample's seed is a function of the number of its prompt and its own.
    solving = derive_seed(0, "solve")
    assert [(text, seeds) for text, seeds in engine.calls if len(seeds) > 1] == [
        (text, [derive_seed(solving, n, s) for s in range(4)]) for n, text in enumerate(SOLVED)
    ]
    assert not (tmp_path / "sampled.jsonl").exists()


def starts_with_it(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.startswith("it")) for text in completions]


def test_a_verifier_knows_what_is_right(engine, options, tmp_path):
    stage = ChallengeStage(**options, verifier=f"{__name__}.starts_with_it")
    run_challenge(stage, tmp_path, 0, "float32")
    (row,) = lines(tmp_path / "prompts.jsonl")
    assert (row["prompt"], row["pass_rate"], "answer" in row) == ("2+2=", 0.25, False)


def test_messages_stay_messages(engine, options, tmp_path):
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}]}) + "\n")
    maker = challenge_stage._Maker(ChallengeStage(**options), 0, "float32")
    assert maker.known == ["1+1="]
    (asked,) = maker._examples(["2+2="], engine.tokenizer)
    assert asked.fields["prompt"] == [{"role": "user", "content": "2+2="}]


def test_an_interrupted_stage_ends_with_the_same_bytes(engine, options, tmp_path, monkeypatch):
    monkeypatch.setattr(challenge_stage, "_REQUESTS_AT_ONCE", 2)
    stage, folders = ChallengeStage(**options), [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    run_challenge(stage, folders[0], 0, "float32")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    for _ in range(3):  # a further part each time
        with pytest.raises(KeyboardInterrupt):
            run_challenge(stage, folders[1], 0, "float32", stop)
    assert len(lines(folders[1] / "sampled.jsonl")) == 3
    run_challenge(stage, folders[1], 0, "float32")
    whole, again = (folder.joinpath("prompts.jsonl").read_bytes() for folder in folders)
    assert again == whole


def test_nothing_is_solved_sometimes(engine, options, tmp_path):
    with pytest.raises(NoRowsError, match="none of 4 new prompts from 7 requests is solved sometimes: raise number"):
        run_challenge(ChallengeStage(**options, low=0.8), tmp_path, 0, "float32")
    assert not (tmp_path / "prompts.jsonl").exists()


def test_agreement_is_per_prompt():
    prompts = ["a", "b", "a", "b", "a"]
    assert agreement(prompts, ["#1", "#2", "#1", "#3", "#2"]) == [1.0, 1.0, 1.0, 0.0, 0.0]  # of equals the first drawn
    assert agreement(["a", "a"], ["1", "#"]) == [0.0, 0.0]  # without an answer nothing is right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 0}, "number is 0; it must be a whole number of at least 1"),
        ({"num_samples": 2}, "num_samples is 2, and without a verifier the answer of most samples is the right one"),
        ({"num_samples": 1, "verifier": EXACT}, "num_samples is 1, and of one sample a prompt is solved"),
        ({"sampling": {"temperature": 0.0}}, "num_samples is 4 at sampling.temperature 0, where all are equal"),
        ({"template": "one more:"}, "template has no {examples}: write where it stands"),
        ({"max_overlap": 1.5}, "max_overlap is 1.5; it must be in (0, 1]"),
        ({"low": 0.5, "high": 0.4}, "high is 0.4; it must be above low=0.5"),
        ({"writing": {"temprature": 1}}, "sampling has no key 'temprature'; did you mean 'temperature'?"),
        ({"verifier": "no.such.thing"}, "verifier 'no.such.thing' cannot be imported"),
    ],
)
def test_mistakes(options, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_challenge(ChallengeStage(**options | change))
