"""Rounds and gates: what is found before a round trains, what an earlier run leaves, and forced runs cut off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.evaluation import read_history
from rlhf_lightning.merging.options import expand
from rlhf_lightning.pipeline import kinds, load_pipeline, rounds_stage, run_pipeline, runner
from rlhf_lightning.pipeline.dry_run import plan_lines
from rlhf_lightning.pipeline.round_folders import write_models
from rlhf_lightning.pipeline.row_files import NoRowsError
from rlhf_lightning.utils.files import content_hash, mark

from ..helpers import save_tiny_model

EVEN = f"{__name__}.first_is_even"
STAGES = ["run/before", "1/own", "1/train", "2/own", "2/train"]


def first_is_even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


def fails(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "kind": "sample",
        "model": "${round.model}",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "verifier": EVEN,
        "rows": ["samples"],
        "num_samples": 2,
        "sampling": {"max_new_tokens": 4},
    }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    train = {
        "kind": "fit",
        "model": {"class_path": "SFTModule", "init_args": {"model": "${round.model}", "optimizer": optimizer}},
        "data": {"class_path": "SFTDataModule", "init_args": {"train": "sums:demonstrations?rows=8"}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False},
    }
    task = {"name": "even", "prompts": str(tmp_path / "prompts.jsonl"), "verifier": EVEN}
    loop = {
        "kind": "rounds",
        "model": str(save_tiny_model(tmp_path / "start")),
        "rounds": 2,
        "suite": {"name": "small", "tasks": [task | {"sampling": {"max_new_tokens": 2}}]},
        "criteria": {"accept": "not_worse", "threshold": 1.0},
        "body": {"own": sample, "train": train},
    }
    return {"run_dir": str(tmp_path / "run"), "seed": 3, "stages": {"loop": loop}}


def load(written: dict[str, Any], tmp_path: Path) -> Any:
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps(written))
    return load_pipeline(file)


def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces training by a random model of the stage's seed, and sampling by a row; returns the list of what ran."""
    ran: list[str] = []

    def fit(stage: Any, folder: Path, seed: int, say: Any) -> dict[str, float]:
        ran.append(f"{folder.parent.name}/{folder.name}")
        mark(save_tiny_model(folder / "model", seed=seed % 1000), "model")
        return {}

    def sample(stage: Any, folder: Path, seed: int, dtype: str, say: Any) -> dict[str, float]:
        ran.append(f"{folder.parent.name}/{folder.name}")
        (folder / "samples.jsonl").write_text("{}\n")
        return {}

    monkeypatch.setattr(kinds, "run_fit", fit)
    monkeypatch.setattr(kinds, "run_sample", sample)
    monkeypatch.setattr(runner, "write_report", lambda *arguments: None)  # it shows what real stages have measured
    return ran


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompts": "nofile.jsonl"}, {}, "task 'even': no file, folder or dataset 'nofile.jsonl'"),
    ({"limit": 1}, {}, "task 'even' has 1 prompt, and a paired test needs at least two: give more, or raise limit"),
    ({"strategy": "best_of_m"}, {}, "task 'even': there is no strategy 'best_of_m'"),
    ({"section": "part"}, {}, "the section of task 'even' is the column 'part': its prompts have answer"),
    ({"scorer": "no.scorer"}, {}, "task 'even': verifier 'no.scorer' cannot be imported"),
    ({"win_rate": {"judge": "no/such/judge"}}, {}, "task 'even': judge: there is no folder"),
    ({}, {"min_unique_answers": 0.5}, "criteria.min_unique_answers is 0.5, and no task of the suite "),
]


@pytest.mark.parametrize("kind", ["rounds", "gate", "body"])
@pytest.mark.parametrize(("task", "criteria", "message"), MISTAKES)
def test_mistakes_are_in_the_plan_and_found_before_a_stage_runs(
    kind: str, task: dict[str, Any], criteria: dict[str, Any], message: str, written: Any, tmp_path: Path
) -> None:
    """Of the loop's suite, of a gate's, and of a gate's within the loop."""
    loop = written["stages"]["loop"]
    suite = {"name": "small", "tasks": [loop["suite"]["tasks"][0] | task]}
    gate = {"kind": "gate", "model": loop["model"], "accepted": loop["model"], "suite": suite, "criteria": criteria}
    if kind == "rounds":
        loop["suite"], loop["criteria"] = suite, loop["criteria"] | criteria
    elif kind == "gate":
        written["stages"] = {"loop": gate}
    else:
        loop["body"]["choice"] = gate | {"model": "${outputs.train.model}"}
    pipeline = load(written, tmp_path)
    for run in (plan_lines, run_pipeline):
        with pytest.raises(ValueError, match=rf"^stage 'loop': .*{re.escape(message)}") as raised:
            run(pipeline)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run/manifest.json").exists()


def test_what_only_an_evaluation_tells_is_found_before_the_first_round(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = quick(monkeypatch)
    written["stages"]["loop"]["suite"]["tasks"][0]["verifier"] = f"{__name__}.fails"
    message = "^stage 'loop': the verifier of task 'even' failed on all of 6 answers of 'start': KeyError: 'answer'"
    with pytest.raises(ValueError, match=message):
        run_pipeline(load(written, tmp_path), print)
    assert ran == []


def test_a_stage_names_what_its_code_raises(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: Any) -> dict[str, float]:
        raise KeyError("weights")

    def out_of_memory(*arguments: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    quick(monkeypatch)
    monkeypatch.setattr(kinds, "run_fit", fit)
    with pytest.raises(ValueError, match=r"^stage 'loop': stage 'train': KeyError: 'weights' \(--debug shows where\)$"):
        run_pipeline(load(written, tmp_path), print)
    monkeypatch.setattr(kinds, "run_fit", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):  # the command line adds what helps
        run_pipeline(load(written, tmp_path), print)


def models_of(folder: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob("rounds/*/*/model/config.json"))


def test_rounds_of_a_longer_run_are_deleted(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that is not the package's."""
    quick(monkeypatch)
    loop, folder = written["stages"]["loop"], tmp_path / "run/loop"
    loop["rounds"] = 3
    run_pipeline(load(written, tmp_path), print)
    assert models_of(folder) == [f"rounds/{n}/train/model" for n in (1, 2, 3)]
    accepted = expand([str(folder / "models.json")])
    assert accepted == [loop["model"], *(str(folder / f"rounds/{n}/train/model") for n in (1, 2, 3))]
    (folder / "rounds/3/notes.txt").write_text("mine")
    loop["rounds"] = 1
    run_pipeline(load(written, tmp_path), print)
    assert models_of(folder) == ["rounds/1/train/model"]
    assert not (folder / "rounds/2").exists()
    assert [path.name for path in (folder / "rounds/3").iterdir()] == ["notes.txt"]
    assert expand([str(folder / "models.json")]) == accepted[:2]


def test_models_of_a_round_without_rows_and_of_other_stages_are_deleted(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    loop, folder = written["stages"]["loop"], tmp_path / "run/loop"
    run_pipeline(load(written, tmp_path), print)
    loop["body"] = {name.replace("train", "learn"): stage for name, stage in loop["body"].items()}
    run_pipeline(load(written, tmp_path), print)
    assert models_of(folder) == ["rounds/1/learn/model", "rounds/2/learn/model"]

    def none(stage: Any, place: Path, *arguments: Any) -> dict[str, float]:
        if place.parent.name == "2":
            raise NoRowsError("nothing was right")
        (place / "samples.jsonl").write_text("{}\n")
        return {}

    monkeypatch.setattr(kinds, "run_sample", none)
    loop["body"]["own"]["num_samples"] = 3
    run_pipeline(load(written, tmp_path), print)
    assert models_of(folder) == ["rounds/1/learn/model"]
    assert [Path(place).parts[-3:] for place in expand([str(folder / "models.json")])[1:]] == [("1", "learn", "model")]


def test_a_list_of_models_moves_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "run/loop").mkdir(parents=True)
    write_models(tmp_path / "run/loop", [f"{tmp_path}/run/sft/model", f"{tmp_path}/run/loop/rounds/1/a/model", "/x/m"])
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = f"{tmp_path}/moved"
    assert expand([f"{moved}/loop/models.json", "other"]) == [
        f"{moved}/sft/model",
        f"{moved}/loop/rounds/1/a/model",
        "/x/m",
        "other",
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "is no list of folders"), ("{", "cannot be read"), (None, "can")]
)
def test_lists_of_models_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=rf"list\.json' {message}"):
        expand([str(tmp_path / "list.json")])


@pytest.mark.parametrize("places", [["2/own"], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["one", "every"])
def test_a_forced_run_that_is_cut_off_continues(
    places: list[str], written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage of each round runs once, whichever it is cut off in; forced anew, all run again."""
    ran = quick(monkeypatch)
    first = written["stages"]["loop"]["body"]["own"] | {"model": written["stages"]["loop"]["model"]}
    written["stages"] = {"before": first, **written["stages"]}
    pipeline = load(written, tmp_path)
    run_pipeline(pipeline, print)
    assert ran == STAGES
    ran.clear()

    # Cut off at the start of each stage in turn.
    for place in places:
        with monkeypatch.context() as patched:
            for name in ("run_sample", "run_fit"):
                real = getattr(kinds, name)

                def cut(stage: Any, folder: Path, *rest: Any, real: Any = real, place: str = place) -> Any:
                    if f"{folder.parent.name}/{folder.name}" == place:
                        raise KeyboardInterrupt
                    return real(stage, folder, *rest)

                patched.setattr(kinds, name, cut)
            with pytest.raises(KeyboardInterrupt):
                run_pipeline(pipeline, print, ["loop", "before"])
    plan = plan_lines(pipeline, ["before", "loop"])
    assert plan[0] == "before (sample): stays, finished before and unchanged"
    run_pipeline(pipeline, print, ["before", "loop"])
    assert ran == STAGES
    run_pipeline(pipeline, print, ["before", "loop"])
    assert ran == 2 * STAGES
    run_pipeline(pipeline, print)
    assert ran == 2 * STAGES


def test_the_history_of_rounds_tells_them_apart(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    run_pipeline(load(written, tmp_path), print)
    folder = tmp_path / "run/loop"
    entries = read_history(folder / "evaluation")
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [entry.model for entry in entries] == ["start", "round 1", "round 2"]
    assert [entry.model_hash for entry in entries] == [records[0]["start"], *(record["model"] for record in records)]
    assert entries[1].model_hash == content_hash(folder / "rounds/1/train/model")
    assert [set(record["accuracy"]) for record in records] == [{"accepted", "candidate"}] * 2


@pytest.mark.parametrize("name", ["train", "more"])
def test_a_smaller_step_needs_a_rate_in_every_stage(name: str, written: Any, tmp_path: Path) -> None:
    body = written["stages"]["loop"]["body"]
    body["more"] = json.loads(json.dumps(body["train"]))
    del body[name]["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    message = (
        f"^stage 'loop': criteria.on_reject is 'smaller_step', and the fit stage '{name}' of the body has no "
        r"model\.init_args\.optimizer\.init_args\.lr, which it halves: write it there, or on_reject: new_seed$"
    )
    for run in (plan_lines, run_pipeline):
        with pytest.raises(ValueError, match=message):
            run(load(written, tmp_path))
    written["stages"]["loop"]["criteria"]["on_reject"] = "new_seed"
    assert (
        rounds_stage.check_rounds(load(written, tmp_path).stages["loop"], tmp_path / "x").stages.keys() == body.keys()
    )
