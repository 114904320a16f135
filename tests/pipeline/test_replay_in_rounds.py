"""Rows of earlier rounds in later ones: which, in what order, with what provenance; recomputed from files of rows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_lightning.inference import Completion, derive_seed
from rlhf_lightning.pipeline import kinds, load_pipeline, rounds_stage, sample_stage
from rlhf_lightning.pipeline.rounds_stage import run_rounds
from rlhf_lightning.pipeline.row_files import NoRowsError
from rlhf_lightning.pipeline.runner import check_stages
from rlhf_lightning.pipeline.sample_stage import run_sample
from rlhf_lightning.pipeline.stages import SampleStage
from rlhf_lightning.self_improvement.gate import Decision
from rlhf_lightning.utils.files import content_hash
from rlhf_lightning.utils.messages import UsageError

from ..evaluation.scripted import ScriptedEngine
from ..self_improvement.naive_replay import naive_replay
from .test_rounds_stage import TRAIN

TEXTS = ["#2", "so #2", "#3", "so #3", "#4", "so #4", "#5", "it is #4"]
PROMPTS = 10


class Drawing(ScriptedEngine):
    """Answers by seeds alone."""

    def generate(self, prompts: Any, num_samples: int = 1, sampling: Any = None, *, seeds: Any = None, **_: Any) -> Any:
        texts = [[random.Random(seed).choice(TEXTS) for seed in row] for row in seeds]
        return [[Completion([1], text, [0.0], "stop") for text in row] for row in texts]


def lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as rows:
        return [json.loads(row) for row in rows]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    engine = Drawing({})
    monkeypatch.setattr(sample_stage, "stage_policy", lambda model, dtype: (engine, engine.tokenizer))
    rows = [{"prompt": f"{n}.\u2028", "answer": str(2 + n % 3)} for n in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeds = [{"prompt": f"seed {n}", "completion": "#0", "answer": "0"} for n in range(100)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    return str(tmp_path / "prompts.jsonl")


def loop_of(prompts: str, replay: Any, rounds: int, **options: Any) -> dict[str, Any]:
    own = {"kind": "sample", "model": "${round.model}", "prompts": prompts, "rows": ["demonstrations", "samples"]}
    train = TRAIN | {"data": {"init_args": {"train": "${outputs.own.demonstrations}"}}}
    body = {"own": own | {"num_samples": 4, "keep": None, "replay": replay} | options, "train": train}
    place = Path(prompts).parent
    (place / "start").mkdir(exist_ok=True)
    (place / "start/weights").write_text("start")
    suite = {"tasks": [{"name": "sums", "prompts": "sums:prompts?rows=4"}]}
    loop = {"kind": "rounds", "model": str(place / "start"), "rounds": rounds, "suite": suite, "body": body}
    loop["criteria"] = {"patience": 9}
    return {"run_dir": str(place / "run"), "seed": 3, "stages": {"loop": loop}}


def run_loop(
    prompts: str, monkeypatch: pytest.MonkeyPatch, verdicts: list[str], replay: Any, **options: Any
) -> list[Path]:
    """Runs rounds that sample, and write their number as their model; returns their folders."""
    file = Path(prompts).with_name("pipeline.yaml")
    file.write_text(yaml.safe_dump(loop_of(prompts, replay, len(verdicts), **options)))
    pipeline, left = load_pipeline(file), list(verdicts)

    def run_body(body):
        body.folder("own").mkdir(parents=True, exist_ok=True)
        if left[0] == "empty":
            left.pop(0)
            raise NoRowsError("nothing was right")
        kinds.run_stage(body, "own", None, lambda line: None)
        (body.folder("train") / "model").mkdir(parents=True, exist_ok=True)
        (body.folder("train") / "model/weights").write_text(body.run_dir.name)

    class Scripted:
        def __init__(self, *arguments, **options):
            pass

        def begin(self, accepted, name):
            pass

        def decide(self, accepted, candidate, num_rejected, names):
            return Decision(left.pop(0), "because", 0.25, 0.1, 0.4, 0.01), SimpleNamespace(results=[])

    monkeypatch.setattr(rounds_stage, "Judge", Scripted)
    monkeypatch.setattr(rounds_stage, "_metrics", lambda records: {})
    folder = pipeline.folder("loop")
    folder.mkdir(parents=True, exist_ok=True)
    run_rounds(pipeline.stages["loop"], folder, 3, "float32", run_body, lambda line: None)
    return [folder / f"rounds/{number}" for number in range(1, len(verdicts) + 1)]


def made(folder: Path, priority: str = "uniform") -> list[tuple[dict[str, Any], float]]:
    """The rows that a round has made itself, with their priorities."""
    rows = [row for row in lines(folder / "own/demonstrations.jsonl") if "round" not in row["provenance"]]
    scores: dict[str, list[float]] = {}
    for sample in lines(folder / "own/samples.jsonl"):
        scores.setdefault(sample["prompt"], []).append(sample["score"])
    return [(row, stdev(scores[row["prompt"]]) if priority == "frontier" else 1.0) for row in rows]


@pytest.mark.parametrize(
    ("replay", "verdicts"),
    [
        ({"capacity": 1000, "share": 0.5}, ["accept", "accept", "accept"]),
        ({"share": 4.0, "max_age": 1}, ["accept", "accept", "accept", "accept"]),
        ({"capacity": 5, "share": 1.0, "priority": "frontier"}, ["accept", "reject", "accept", "accept", "accept"]),
        ({"share": 1.0, "rejected": True}, ["reject", "empty", "reject", "accept", "accept"]),
        ({"share": 1.0}, ["reject", "empty", "reject", "accept", "accept", "reject", "accept"]),
    ],
)
def test_rows_that_come_back(prompts, monkeypatch, replay, verdicts):
    folders = run_loop(prompts, monkeypatch, verdicts, replay)
    earlier: dict[int, Any] = {}
    came_back = 0
    for number, (folder, verdict) in enumerate(zip(folders, verdicts, strict=True), start=1):
        if verdict == "empty":
            assert not (folder / "own/replay.jsonl").exists()
            continue
        own = made(folder, replay.get("priority", "uniform"))
        now = [row for row, _ in own]
        assert {row["provenance"]["seed"] for row in now} <= {
            derive_seed(derive_seed(3, "round", number) % 2**31, n, s) for n in range(PROMPTS) for s in range(4)
        }
        how = {name: value for name, value in replay.items() if name in ("capacity", "share", "max_age")}
        seed = derive_seed(3, "round", number) % 2**31
        drawn = naive_replay(earlier, now, number=number, seed=seed, **{"capacity": 1000, **how})
        assert lines(folder / "own/demonstrations.jsonl") == [*now, *drawn]
        came_back += len(drawn)
        if verdict == "accept" or replay.get("rejected"):
            earlier[number] = own
    assert came_back > 3
    if replay.get("rejected"):
        rows = lines(folders[3] / "own/demonstrations.jsonl")
        assert {row["provenance"].get("round") for row in rows} == {None, 1, 3}


def test_provenance_tells_the_round_and_the_model_that_drew(prompts, monkeypatch):
    folders = run_loop(prompts, monkeypatch, ["accept", "reject", "accept", "accept"], {"share": 9.0})
    start, first, third = Path(prompts).with_name("start"), folders[0] / "train/model", folders[2] / "train/model"
    # The model of a round is the one that was accepted last before it.
    drew = {1: content_hash(start), 2: content_hash(first), 3: content_hash(first), 4: content_hash(third)}
    rows = lines(folders[3] / "own/demonstrations.jsonl")
    assert {(row["provenance"].get("round", 4), row["provenance"]["model"]) for row in rows} == {
        (number, drew[number]) for number in (1, 3, 4)
    }
    assert all(row["provenance"]["score"] == 1.0 for row in rows)


def test_seed_rows_are_a_share_of_all_rows(prompts, monkeypatch):
    seeds = {"seed_rows": str(Path(prompts).with_name("seeds.jsonl")), "seed_ratio": 0.5, "max_rows": 3}
    folders = run_loop(prompts, monkeypatch, ["accept", "accept"], {"share": 0.7}, **seeds)
    of = [
        ["seed" if "seed_row" in row["provenance"] else row["provenance"].get("round", "own") for row in rows]
        for rows in (lines(folder / "own/demonstrations.jsonl") for folder in folders)
    ]
    assert of == [["own"] * 3 + ["seed"] * 3, ["own"] * 3 + [1] * 2 + ["seed"] * 5]
    # Rows that were not trained on are not replayed.
    kept = [record["row"] for record in lines(folders[0] / "own/replay.jsonl")]
    assert kept == lines(folders[0] / "own/demonstrations.jsonl")[:3]


def test_a_loop_that_runs_again_draws_the_same(prompts, monkeypatch):
    found = []
    for _ in range(2):
        folders = run_loop(prompts, monkeypatch, ["accept", "reject", "accept"], {"share": 0.5, "capacity": 6})
        files = [folder / "own" / name for folder in folders for name in ("demonstrations.jsonl", "replay.jsonl")]
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]


def test_a_chain_of_stages_without_rounds(prompts, tmp_path):
    """The rows of rounds equal rows written by hand."""
    for number in (1, 2):
        before = {} if number == 1 else {"rows": str(tmp_path / "1/replay.jsonl")}
        stage = SampleStage(
            model="m",
            prompts=prompts,
            rows=["pairs"],
            replay={"share": 1.0, "round": number, "max_age": 1} | before,
        )
        (tmp_path / str(number)).mkdir()
        metrics = run_sample(stage, tmp_path / str(number), number, "float32")
        assert stage.outputs == {"pairs": "pairs.jsonl", "replay": "replay.jsonl"}
    first, second = lines(tmp_path / "1/pairs.jsonl"), lines(tmp_path / "2/pairs.jsonl")
    own = [row for row in second if "round" not in row["provenance"]]
    expected = naive_replay({1: [(row, 1.0) for row in first]}, own, number=2, seed=2, capacity=1000, share=1.0)
    assert second == [*own, *expected]
    assert (metrics["pairs"], metrics["replayed"]) == (len(second), len(expected))


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ({"capcity": 5}, "stage 'loop': stage 'own': replay has no option 'capcity'; did you mean 'capacity'?"),
        ({"capacity": 0}, "stage 'loop': stage 'own': replay.capacity is 0; it must be a whole number of at least 1"),
        ({"share": 0}, "stage 'loop': stage 'own': replay.share is 0; it must be above 0"),
        ([3], "stage 'loop': stage 'own': replay is [3]; it must be a RowReplay or a mapping of its options"),
        ({"rows": "x"}, "stage 'loop': stage 'own': replay.rows is 'x', and rounds give it: leave it out"),
        ({"round": 2}, "stage 'loop': stage 'own': replay.round is 2, and rounds give it: leave it out"),
    ],
)
def test_mistakes_are_found_before_anything_runs(prompts, replay, message):
    file = Path(prompts).with_name("pipeline.yaml")
    file.write_text(yaml.safe_dump(loop_of(prompts, replay, 2)))
    with pytest.raises((UsageError, ValueError), match="^" + re.escape(message)) as error:
        check_stages(load_pipeline(file))
    assert "\n" not in str(error.value)
    assert not Path(prompts).with_name("run").exists()
