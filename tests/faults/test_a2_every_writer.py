"""Every writer that finds a file of somebody else in its place refuses in one line, and leaves the file alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import (
    JSONLLogger,
    ModelExport,
    PredictionWriter,
    SelfImprovement,
    TrainingCheckpoint,
)
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.evaluation.contamination_command import run_command as find_contamination
from rlhf_lightning.evaluation.report import Report
from rlhf_lightning.export import export_folder, export_gguf
from rlhf_lightning.generation.compress import CompressOptions, compress_rows
from rlhf_lightning.generation.output import Output
from rlhf_lightning.labeling.command import LabelOptions, _Journal, label_prompts
from rlhf_lightning.merging import greedy_soup, merge, uniform_soup
from rlhf_lightning.merging.conflicts import ConflictReport, TensorConflict
from rlhf_lightning.models import load_causal_lm, load_tokenizer
from rlhf_lightning.models.saving import save_pretrained
from rlhf_lightning.self_improvement.snapshots import Snapshots

from .test_a2_nothing_foreign_is_touched import content, fit

ROWS = [{"prompt": "1+1=", "completion": "2"}]
Write = Callable[[Path, Path], object]  # of a model's folder, and the folder to write in


def started(callback: Any, stage: str) -> None:
    """Asks a callback as a trainer does at its start."""
    data = SFTDataModule(train=ROWS, global_batch_size=1)
    callback.setup(SimpleNamespace(datamodule=data, global_step=0, fast_dev_run=False), SFTModule("unread"), stage)


def conflicts() -> ConflictReport:
    return ConflictReport(["a", "b"], None, [(0, 1)], [TensorConflict("w", [0.1, 0.2], [0.5], [0.0])], [1.0], [])


def no_metric(folder: Path) -> float:
    raise AssertionError("a model is evaluated before the place is checked")


def saved(model: Path, folder: Path) -> None:
    save_pretrained(load_causal_lm(model, dtype=torch.float32), load_tokenizer(model), folder)


def generated(path: Path) -> None:
    output = Output(path, {"seed": 1}, [(0, 0)])
    try:
        output.open()
    finally:
        output.release()


def compressing(model: Path, path: Path) -> CompressOptions:
    return CompressOptions(model=str(model), compressor="truncation", input="rows.jsonl", output=str(path))


def labelled(model: Path, path: Path) -> None:
    label_prompts(LabelOptions("sums:prompts?rows=1", str(path), str(model)))


class Writer(NamedTuple):
    """A writer, and a file of somebody else in its way."""

    name: str
    file: str
    write: Write


WRITERS = (
    Writer("fit: export", "model/config.json", lambda m, at: fit(m, [ModelExport(str(at / "model"))])),
    Writer("fit: record of an export", "model.json", lambda m, at: fit(m, [ModelExport(str(at / "model"))])),
    Writer("fit: checkpoints", "saved/step=1.ckpt", lambda m, at: fit(m, [TrainingCheckpoint(str(at / "saved"))])),
    Writer("fit: history", "log.jsonl", lambda m, at: fit(m, [], logger=JSONLLogger(str(at / "log.jsonl")))),
    Writer("rounds", "round-1.jsonl", lambda m, at: started(SelfImprovement("p", str(at)), "fit")),
    Writer("kept rows", "round-1.replay.jsonl", lambda m, at: started(SelfImprovement("p", str(at)), "fit")),
    Writer("rounds again", "round-2-attempt-1.jsonl", lambda m, at: started(SelfImprovement("p", str(at)), "fit")),
    Writer("gate: manifest", "manifest.json", lambda m, at: Snapshots(at, 1).refuse_others()),
    Writer("gate: results", "step=3.json", lambda m, at: Snapshots(at, 1).refuse_others()),
    Writer("gate: checkpoint", "step=3.ckpt", lambda m, at: Snapshots(at, 1).refuse_others()),
    Writer("predictions", "rows.jsonl", lambda m, at: started(PredictionWriter(str(at / "rows.jsonl")), "predict")),
    Writer("save_pretrained", "model/notes.txt", lambda m, at: saved(m, at / "model")),
    Writer("merge", "model/notes.txt", lambda m, at: merge("linear", models=[m, m], output=at / "model")),
    Writer("uniform soup", "model/notes.txt", lambda m, at: uniform_soup([m, m], at / "model")),
    Writer("greedy soup", "model/notes.txt", lambda m, at: greedy_soup([m, m], at / "model", evaluate=no_metric)),
    Writer("soup: record", "model.soup.json", lambda m, at: greedy_soup([m, m], at / "model", evaluate=no_metric)),
    Writer("conflicts: table", "conflicts.json", lambda m, at: conflicts().save(at)),
    Writer("conflicts: picture", "conflicts.png", lambda m, at: conflicts().save(at)),
    Writer("export", "model/notes.txt", lambda m, at: export_folder(m, at / "model")),
    Writer("export: GGUF", "model.gguf", lambda m, at: export_gguf(m, at / "model.gguf")),
    Writer("generate: rows", "out.jsonl", lambda m, at: generated(at / "out.jsonl")),
    Writer("generate: summary", "out.summary.json", lambda m, at: generated(at / "out.jsonl")),
    Writer(
        "compress",
        "out.jsonl",
        lambda m, at: compress_rows(compressing(m, at / "out.jsonl")),
    ),
    Writer("label-steps", "out.jsonl", lambda m, at: labelled(m, at / "out.jsonl")),
    Writer("label-steps: journal", ".out.jsonl.journal", lambda m, at: _Journal(at / "out.jsonl", {"seed": 1})),
    Writer("evaluate: results", "results.json", lambda m, at: Report("sums", ()).save(at)),
    Writer("evaluate: page", "report.html", lambda m, at: Report("sums", ()).save(at)),
    Writer("evaluate: history", "history.jsonl", lambda m, at: Report("sums", ()).save(at)),
    Writer(
        "contamination",
        "out.jsonl",
        lambda m, at: find_contamination(["--rows=a", "--against=b", f"--output={at / 'out.jsonl'}"]),
    ),
)
# A file that begins as our own does, and is another program's.
FOREIGN = {".gguf": b"GGUF of another program"}
ADVICE = r"choose another|another file|another name|move (it|that one) away"


@pytest.mark.parametrize("mine", [b"mine", b'{"mine": 1}\n'], ids=["text", "json"])
@pytest.mark.parametrize("writer", WRITERS, ids=[writer.name for writer in WRITERS])
def test_a_file_in_the_way_is_refused_and_stays(
    writer: Writer, mine: bytes, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model, place = tiny_model_folder("llama"), tmp_path / "place"
    planted = place / writer.file
    planted.parent.mkdir(parents=True)
    planted.write_bytes(FOREIGN.get(planted.suffix, mine))
    before = content(place)
    if writer.name == "export: GGUF":
        pytest.importorskip("gguf", reason="the extra gguf is not installed")
    with pytest.raises(ValueError, match=ADVICE) as refused:
        writer.write(model, place)
    assert "\n" not in str(refused.value)
    assert planted.name in str(refused.value) or str(planted.parent) in str(refused.value)
    assert {name: found for name, found in content(place).items() if not name.endswith(".lock")} == before


def test_what_they_wrote_themselves_is_replaced(tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, other = tiny_model_folder("llama"), tmp_path / "notes.txt"
    other.write_text("mine")
    moved = load_causal_lm(model, dtype=torch.float32)
    with torch.no_grad():
        moved.get_input_embeddings().weight.add_(0.1)
    save_pretrained(moved, load_tokenizer(model), tmp_path / "moved")
    for _ in range(2):
        conflicts().save(tmp_path)
        greedy_soup([model, tmp_path / "moved"], tmp_path / "soup", evaluate=lambda folder: 1.0)
        own = {tmp_path / f"rounds/round-1{kind}.jsonl": "{}\n" for kind in ("", ".replay")}
        SelfImprovement("p", str(tmp_path / "rounds"))._write(own)
        started(SelfImprovement("p", str(tmp_path / "rounds")), "fit")
    assert other.read_text() == "mine"
    with pytest.raises(ValueError, match=r"is the folder of a model, and a report of conflicts would change it"):
        conflicts().save(tmp_path / "soup")
