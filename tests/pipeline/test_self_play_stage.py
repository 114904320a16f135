"""A league of scripted players: its table by hand, who is drawn, and rows of the answers of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf_lightning.inference import derive_seed
from rlhf_lightning.pipeline import self_play_stage
from rlhf_lightning.pipeline.self_play_stage import check_self_play, run_self_play
from rlhf_lightning.pipeline.stages import SelfPlayStage
from rlhf_lightning.self_improvement import games_of, win_rates

from ..evaluation.scripted import ScriptedEngine

COUNT = 9
PROMPTS = [f"{n}+{n}=" for n in range(1, COUNT + 1)]


def answered(*wrong: int) -> dict[str, list[str]]:
    """Right answers, but to some problems."""
    return {p: ["#0" if n in wrong else f"#{2 * n}"] for n, p in enumerate(PROMPTS, start=1)}


# m fails at the second problem, b at all.
PLAYERS = {"m": answered(2), "a": answered(5), "b": answered(*range(1, COUNT + 1))}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ScriptedEngine]]:
    """Engines in the order in which models were loaded."""
    loaded: list[tuple[str, ScriptedEngine]] = []

    def load(folder: str, dtype: str) -> Any:
        loaded.append((folder, ScriptedEngine(PLAYERS[folder])))
        return loaded[-1][1], loaded[-1][1].tokenizer

    monkeypatch.setattr(self_play_stage, "stage_policy", load)
    return loaded


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": p, "answer": str(2 * n)} for n, p in enumerate(PROMPTS, start=1)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    league = {"trial": 2, "power": 1.0, "floor": 0.0, "rows": ["pairs", "samples"]}
    return {"model": "m", "opponents": ["a", "b", "a"], "prompts": str(tmp_path / "prompts.jsonl"), **league}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected(rating: float, other: float) -> float:
    return 1 / (1 + 10 ** ((other - rating) / 400))


def test_the_table_of_the_league(engines, options, tmp_path):
    """Scores of the trial are m 1, 0; a 1, 1; b 0, 0: six games, in the order of prompts and players."""
    metrics = run_self_play(SelfPlayStage(**options), tmp_path, 0, "float32")
    rating = {"m": 1000.0, "a": 1000.0, "b": 1000.0}
    for one, other, score in ("ma½", "mb1", "ab1", "ma0", "mb½", "ab1"):
        change = 32 * ({"½": 0.5, "1": 1.0, "0": 0.0}[score] - expected(rating[one], rating[other]))
        rating[one] += change
        rating[other] -= change
    league = json.loads((tmp_path / "league.json").read_text())
    # The model won no game of two against a, and one of two against b; the others were draws.
    assert [(one["place"], one["win_rate"], one["weight"]) for one in league["opponents"]] == [
        ("a", 0.25, 0.75),
        ("b", 0.75, 0.25),
    ]
    assert [one["rating"] for one in league["opponents"]] == pytest.approx([rating["a"], rating["b"]])
    assert (league["games"], league["model"]) == (6, "m")
    assert metrics["elo"] == league["rating"] == pytest.approx(rating["m"])
    assert metrics["win_rate"] == 0.5
    # One model at a time: each is loaded for the trial, then for its further prompts.
    assert [folder for folder, _ in engines] == ["m", "a", "b", "m", "a", "b"]


def test_rows_have_the_answers_of_both(engines, options, tmp_path):
    run_self_play(SelfPlayStage(**options), tmp_path, 0, "float32")
    drawn = [Random(f"self-play/0/{n}").choices(["a", "b"], [0.75, 0.25])[0] for n in range(2, COUNT)]
    assert set(drawn) == {"a", "b"}
    players = [["m", "a", "b"]] * 2 + [["m", name] for name in drawn]
    samples = lines(tmp_path / "samples.jsonl")
    assert [(row["prompt"], row["provenance"]["model"]) for row in samples] == [
        (prompt, player) for prompt, names in zip(PROMPTS, players, strict=True) for player in names
    ]
    assert [row["completion"] for row in samples] == [
        PLAYERS[r["provenance"]["model"]][r["prompt"]][0] for r in samples
    ]
    league = json.loads((tmp_path / "league.json").read_text())
    assert [one["prompts"] for one in league["opponents"]] == [drawn.count("a"), drawn.count("b")]

    # Whoever is right is chosen, the opponent where the model is wrong.
    wrong = {2} | {n for n, name in enumerate(drawn, start=3) if name == "b" or (n == 5 and name == "a")} | {1}
    pairs = lines(tmp_path / "pairs.jsonl")
    assert [row["prompt"] for row in pairs] == [PROMPTS[n - 1] for n in sorted(wrong)]
    second = next(row for row in pairs if row["prompt"] == "2+2=")
    assert (second["chosen"], second["rejected"]) == ("#4", "#0")
    assert second["provenance"]["chosen"] == {"seed": derive_seed(derive_seed(0, "player", 1), 1, 0), "score": 1.0} | {
        "model": "a"
    }
    assert "model" not in second["provenance"]["rejected"]
    assert second["provenance"]["model"] == "m"


def test_a_copy_of_the_model_draws_other_samples(engines, options, tmp_path):
    run_self_play(SelfPlayStage(**options | {"opponents": ["m"], "rows": ["samples"]}), tmp_path, 0, "float32")
    seeds = [seed for _, engine in engines for _, row in engine.calls for seed in row]
    assert len(seeds) == 2 * COUNT
    assert len(set(seeds)) == len(seeds)


def test_an_interrupted_stage_ends_with_the_same_bytes(engines, options, tmp_path, monkeypatch):
    monkeypatch.setattr(self_play_stage, "PROMPTS_AT_ONCE", 3)
    stage, folders = SelfPlayStage(**options), [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    run_self_play(stage, folders[0], 0, "float32")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    for _ in range(5):  # a further part each time: those of the trial, and two after it
        with pytest.raises(KeyboardInterrupt):
            run_self_play(stage, folders[1], 0, "float32", stop)
    assert len(lines(folders[1] / "sampled.jsonl")) == 5
    run_self_play(stage, folders[1], 0, "float32")
    for name in ("pairs.jsonl", "samples.jsonl", "league.json"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    assert not (folders[1] / "sampled.jsonl").exists()


def test_a_trial_with_enough_rows_is_all_that_is_played(engines, options, tmp_path):
    stages = {n: SelfPlayStage(**options | {"rows": ["samples"], "max_rows": n}) for n in (6, 7)}
    for n, stage in stages.items():
        (tmp_path / str(n)).mkdir()
        run_self_play(stage, tmp_path / str(n), 0, "float32")
    # Two prompts by three players are six samples.
    drawn = [
        [one["prompts"] for one in json.loads((tmp_path / f"{n}/league.json").read_text())["opponents"]] for n in stages
    ]
    assert drawn[0] == [0, 0]
    assert sum(drawn[1]) == COUNT - 2
    written = {n: lines(tmp_path / f"{n}/samples.jsonl") for n in stages}
    assert written[6] == written[7][:6]
    assert len(written[7]) == 7


def test_games_without_a_score_are_not_played():
    assert games_of({"a": [1.0, None], "b": [0.5, 1.0], "c": [0.5, 0.0]}) == [
        ("a", "b", 1.0),
        ("a", "c", 1.0),
        ("b", "c", 0.5),
        ("b", "c", 1.0),
    ]
    assert win_rates([("a", "b", 1.0), ("b", "a", 0.5), ("c", "b", 1.0)], "b") == {"a": 0.25, "c": 0.0}


def silent(prompts: list[str], completions: list[str]) -> list[None]:
    return [None] * len(completions)


def test_a_verifier_without_verdicts(engines, options, tmp_path):
    stage = SelfPlayStage(**options | {"verifier": f"{__name__}.silent"})
    with pytest.raises(ValueError, match="no trial prompt has scores of both the model and 'a': raise trial"):
        run_self_play(stage, tmp_path, 0, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"opponents": []},
            "opponents is []: list at least one folder of a model, or write opponents: ${round.earlier}",
        ),
        ({"opponents": "a"}, "opponents is 'a': list at least one"),
        ({"trial": 0}, "trial is 0; it must be a whole number of at least 1"),
        ({"weighting": "hrd"}, "kind is 'hrd'; it must be one of uniform, hard, even; did you mean 'hard'"),
        ({"floor": 1.0}, "floor is 1.0; it must be in [0, 1)"),
        ({"k": 0.0}, "k is 0.0; it must be"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"sampling": {"topp": 1}}, "sampling has no key 'topp'"),
    ],
)
def test_mistakes(options, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_self_play(SelfPlayStage(**options | change))
