"""Files of a finished run: predictions in order, over ranks, and only the checkpoints that somebody asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lightning import DPOModule
from rlhf_lightning.callbacks import PredictionWriter
from rlhf_lightning.callbacks import prediction_writer as writer_file
from rlhf_lightning.cli import PostTrainingCLI, main
from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.loggers import read_history

Folder = Callable[[str], Path]
PAIRS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(5)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return file


def command(model: Path, pairs: Path, root: Path, *more: str) -> list[str]:
    return [
        "--model=DPOModule",
        f"--model.model={model}",
        "--data=PreferenceDataModule",
        *(f"--data.{split}={pairs}" for split in ("train", "val", "predict")),
        "--data.global_batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
        *more,
    ]


def test_predictions_are_written_in_order(
    tiny_model_folder: Folder, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep/scores.jsonl"
    args = command(tiny_model_folder("llama"), pairs, tmp_path / "run", "--trainer.logger=false")
    main(["predict", *args, f"--output={output}"])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    data = PreferenceDataModule(predict=PAIRS, global_batch_size=5, tokenizer=str(tiny_model_folder("llama")))
    data.setup("predict")
    module = DPOModule(str(tiny_model_folder("llama")))
    module.configure_model()
    expected = [row for batch in data.predict_dataloader() for row in module.eval().predict_step(batch, 0)]
    assert [row["row_id"].rpartition(":")[2] for row in found] == ["1", "2", "3", "4", "5"]
    for row, other in zip(found, expected, strict=True):
        assert row["chosen_logps"] == pytest.approx(other["chosen_logps"], rel=1e-5)
    before = output.read_bytes()
    for more, message in ((f"--output={output}", "already exists: remove it"), ("", "pass --output=FILE.jsonl")):
        with pytest.raises(SystemExit):
            main(["predict", *args, *([more] if more else [])])
        assert message in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["scores.jsonl"]


def test_predictions_of_several_ranks_are_put_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r has every third row of a global batch from r on; the last batch has one row."""
    ranks = iter([[[{"n": 0}, {"n": 3}], [{"n": 1}], [{"n": 2}]], [[{"n": 4, "x": float("nan")}], [], []]])
    monkeypatch.setattr(writer_file, "gather_objects", lambda own: next(ranks))
    one = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(is_global_zero=True, fast_dev_run=False, strategy=one)
    writer = PredictionWriter(str(tmp_path / "x.jsonl"))
    module: Any = None
    for batch in range(2):
        writer.on_predict_batch_end(trainer, module, [], None, batch)
        assert not (tmp_path / "x.jsonl").exists()
    writer.on_predict_end(trainer, module)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}, {"n": 4, "x": None}]


def test_an_export_is_not_written_a_second_time_by_lightning(
    tiny_model_folder: Folder, pairs: Path, tmp_path: Path
) -> None:
    def checkpoints(*more: str) -> int:
        args = command(tiny_model_folder("llama"), pairs, tmp_path / "run", "--trainer.logger=false", *more)
        return len(PostTrainingCLI(args, run=False).trainer.checkpoint_callbacks)

    export = ["--trainer.callbacks=ModelExport", f"--trainer.callbacks.folder={tmp_path}/model"]
    assert checkpoints() == 1  # otherwise nothing would be left of a run
    assert checkpoints(*export) == 0
    assert checkpoints(*export, "--trainer.enable_checkpointing=true") == 1
    saver = ["--trainer.callbacks+=TrainingCheckpoint", f"--trainer.callbacks.folder={tmp_path}/checkpoints"]
    assert checkpoints(*export, *saver) == 1


def test_a_validation_leaves_the_history_of_a_fit_alone(tiny_model_folder: Folder, pairs: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    logger = ["--trainer.logger=JSONLLogger", f"--trainer.logger.path={history}", "--trainer.log_every_n_steps=1"]
    args = command(tiny_model_folder("llama"), pairs, tmp_path / "run", "--trainer.enable_checkpointing=false", *logger)
    main(["fit", *args])
    before = read_history(history)
    assert [row["step"] for row in before if "train/loss" in row] == [0, 1]
    main(["validate", *args])
    after = read_history(history)
    assert after[: len(before)] == before
    assert after[len(before) :]
    assert all(row["run"] == "validate" for row in after[len(before) :])
