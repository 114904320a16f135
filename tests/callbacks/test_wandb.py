"""The files of a run for W&B, read back from the bytes of its file and compared with a plain log of the same run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from rlhf_lightning.callbacks import GenerationAccuracy, JSONLLogger, ModelExport, SampleLogger, Throughput
from rlhf_lightning.loggers import read_history
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import char_tokenizer, save_tiny_model
from ..invariance.harness import Batches, trainer
from ..rl.fixed_rollouts import FixedGRPO, fixed_completions, options
from .wandb_files import artifacts, axes, history

AXIS = "trainer/global_step"


def long_answers(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) > 4) for text in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations of two optimizer steps each, with a validation after the second and the fourth."""
    import wandb

    place = tmp_path_factory.mktemp("run")
    folder = str(save_tiny_model(place / "policy", "llama"))
    rows = [{"prompt": f"[{n}]?"} for n in range(4)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = [char_tokenizer()(row["prompt"])["input_ids"] for row in rows]
    examples = [Example(f"rows:{n}", Segment(tokens[n]), row) for n, row in enumerate(rows)]
    loggers = [
        WandbLogger(project="test", save_dir=place, offline=True),
        JSONLLogger(str(place / "history.jsonl")),
    ]
    training = trainer("32-true", max_epochs=1, num_sanity_val_steps=0, logger=loggers, log_every_n_steps=1)
    training.fit_loop.epoch_loop.val_check_batch = 2
    training.val_check_interval = 2
    training.callbacks += [
        GenerationAccuracy(str(place / "prompts.jsonl"), f"{__name__}.long_answers", max_new_tokens=6),
        SampleLogger(every_n_batches=2, num_prompts=1, num_samples=2, screen=False),
        Throughput(peak_flops=1e9),
        ModelExport(str(place / "export"), log_artifact=True),
    ]
    module = FixedGRPO(folder, **options(num_generations=3, num_updates=2))
    training.fit(module, Batches(*[ExampleBatch(examples)] * 4), Batches(ExampleBatch(examples[:2])))
    assert training.global_step == 8
    wandb.finish()
    wandb.teardown()  # waits until the file is whole
    return place


def test_everything_has_the_axis(run: Path) -> None:
    assert axes(run)["*"] == AXIS
    steps = [row[AXIS] for row in history(run)]
    assert steps[0] == 0  # what was measured before the first step
    assert steps == sorted(steps)
    # W&B's own count of rows never goes back either, so that it has nothing to warn of.
    rows = [row["_step"] for row in history(run)]
    assert rows == sorted(set(rows))


def test_values_are_the_logged_ones(run: Path) -> None:
    expected = read_history(run / "history.jsonl")
    found = [row for row in history(run) if not any(name.startswith(("train/samples", "val/samples")) for name in row)]
    assert len(found) == len(expected)
    names: set[str] = set()
    for got, want in zip(found, expected, strict=True):
        names |= want.keys()
        assert got[AXIS] == want.pop("step")
        for name, value in want.items():
            if value is None:
                assert not isinstance(got[name], float) or not math.isfinite(got[name])
            else:
                assert got[name] == pytest.approx(value, rel=1e-12)
    assert {"train/reward", "val/reward", "val/accuracy", "train/loss", "time/generate", "throughput/mfu"} <= names


def test_accuracy_before_the_first_step(run: Path) -> None:
    first = history(run)[0]
    assert first[AXIS] == 0
    assert {name for name in first if "/" in name and not name.startswith("_")} == {"val/accuracy", AXIS}
    assert first["val/accuracy"] in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_tables_of_samples(run: Path) -> None:
    places = []
    for row in history(run):
        for stage in ("train", "val"):
            if f"{stage}/samples/path" in row:
                [file] = run.rglob(f"files/{row[f'{stage}/samples/path']}")
                table = json.loads(file.read_text())
                assert table["columns"][1:4] == ["prompt", "completion", "tokens"]
                texts = [sample.text for sample in fixed_completions("rows:0", 3)[:2]]
                assert [data[1:3] for data in table["data"]] == [["[0]?", text] for text in texts]
                places.append((stage, row[AXIS]))
    assert [step for stage, step in places if stage == "train"] == [0, 2]
    assert len([stage for stage, _ in places if stage == "val"]) == 2


def test_the_model_as_an_artifact(run: Path) -> None:
    [artifact] = [artifact for artifact in artifacts(run) if artifact.type == "model"]  # W&B makes one of a table, too
    assert artifact.name.startswith("export-")
    assert sorted(artifact.aliases) == ["latest", "step-8"]  # W&B keeps them in a set: in any order
    assert json.loads(artifact.metadata) == {"step": 8, "monitor": None, "value": None}
    files = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert files == {
        str(file.relative_to(run / "export")): file.stat().st_size
        for file in (run / "export").rglob("*")
        if file.is_file()
    }
    assert "model.safetensors" in files
