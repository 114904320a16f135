"""Rounds: where each starts, what a rejection changes, and that a loop that was cut off ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.inference import derive_seed
from rlhf_lightning.merging.options import expand
from rlhf_lightning.pipeline import kinds, load_pipeline, rounds_stage
from rlhf_lightning.pipeline.config import body_of
from rlhf_lightning.pipeline.rounds_stage import run_rounds
from rlhf_lightning.pipeline.row_files import NoRowsError
from rlhf_lightning.rewards import ConstitutionReward
from rlhf_lightning.self_improvement.gate import Decision
from rlhf_lightning.utils.files import content_hash
from rlhf_lightning.utils.messages import UsageError

from .rounds_files import contents, write_rounds

TRAIN: dict[str, Any] = {
    "kind": "fit",
    "model": {"init_args": {"model": "${round.model}", "optimizer": {"init_args": {"lr": 0.5}}}},
    "data": {"init_args": {"train": "sums:demonstrations?rows=8&seed=${round.number}"}},
}


def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[str], **options: Any) -> SimpleNamespace:
    """Runs a loop whose rounds write a model with their number, and whose decisions are given."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start/weights").write_text("start")
    loop = {"kind": "rounds", "model": str(tmp_path / "start"), "rounds": len(verdicts), "body": {"train": TRAIN}}
    loop |= {"suite": {"tasks": [{"name": "sums", "prompts": "sums:prompts?rows=4"}]}, **options}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "seed": 3, "stages": {"loop": loop}}))
    pipeline, began, named, left = load_pipeline(file), [], [], list(verdicts)

    def run_body(body):
        options = body.stages["train"].model["init_args"]
        number = int(body.run_dir.name)
        began.append((Path(options["model"]), options["optimizer"]["init_args"]["lr"], body.seed))
        assert body.stages["train"].data["init_args"]["train"] == f"sums:demonstrations?rows=8&seed={number}"
        if left[0] == "empty":
            left.pop(0)
            raise NoRowsError("nothing was right")
        (body.folder("train") / "model").mkdir(parents=True)
        (body.folder("train") / "model/weights").write_text(str(number))

    class Scripted:
        def __init__(self, *arguments, **options):
            pass

        def begin(self, accepted, name):
            assert not began  # before anything is trained

        def decide(self, accepted, candidate, num_rejected, names):
            task = SimpleNamespace(name="sums")
            results = [
                SimpleNamespace(model=name, task=task, accuracy=SimpleNamespace(value=value))
                for name, value in zip(names, (0.25, 0.5), strict=True)
            ]
            named.append(names)
            return Decision(left.pop(0), "because", 0.25, 0.1, 0.4, 0.01), SimpleNamespace(results=results)

    monkeypatch.setattr(rounds_stage, "Judge", Scripted)
    folder = tmp_path / "run/loop"
    folder.mkdir(parents=True)
    metrics = run_rounds(pipeline.stages["loop"], folder, 3, "float32", run_body, lambda line: None)
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        began=began,
        named=named,
        listed=expand([str(folder / "models.json")]),
        records=records,
        metrics=metrics,
        weights=(folder / "model/weights").read_text(),
        models=[folder / f"rounds/{n}/train/model" for n in range(1, len(verdicts) + 1)],
        start=tmp_path / "start",
    )


def test_a_round_starts_from_the_model_that_was_accepted_last(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["accept", "reject", "reject", "accept", "reject"])
    first, _, _, fourth, _ = found.models
    assert [start for start, _, _ in found.began] == [found.start, first, first, first, fourth]
    assert [rate for _, rate, _ in found.began] == [0.5, 0.5, 0.25, 0.125, 0.125]  # halved by every rejection
    assert [seed for _, _, seed in found.began] == [derive_seed(3, "round", n) % 2**31 for n in range(1, 6)]
    assert found.weights == "4"
    assert found.listed == [str(found.start), str(first), str(fourth)]
    names = ["start", "round 1", "round 1", "round 1", "round 4"]
    assert found.named == [(name, f"round {number}") for number, name in enumerate(names, start=1)]
    assert [record["start"] for record in found.records] == [content_hash(start) for start, _, _ in found.began]
    assert [record["model"] for record in found.records] == [content_hash(model) for model in found.models]
    assert found.records[1]["p_value"] == 0.01
    assert found.metrics == {"rounds": 5.0, "accepted": 2.0, "accuracy_before": 0.25, "accuracy": 0.25}


def test_a_round_knows_the_models_that_were_accepted_before(tmp_path, monkeypatch):
    seen, real = [], rounds_stage.body_of
    monkeypatch.setattr(
        rounds_stage, "body_of", lambda stage, **now: seen.append([*now["earlier"]]) or real(stage, **now)
    )
    found = scripted(tmp_path, monkeypatch, ["accept", "reject", "accept", "reject"])
    start, first, _, third, _ = map(str, (found.start, *found.models))
    assert seen == [[start], [start, first], [start, first], [start, first, third]]


def test_references_to_a_round(tmp_path):
    play = {"kind": "self-play", "model": "${round.model}", "opponents": "${round.earlier}", "prompts": "p"}
    train = TRAIN | {"data": {"init_args": {"train": "${outputs.play.pairs}", "val": "${outputs.play.league}"}}}
    loop = {"kind": "rounds", "model": "m", "body": {"play": play, "train": train}}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": "runs/x", "stages": {"loop": loop}}))
    stage = load_pipeline(file).stages["loop"]
    body = body_of(stage, number=2, earlier=["m", "one"], seed=0, run_dir="runs/x/loop/rounds/2")
    assert (body.stages["play"].model, body.stages["play"].opponents) == ("one", ["m", "one"])
    assert body.stages["train"].data["init_args"] == {
        "train": "runs/x/loop/rounds/2/play/pairs.jsonl",
        "val": "runs/x/loop/rounds/2/play/league.json",
    }


def test_other_seeds_alone(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["reject", "accept"], criteria={"on_reject": "new_seed"})
    assert [rate for _, rate, _ in found.began] == [0.5, 0.5]
    assert found.began[0][2] != found.began[1][2]
    assert found.weights == "2"
    assert found.metrics["accuracy"] == 0.5


def test_a_loop_that_stops_ends_with_the_accepted_model(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["accept", "stop", "accept"])
    assert len(found.began) == 2
    assert found.weights == "1"
    assert [record["verdict"] for record in found.records] == ["accept", "stop"]


def test_a_loop_that_gains_nothing_ends_with_its_start(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["reject", "reject"])
    assert found.weights == "start"
    assert found.metrics["accepted"] == 0


def test_a_round_without_a_row_is_rejected(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["empty", "accept", "empty", "empty", "accept"], criteria={"patience": 2})
    assert [record["verdict"] for record in found.records] == ["reject", "accept", "reject", "stop"]
    assert found.records[0]["reason"] == "nothing was right"
    assert found.weights == "2"


def test_the_accuracy_is_that_of_the_accepted_model_whatever_follows(tmp_path, monkeypatch):
    found = scripted(tmp_path, monkeypatch, ["empty", "accept", "empty"], criteria={"patience": 2})
    assert (found.metrics["accuracy_before"], found.metrics["accuracy"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "stage 'loop': rounds is 0; it must be a whole number of at least 1"),
        ({"body": {}}, "stage 'loop': body is {}; write stages by name"),
        ({"body": {"a": {"kind": "sample", "model": "m", "prompts": "p"}}}, "no stage of the body has a model"),
        ({"body": {"before": TRAIN}}, "its body has a stage 'before', and so has the pipeline"),
        ({"body": {"a": {"kind": "rounds", "model": "m", "body": {}}}}, "its body has rounds of its own, 'a'"),
        ({"body": {"a": TRAIN | {"modle": {}}}}, "stage 'loop': stage 'a' has no key 'modle'; did you mean 'model'?"),
        ({"result": "trian"}, "result is 'trian'; it must be a stage of the body with a model: ['train']"),
    ],
)
def test_mistakes_are_found_when_the_file_is_read(tmp_path, change, message):
    loop = {"kind": "rounds", "model": "m", "body": {"train": TRAIN}} | change
    before = {"kind": "sample", "model": "m", "prompts": "p"}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": "runs/x", "stages": {"before": before, "loop": loop}}))
    with pytest.raises(UsageError) as error:
        load_pipeline(file)
    assert message in str(error.value)


@pytest.fixture
def written(tiny_model_folder, tmp_path) -> dict[str, Any]:
    return write_rounds(str(tiny_model_folder()), tmp_path)


def run(written: dict[str, Any], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    main(["pipeline", "--config", str(file), *arguments])
    found: dict[str, Any] = json.loads((Path(written["run_dir"]) / "manifest.json").read_text())["stages"]["loop"]
    return found


@pytest.mark.slow
def test_rounds_from_start_to_report(written, tmp_path, capsys):
    record = run(written, tmp_path)
    folder = tmp_path / "run/loop"
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["start"] == content_hash(Path(written["stages"]["loop"]["model"]))
    assert record["metrics"]["rounds"] == 2

    # Rows tell which model drew them, and a quarter of them are seeds.
    for number, one in enumerate(rounds, start=1):
        rows = [json.loads(x) for x in (folder / f"rounds/{number}/own/demonstrations.jsonl").read_text().splitlines()]
        own = [row for row in rows if "model" in row["provenance"]]
        assert {row["provenance"]["model"] for row in own} == {one["start"]}
        assert all(row["provenance"]["score"] == 1.0 for row in own)
        assert len(rows) - len(own) == round(len(own) / 3)
        assert one["model"] == content_hash(folder / f"rounds/{number}/train/model")
    accepted = [one for one in rounds if one["verdict"] == "accept"]
    assert content_hash(folder / "model") == (accepted[-1]["model"] if accepted else rounds[0]["start"])
    page = (tmp_path / "run/report.html").read_text()
    assert 'href="loop/rounds/2/report.html"' in page
    assert 'href="loop/evaluation/report.html"' in page

    # Nothing runs again; a loop of more rounds continues where it ended.
    assert not run(written, tmp_path)["ran"]
    capsys.readouterr()
    assert run(written, tmp_path, "stages.loop.rounds=3")["metrics"]["rounds"] == 3
    said = capsys.readouterr().out
    assert said.count("train: finished before and unchanged") == 2
    assert said.count("train: running") == 1
    assert (folder / "rounds.jsonl").read_text().splitlines()[:2] == [
        json.dumps(one, ensure_ascii=False) for one in rounds
    ]


@pytest.mark.slow
def test_rounds_of_self_play(written, tmp_path):
    loop = written["stages"]["loop"]
    loop["body"]["own"] |= {"kind": "self-play", "opponents": "${round.earlier}", "trial": 4, "num_samples": 4}
    run(written, tmp_path)
    folder = tmp_path / "run/loop"
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for number, one in enumerate(rounds, start=1):
        league = json.loads((folder / f"rounds/{number}/own/league.json").read_text())
        accepted = sum(before["verdict"] == "accept" for before in rounds[: number - 1])
        assert len(league["opponents"]) == 1 + accepted
        assert league["opponents"][0]["model"] == rounds[0]["start"]
        assert league["model"] == one["start"]
        assert sum(opponent["prompts"] for opponent in league["opponents"]) == 12 - 4
    assert not run(written, tmp_path)["ran"]


@pytest.mark.slow
def test_rounds_that_the_model_judges_itself(written, tmp_path):
    """Self-rewarding: scores of a round are the verdicts of the model that drew its samples."""
    loop = written["stages"]["loop"]
    statement = {"name": "short", "statement": "It is short."}
    judge = {"principles": [statement], "judge": "${round.model}", "question": "{prompt}{completion} {statement}"}
    verifier = {"class_path": "rlhf_lightning.rewards.ConstitutionReward", "init_args": judge}
    loop["body"]["own"] |= {"verifier": verifier, "rows": ["samples", "pairs"]}
    del loop["body"]["own"]["seed_rows"], loop["body"]["own"]["seed_ratio"]
    loop["body"]["train"]["model"]["class_path"] = "DPOModule"
    loop["body"]["train"]["data"] = {
        "class_path": "PreferenceDataModule",
        "init_args": {"train": "${outputs.own.pairs}"},
    }
    run(written, tmp_path)
    folder = tmp_path / "run/loop"
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert len({one["start"] for one in rounds} | {one["model"] for one in rounds}) > 1
    for number, one in enumerate(rounds, start=1):
        before = folder / f"rounds/{number - 1}/train/model"
        accepted = number > 1 and rounds[number - 2]["verdict"] == "accept"
        model = str(before) if accepted else loop["model"]
        assert content_hash(Path(model)) == one["start"]
        reward = ConstitutionReward([statement], judge=model, question=judge["question"])
        rows = [json.loads(x) for x in (folder / f"rounds/{number}/own/samples.jsonl").read_text().splitlines()]
        expected = reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
        assert [row["provenance"]["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
        assert len({round(score, 6) for score in expected}) > 1


def cut(real: Any, after: bool) -> Any:
    def wrapped(*arguments: Any) -> Any:
        if after:
            real(*arguments)
        raise KeyboardInterrupt

    return wrapped


@pytest.mark.slow
def test_a_loop_that_is_cut_off_ends_with_the_same_bytes(written, tmp_path, monkeypatch):
    run(written, tmp_path)
    whole = contents(tmp_path / "run/loop")
    assert all(whole.values())
    written["run_dir"] = str(tmp_path / "cut")
    # Before a stage runs, or when it has written all but its record.
    moments = [(name, after) for name in ("run_sample", "run_fit") for after in (False, True)]
    for name, after in [*moments, ("run_sample", True), ("run_fit", False)]:
        with monkeypatch.context() as patched:
            patched.setattr(kinds, name, cut(getattr(kinds, name), after))
            with pytest.raises(SystemExit) as exit_info:
                run(written, tmp_path)
            assert exit_info.value.code == 130
    records = (tmp_path / "cut/loop/rounds.jsonl").read_text().splitlines()
    assert len(records) == 1  # it was cut off in the second round
    run(written, tmp_path)
    assert contents(tmp_path / "cut/loop") == whole


@pytest.mark.slow
def test_forced_rounds_run_all_of_their_stages(written, tmp_path, capsys):
    run(written, tmp_path)
    whole = contents(tmp_path / "run/loop")
    capsys.readouterr()
    assert run(written, tmp_path, "--force", "loop")["ran"]
    assert capsys.readouterr().out.count("train: running") == 2
    assert contents(tmp_path / "run/loop") == whole
    with pytest.raises(SystemExit):
        run(written, tmp_path, "--force", "lop")
    assert "force is 'lop', and stages are loop; did you mean 'loop'?" in capsys.readouterr().err
