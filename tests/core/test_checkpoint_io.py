"""Checkpoint files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rlhf_lightning.core.checkpoint_io import AtomicCheckpointIO, damage, prepare_checkpoints
from rlhf_lightning.utils.files import PARTIAL, hidden_sibling

STATE = {"weights": torch.arange(5000), "step": 3}


def test_a_checkpoint_comes_back(tmp_path):
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "deep/x.ckpt")
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep/x.ckpt")
    assert torch.equal(found["weights"], STATE["weights"])
    assert found["step"] == 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.ckpt"]


def test_a_name_belongs_to_a_whole_file_at_every_moment(tmp_path, monkeypatch):
    """While the new one is written, flushed and renamed, the old one is what is found under the name."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    seen = []

    def looking(name, original):
        def call(*args, **kwargs):
            seen.append((name, torch.load(path, weights_only=True)["step"], damage(path)))
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "save", looking("save", torch.save))
    monkeypatch.setattr(os, "fsync", looking("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", looking("replace", Path.replace))
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert seen == [("save", 1, None), ("fsync", 1, None), ("replace", 1, None), ("fsync", 2, None)]


@pytest.mark.parametrize("kind", ["cut", "bit", "empty", "text"])
def test_damage_is_seen_and_said_in_a_line(tmp_path, kind):
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    content = path.read_bytes()
    assert damage(path) is None
    flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    path.write_bytes({"cut": content[:-100], "bit": flipped, "empty": b"", "text": b"nothing of that kind"}[kind])
    assert damage(path)
    with pytest.raises(ValueError, match=r"^the checkpoint '.*x.ckpt' is damaged \(.*\): resume from another") as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    hidden_sibling(path, PARTIAL).symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write the checkpoint .*x.ckpt' \(.*\): free disk space") as error:
        AtomicCheckpointIO().save_checkpoint({**STATE, "step": 4}, path)
    assert "\n" not in str(error.value)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]


def test_only_lightnings_default_is_replaced():
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    prepare_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    own = AsyncCheckpointIO()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[own])
    prepare_checkpoints(trainer)
    assert trainer.strategy.checkpoint_io is own
