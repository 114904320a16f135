"""Whatever the package writes, it never deletes or replaces what it did not write: every writer, by every door."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import yaml

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import JSONLLogger, ModelExport, TrainingCheckpoint
from rlhf_lightning.cli import main
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.loggers import read_history
from rlhf_lightning.pipeline import load_pipeline, run_pipeline
from rlhf_lightning.pipeline.runner import _clear
from rlhf_lightning.utils.files import (
    LOCK,
    MARKER,
    PARTIAL,
    REPLACED,
    check_names,
    check_replaceable,
    hidden_sibling,
    hold,
    mark,
    release,
)
from rlhf_lightning.utils.folders import recover, replace_folder

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(4)]
Folder = Callable[[str], Path]


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with what the files hold."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fit(
    model: Path, callbacks: list[lightning.Callback], *, lora: bool = False, logger: object = False, **options: object
) -> lightning.Trainer:
    module = SFTModule(str(model), lora={"r": 2} if lora else None)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=logger,  # type: ignore[arg-type]
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, TrainingCheckpoint) for c in callbacks),
        callbacks=callbacks,
        **({"max_steps": 2} | options),  # type: ignore[arg-type]
    )
    trainer.fit(module, SFTDataModule(train=ROWS, global_batch_size=2), ckpt_path=ckpt_path)
    return trainer


# One mechanism.


def test_a_folder_is_replaced_only_where_its_list_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    check_replaceable(folder, "model")
    folder.mkdir()
    check_replaceable(folder, "model")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by this package"):
        check_replaceable(folder, "model")
    mark(folder, "model")
    check_replaceable(folder, "model")
    with pytest.raises(ValueError, match="holds a model, and this run writes a adapter"):
        check_replaceable(folder, "adapter")
    for name in ("notes.txt", "empty", "link"):
        path = folder / name
        {"notes.txt": lambda p: p.write_text("mine"), "empty": Path.mkdir, "link": lambda p: p.symlink_to("/")}[name](
            path
        )
        with pytest.raises(ValueError, match=f"holds '{name}', which this package did not write"):
            check_replaceable(folder, "model")
        path.rmdir() if name == "empty" else path.unlink()
    for damaged in ("", "[]", '{"kind": "model", "names": ["config.json"]}'):
        (folder / MARKER).write_text(damaged)
        with pytest.raises(ValueError, match="was not written by this package"):
            check_replaceable(folder, "model")


def test_names_in_a_shared_folder(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    check_names(tmp_path, "pipeline", ["manifest.json"])
    with pytest.raises(ValueError, match=r"report\.html' already exists and was not written by this package"):
        check_names(tmp_path, "pipeline", ["manifest.json", "report.html"])
    mark(tmp_path, "stage", ["report.html"])
    with pytest.raises(ValueError, match=r"report\.html' already exists"):
        check_names(tmp_path, "pipeline", ["report.html"])
    check_names(tmp_path, "stage", ["report.html"])


def test_what_a_killed_process_left_is_known_by_its_list(tmp_path: Path) -> None:
    for name in (".x.old", ".x.partial", f".x{REPLACED}", f".x{PARTIAL}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = content(tmp_path)
    for pattern in ("x", "*"):
        recover(tmp_path / pattern)
        assert content(tmp_path) == before
    mark(hidden_sibling(tmp_path / "x", PARTIAL), "model")
    recover(tmp_path / "x")
    assert not hidden_sibling(tmp_path / "x", PARTIAL).exists()


@pytest.mark.parametrize("deleted", [0, 1, 2, 3])
def test_killed_while_it_deletes_the_replaced_folder(deleted: int, tmp_path: Path, monkeypatch) -> None:
    """Half of the old folder is never put back in the place of the whole one, and never stays for ever."""
    target = tmp_path / "model"

    def write(text: str) -> Callable[[Path], object]:
        return lambda place: [(place / name).write_text(text) for name in ("a", "b", "c")]

    replace_folder(target, "model", write("old"))
    unlink, left = Path.unlink, deleted

    def killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt) if deleted < 3 else nullcontext():
            replace_folder(target, "model", write("new"))
    assert not hidden_sibling(target, REPLACED).exists()
    assert {path.name: path.read_text() for path in target.iterdir() if path.name != MARKER} == dict.fromkeys(
        "abc", "new"
    )
    shutil.rmtree(target)
    recover(target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("suffix", [PARTIAL, REPLACED])
def test_killed_before_the_list_or_after_its_deletion(suffix: str, begun: bool, tmp_path: Path) -> None:
    """Whatever moment a process was killed at, the next export finds its way free."""
    target = tmp_path / "model"
    left = hidden_sibling(target, suffix)
    left.mkdir()
    if begun:
        hidden_sibling(left / MARKER, PARTIAL).write_text("{")
    replace_folder(target, "model", lambda place: (place / "a").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_while_it_gives_up_or_empties_a_stage(tmp_path: Path, monkeypatch) -> None:
    """Folders that are deleted keep their list to the last, so that the next run takes them for its own."""
    stage = tmp_path / "sft"
    doors = {
        stage / "model": lambda: _clear(stage),
        hidden_sibling(tmp_path / "model", PARTIAL): lambda: recover(tmp_path / "model"),
    }
    for folder in doors:
        folder.mkdir(parents=True)
        for name in "abc":
            (folder / name).write_text("old")
        mark(folder, "model")
    mark(stage, "stage", ["model"])
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "b":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    for folder, delete in doors.items():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                delete()
        assert (folder / "b").exists()
        check_replaceable(folder, "model")
        delete()
        assert not folder.exists()


def test_a_place_is_held_by_one_process(tmp_path: Path) -> None:
    """Another process is another file description: locks of one do not count for the other."""
    place = tmp_path / "model"
    other = os.open(hidden_sibling(place, LOCK), os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"another process writes to '.*/model': wait for it, or choose another"):
        hold(place)
    os.close(other)
    hold(place)
    hold(place)
    third = os.open(hidden_sibling(place, LOCK), os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(third)
    release(place)
    assert list(tmp_path.iterdir()) == []


# Every writer of a fit.

FOREIGN = {
    "model/config.json": "of another program",
    "model.json": '{"mine": 1}',
    "history.jsonl": "mine\n",
    "checkpoints/step=1.ckpt": "of another run",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_fit_refuses_what_it_would_replace_before_it_trains(
    name: str, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FOREIGN[name])
    before = content(tmp_path)
    callbacks = [ModelExport(str(tmp_path / "model")), TrainingCheckpoint(str(tmp_path / "checkpoints"))]
    with pytest.raises(ValueError, match=r"choose another (folder|path)"):
        fit(tiny_model_folder("llama"), callbacks, logger=JSONLLogger(str(tmp_path / "history.jsonl")))
    after = content(tmp_path)
    assert {key: after[key] for key in before} == before
    assert not [key for key in after if key.endswith((".safetensors", ".ckpt")) and key not in before]


def test_what_a_run_made_is_its_own(tiny_model_folder: Folder, tmp_path: Path) -> None:
    """A second run replaces its own export, never one of another kind; checkpoints of another run are not touched."""
    model, place = tiny_model_folder("llama"), tmp_path / "model"
    saver = TrainingCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=1, keep=1)
    fit(model, [ModelExport(str(place)), saver])
    for unrelated in ("notes.txt", "step=final.ckpt", ".other.partial", ".step=1.ckpt.partial"):
        (tmp_path / "checkpoints" / unrelated).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoints of another run \(the newest: step="):
        fit(model, [TrainingCheckpoint(str(tmp_path / "checkpoints"))])
    with pytest.raises(ValueError, match="holds a model, and this run writes a adapter"):
        fit(model, [ModelExport(str(place))], lora=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt', which this package did not write"):
        fit(model, [ModelExport(str(place))])
    (place / "notes.txt").unlink()
    fit(model, [ModelExport(str(place)), saver], fast_dev_run=True)
    assert content(tmp_path) == before, "fast_dev_run writes and deletes nothing"
    again = TrainingCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=1, keep=1)
    fit(model, [ModelExport(str(place)), again], ckpt_path="last", max_steps=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == sorted(["notes.txt", "step=final.ckpt", ".other.partial", ".step=1.ckpt.partial", "step=3.ckpt"])
    assert json.loads((tmp_path / "model.json").read_text())["step"] == 3


def test_numbered_exports_leave_their_neighbours_alone(tiny_model_folder: Folder, tmp_path: Path) -> None:
    for name in (".keep.old", ".keep.partial", "at-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = content(tmp_path)
    fit(tiny_model_folder("llama"), [ModelExport(str(tmp_path / "at-{step}"))])
    after = content(tmp_path)
    assert {key: after[key] for key in before} == before
    (tmp_path / "at-2/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"at-2' holds 'notes.txt'"):
        fit(tiny_model_folder("llama"), [ModelExport(str(tmp_path / "at-{step}"), every_n_steps=1)])


def test_a_later_look_does_not_replace_what_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    logger = JSONLLogger(str(path))
    for step in range(3):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    later = JSONLLogger(str(path))
    later.begin("validate")
    later.log_metrics({"val/loss": 9.0}, step=0)
    rows = read_history(path)
    assert [row["train/loss"] for row in rows[:3]] == [0.0, 1.0, 2.0]
    assert rows[3] == {"step": 0, "run": "validate", "val/loss": 9.0}


# The command line.


def command(model: Path, rows: Path, root: Path) -> list[str]:
    return [
        "--model=SFTModule",
        f"--model.model={model}",
        "--data=SFTDataModule",
        f"--data.train={rows}",
        f"--data.val={rows}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
    ]


def test_a_config_file_is_never_written_over(tiny_model_folder: Folder, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("mine: 1\n")
    args = command(tiny_model_folder("llama"), rows, root)
    main(["fit", *args])
    assert (root / "config.yaml").read_text() == "mine: 1\n"
    assert yaml.safe_load((root / "config-1.yaml").read_text())["trainer"]["max_steps"] == 1
    before = content(root)
    main(["validate", *args])
    assert content(root) == before


# Pipelines.


def pipeline(tmp_path: Path, model: Path, stage: str = "data", **trainer: object) -> dict[str, object]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "run_dir": str(tmp_path / "run"),
        "stages": {
            stage: {
                "kind": "fit",
                "model": {"class_path": "rlhf_lightning.SFTModule", "init_args": {"model": str(model)}},
                "data": {
                    "class_path": "rlhf_lightning.datamodules.SFTDataModule",
                    "init_args": {"train": str(rows), "global_batch_size": 4},
                },
                "trainer": {"accelerator": "cpu", "max_steps": 1} | trainer,
            }
        },
    }


def run(tmp_path: Path, written: dict[str, object]) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written))
    run_pipeline(load_pipeline(file), lambda line: None)


@pytest.mark.parametrize(
    "name", ["data/mine.txt", "data", "manifest.json", "summary.json", "report.html", "data/model/mine.txt"]
)
def test_a_pipeline_refuses_folders_and_files_that_are_not_its_own(
    name: str, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"not made by a pipeline|not written by this package|is a file|is damaged"):
        run(tmp_path, pipeline(tmp_path, tiny_model_folder("llama")))
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("trainer", [{"fast_dev_run": True}, {"max_stepz": 3}])
def test_a_pipeline_with_a_mistake_makes_no_folder(
    trainer: dict[str, object], tiny_model_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=r"fast_dev_run|max_stepz"):
        run(tmp_path, pipeline(tmp_path, tiny_model_folder("llama"), **trainer))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_runs_again_removes_what_it_wrote_and_nothing_else(
    tiny_model_folder: Folder, tmp_path: Path
) -> None:
    model = tiny_model_folder("llama")
    run(tmp_path, pipeline(tmp_path, model))
    (tmp_path / "run/data/notes.txt").write_text("mine")
    (tmp_path / "run/notes.txt").write_text("mine")
    first = (tmp_path / "run/data/model/model.safetensors").read_bytes()
    run(tmp_path, pipeline(tmp_path, model, max_steps=2))
    assert (tmp_path / "run/data/notes.txt").read_text() == "mine"
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert (tmp_path / "run/data/model/model.safetensors").read_bytes() != first
    (tmp_path / "run/data/model/notes.txt").write_text("mine")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"stage 'data': .*holds 'notes\.txt', which this package did not write"):
        run(tmp_path, pipeline(tmp_path, model, max_steps=1))
    assert content(tmp_path / "run") == before


def test_later_checkpoints_of_another_run_are_not_replaced(tiny_model_folder: Folder, tmp_path: Path) -> None:
    """A whole one is refused; one from which nobody can resume is moved aside."""
    model, folder = tiny_model_folder("llama"), tmp_path / "checkpoints"
    fit(model, [TrainingCheckpoint(str(folder), every_n_steps=1)], max_steps=2)
    shutil.copy(folder / "step=2.ckpt", folder / "step=3.ckpt")
    before = content(folder)
    with pytest.raises(ValueError, match=r"step=3.ckpt' was not made by this run, which would replace it at that step"):
        fit(model, [TrainingCheckpoint(str(folder))], max_steps=4, ckpt_path=folder / "step=2.ckpt")
    assert content(folder) == before
    os.truncate(folder / "step=3.ckpt", 100)
    fit(model, [TrainingCheckpoint(str(folder), every_n_steps=1)], max_steps=3, ckpt_path=folder / "step=2.ckpt")
    assert (folder / "step=3.ckpt.damaged").read_bytes() == before["step=3.ckpt"][:100]
    assert zipfile.is_zipfile(folder / "step=3.ckpt")
