"""Faults around a run give one line, and nothing that was there is lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.callbacks import ModelExport, TrainingCheckpoint
from rlhf_lightning.cli import main
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.models.loading import load_causal_lm

from ..helpers import char_tokenizer, tiny_model

ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(8)]


class At(lightning.Callback):
    """Does something after a step, before checkpoints are made."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.act()


def fit(model: Path, folder: Path, *callbacks: Any, rows: Any = ROWS, every: int = 1, **options: Any) -> SFTModule:
    lightning.seed_everything(0, verbose=False)
    module = options.pop("module", None) or SFTModule(str(model), lora={"r": 2, "lora_dropout": 0.2})
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[*callbacks, TrainingCheckpoint(str(folder), every_n_steps=every, keep=9)],
        max_steps=4,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, SFTDataModule(train=rows, val=rows, global_batch_size=2), **options)
    return module


def trained(module: SFTModule) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@contextmanager
def no_room() -> Iterator[Any]:
    """Yields what fills the disk: no file can grow beyond a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def complaint(tmp_path, capsys, *options):
    """The last line of a command that fails on a file, without a traceback."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = ["accelerator=cpu", "max_steps=1", "logger=false", "enable_progress_bar=false"]
    trainer += ["enable_model_summary=false", f"default_root_dir={tmp_path / 'out'}"]
    data = ["--data=SFTDataModule", f"--data.train={rows}"]
    with pytest.raises(SystemExit):
        main(["fit", "--model=SFTModule", *options, *data, *(f"--trainer.{option}" for option in trainer)])
    said = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in said)
    return said[-1]


def test_no_room_for_a_checkpoint(tiny_model_folder, tmp_path):
    whole = trained(fit(tiny_model_folder(), tmp_path / "whole"))
    with (
        no_room() as fill,
        pytest.raises(ValueError, match=r"^cannot write the checkpoint '.*step=3.ckpt' \(") as error,
    ):
        fit(tiny_model_folder(), tmp_path / "full", At(3, fill))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    assert_equal(trained(fit(tiny_model_folder(), tmp_path / "full", ckpt_path="last")), whole)


def test_no_room_for_an_export(tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "out/model"), every_n_steps=2)
    with no_room() as fill, pytest.raises(ValueError, match=r"^cannot write the model to '.*model' \(.*\): free"):
        fit(tiny_model_folder(), tmp_path / "c", At(3, fill), export, every=99)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "model.json"]
    assert load_file(tmp_path / "out/model/adapter_model.safetensors")
    assert json.loads((tmp_path / "out/model.json").read_text())["step"] == 2


def test_a_place_that_cannot_be_written_is_refused_before_training(tiny_model_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    never = At(1, lambda: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to '.*/file/c': '.*/file' is a file"):
        fit(tiny_model_folder(), tmp_path / "file/c", never)
    with pytest.raises(ValueError, match=r"the model cannot be written to '.*/file': '.*/file' is a file"):
        fit(tiny_model_folder(), tmp_path / "c", never, ModelExport(str(tmp_path / "file/model")))
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to '.*/c': '.*' is read-only for this user"):
        fit(tiny_model_folder(), tmp_path / "c", never)


def test_a_damaged_checkpoint(tiny_model_folder, tmp_path, capsys):
    whole = trained(fit(tiny_model_folder(), tmp_path / "c"))
    os.truncate(tmp_path / "c/step=4.ckpt", 5000)
    with pytest.raises(ValueError, match=r"step=4.ckpt' is damaged \(.*\): resume from another one"):
        fit(tiny_model_folder(), tmp_path / "d", ckpt_path=tmp_path / "c/step=4.ckpt")
    with pytest.warns(UserWarning, match="step=4.ckpt' is damaged"):
        assert_equal(trained(fit(tiny_model_folder(), tmp_path / "c", ckpt_path="last")), whole)
    os.truncate(tmp_path / "c/step=3.ckpt", 5000)
    assert "step=3.ckpt' is damaged" in complaint(
        tmp_path, capsys, f"--model.model={tiny_model_folder()}", f"--ckpt_path={tmp_path / 'c/step=3.ckpt'}"
    )


def test_rows_that_changed_between_two_runs(tiny_model_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fit(tiny_model_folder(), tmp_path / "c", rows=str(file))
    (tmp_path / "c/step=4.ckpt").unlink()
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:-1], {"prompt": "1+1=?", "completion": "#3"}]))
    with pytest.raises(ValueError, match="cannot resume on other data: the rows' fingerprint was") as error:
        fit(tiny_model_folder(), tmp_path / "c", rows=str(file), ckpt_path="last")
    assert "\n" not in str(error.value)


def test_a_file_of_rows_that_was_cut_short_between_two_runs(tiny_model_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fit(tiny_model_folder(), tmp_path / "c", rows=str(file))
    for size in (file.stat().st_size - 9, len(json.dumps(ROWS[0])) + 1):  # within a row, and between two
        os.truncate(file, size)
        within = r"^.*rows.jsonl:8: .*JSON" if size > 99 else "cannot resume on other data: the number of rows was 8"
        with pytest.raises(ValueError, match=within) as error:
            fit(tiny_model_folder(), tmp_path / "c", rows=str(file), ckpt_path="last")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["half", "nothing", "noise"])
def test_a_damaged_shard_of_a_model(tmp_path, capsys, content):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    char_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    whole = shards[1].read_bytes()
    shards[1].write_bytes({"half": whole[: len(whole) // 2], "nothing": b"", "noise": b"\xff" * 99}[content])
    with pytest.raises(ValueError, match=rf"^cannot load .*: {shards[1].name} is damaged \(.*\); copy") as error:
        load_causal_lm(folder, dtype=torch.float32)
    assert "\n" not in str(error.value)
    if content != "half":
        return
    assert f"{shards[1].name} is damaged" in complaint(tmp_path, capsys, f"--model.model={folder}")


def test_a_damaged_head_of_a_reward_model(tiny_model_folder, tmp_path):
    module = RewardModule(str(tiny_model_folder()), pooling="mean")
    module.configure_model()
    module.save_pretrained(str(tmp_path / "model"))
    os.truncate(tmp_path / "model/reward_head.safetensors", 20)
    with pytest.raises(ValueError, match=r"^cannot read '.*': reward_head.safetensors is damaged \(.*\); copy"):
        RewardModule.from_pretrained(str(tmp_path / "model")).configure_model()


@pytest.mark.parametrize(
    ("on_too_long", "kept", "size"),
    [
        pytest.param("drop", {"dropped": 1, "truncated": 0, "kept": 1, "longest": 10}, 10, marks=pytest.mark.slow),
        ("truncate_end", {"dropped": 0, "truncated": 1, "kept": 2, "longest": 64}, 1),
        ("error", {}, 1),
    ],
)
def test_a_row_of_megabytes(tokenizer, tmp_path, on_too_long, kept, size):
    """One token per byte, which is the worst that there is."""
    file, size = tmp_path / "rows.jsonl", size * 1_000_000
    rows = [{"prompt": "1+1=?", "completion": "1" * size}, {"prompt": "22+2=?", "completion": "4=4"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    data = SFTDataModule(train=str(file), tokenizer=tokenizer, max_length=64, on_too_long=on_too_long)
    if on_too_long == "error":
        with pytest.raises(ValueError, match=r"rows.jsonl:1: 1000006 tokens, expected at most max_length=64") as error:
            data.setup("fit")
        assert "\n" not in str(error.value)
    else:
        data.setup("fit")
        assert {name: data.report["train"][name] for name in kept} == kept
    assert time.process_time() - begun < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < 400 * size + 2**28


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_step(tiny_model_folder, tmp_path, bad):
    class Broken(SFTModule):
        breaks = True

        def loss(self, rows: Any, normalizers: Any) -> torch.Tensor:
            training = self.trainer.state.stage == "train" and torch.is_grad_enabled()
            broken = self.breaks and training and self.trainer.global_step == 2
            return super().loss(rows, normalizers) * (bad if broken else 1.0)

    whole = trained(fit(tiny_model_folder(), tmp_path / "whole"))
    module = Broken(str(tiny_model_folder()), lora={"r": 2, "lora_dropout": 0.2})
    with pytest.raises(ValueError, match=r"^the gradient's norm is (nan|inf) in step 3 \(rows memory:\d, memory:\d\)"):
        fit(tiny_model_folder(), tmp_path / "c", module=module)
    stored = torch.load(tmp_path / "c/step=2.ckpt", weights_only=True)["state_dict"]
    assert_equal(trained(module), stored)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    repaired = Broken(str(tiny_model_folder()), lora={"r": 2, "lora_dropout": 0.2})
    repaired.breaks = False
    assert_equal(trained(fit(tiny_model_folder(), tmp_path / "c", module=repaired, ckpt_path="last")), whole)


def test_after_sigterm_the_run_continues_from_the_step_that_it_had_made(tiny_model_folder, tmp_path):
    whole = trained(fit(tiny_model_folder(), tmp_path / "whole"))
    for step in (2, 4):  # in the middle of an epoch, and at its end
        folder = tmp_path / f"{step}"
        terminate = At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            fit(tiny_model_folder(), folder, terminate, every=99)
        assert [path.name for path in folder.iterdir()] == [f"step={step}.ckpt"]
        resumed = fit(tiny_model_folder(), folder, ckpt_path="last", every=99)
        assert_equal(trained(resumed), whole)
