"""Bad input gives one line that says what is wrong and what to write instead, and leaves no files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main

GOOD = {"prompt": "1+1=?", "chosen": "#2", "rejected": "#3"}


def written(file: Path, rows: list[Any]) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def command(tiny_model_folder, tmp_path):
    """Runs ``fit`` with one thing changed and returns what it said, after checking that it failed and left nothing."""

    def run(capsys, rows: list[Any] | None = None, model: Any = None, *extra: str) -> str:
        file = written(tmp_path / "pairs.jsonl", rows or [GOOD] * 4)
        export = [{"class_path": "ModelExport", "init_args": {"folder": str(tmp_path / "out/model")}}]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            main(
                [
                    "fit",
                    "--model=DPOModule",
                    f"--model.model={model or tiny_model_folder()}",
                    "--data=PreferenceDataModule",
                    f"--data.train={file}",
                    f"--trainer.callbacks={json.dumps(export)}",
                    f"--trainer.default_root_dir={tmp_path / 'out'}",
                    "--trainer.accelerator=cpu",
                    "--trainer.max_steps=1",
                    "--trainer.logger=false",
                    "--trainer.enable_progress_bar=false",
                    "--trainer.enable_model_summary=false",
                    *extra,
                ]
            )
        assert exit_info.value.code in (1, 2)
        left = {path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path not in before}
        assert left <= {"out", "out/config.yaml"}  # what was asked for, once everything but the rows was found right
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        assert lines[-1].startswith("rlhf-lightning: ")
        assert sum(line.startswith("rlhf-lightning: ") for line in lines) == 1
        return lines[-1]

    return run


def test_missing_column(command, capsys):
    said = command(capsys, [GOOD, {"prompt": "1+1=?", "chosenn": "#2", "rejected": "#3"}])
    assert "pairs.jsonl:2" in said
    assert "no column 'chosen'" in said
    assert "did you mean 'chosenn'?" in said
    assert "columns=" in said


def test_empty_completion(command, capsys):
    said = command(capsys, [GOOD, GOOD, {**GOOD, "rejected": ""}])
    assert "pairs.jsonl:3" in said
    assert "'rejected' is empty" in said
    assert "remove the row" in said


def test_row_that_is_not_json(command, capsys):
    said = command(capsys, [GOOD, "{'prompt': 1"])
    assert "pairs.jsonl:2" in said
    assert "JSON" in said


def test_unknown_loss_type(command, capsys):
    said = command(capsys, None, None, "--model.loss_type=sigmod")
    assert "loss_type: 'sigmod' is not allowed" in said
    assert "hinge" in said
    assert "did you mean 'sigmoid'?" in said


def test_negative_beta(command, capsys):
    said = command(capsys, None, None, "--model.beta=-0.1")
    assert "beta" in said
    assert "-0.1" in said
    assert "above 0" in said


def test_model_folder_without_tokenizer(command, capsys, tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny_model_folder(), folder)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    said = command(capsys, None, folder)
    assert "tokenizer" in said
    assert str(folder) in said
    assert "tokenizer.json" in said


@pytest.mark.parametrize(
    ("flag", "instead"),
    [("accumulate_grad_batches=2", "global_batch_size"), ("gradient_clip_val=1.0", "max_grad_norm")],
)
def test_trainer_flags(command, capsys, flag, instead):
    said = command(capsys, None, None, f"--trainer.{flag}")
    assert flag.partition("=")[0] in said
    assert instead in said


def test_sequence_longer_than_the_models_positions(command, capsys):
    said = command(capsys, [GOOD, {**GOOD, "chosen": "1" * 300}])
    assert "pairs.jsonl:2" in said
    assert "128 positions" in said
    assert "max_length" in said


def test_a_model_that_is_nowhere(command, capsys):
    assert "there is no folder" in command(capsys, None, "./nowhere")


def test_in_a_pipeline_the_stage_is_named_and_starts_again(tiny_model_folder, tmp_path, capsys):
    """A stage that fails half-way is not taken for finished, and runs once the mistake is fixed."""
    rows = written(tmp_path / "pairs.jsonl", [GOOD] * 3 + [{**GOOD, "chosen": "1" * 300}])
    pipeline = {
        "run_dir": str(tmp_path / "run"),
        "stages": {
            "dpo": {
                "kind": "fit",
                "model": {"class_path": "DPOModule", "init_args": {"model": str(tiny_model_folder())}},
                "data": {
                    "class_path": "PreferenceDataModule",
                    "init_args": {"train": rows, "global_batch_size": 1, "shuffle": False},
                },
                "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False},
            }
        },
    }
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(pipeline))
    with pytest.raises(SystemExit) as exit_info:
        main(["pipeline", "--config", str(file)])
    assert exit_info.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rlhf-lightning: stage 'dpo': row ")
    assert "128 positions" in said
    assert not (tmp_path / "run/dpo/model").exists()
    assert json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["dpo"]["status"] == "running"
    assert not (tmp_path / "run/report.html").exists()
    main(["pipeline", "--config", str(file), "stages.dpo.data.init_args.max_length=100"])
    record = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["dpo"]
    assert record["status"] == "finished"
    assert record["metrics"]["steps"] == 3
    assert (tmp_path / "run/dpo/model/model.safetensors").is_file()
