"""Checkpoints and YAML hold values; whatever they name, nothing in them is run by reading them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning.core.checkpoint_io import AtomicCheckpointIO
from rlhf_lightning.distributed.strategy import FSDP2Strategy
from rlhf_lightning.utils import yaml_parser


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "exploded")}, file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "exploded").is_dir(), "it is one"
    (tmp_path / "exploded").rmdir()
    return file


@pytest.mark.parametrize("door", ["path", "file address", "fsdp2"])
def test_a_checkpoint_runs_nothing(door: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = FSDP2Strategy()
    monkeypatch.setattr(strategy, "broadcast", lambda value: value)
    read = strategy.load_checkpoint if door == "fsdp2" else AtomicCheckpointIO().load_checkpoint
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        read(f"file://{checkpoint}" if door == "file address" else str(checkpoint))
    assert not (checkpoint.parent / "exploded").exists()


def test_nor_does_one_from_an_address(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(url: str, map_location: Any = None, weights_only: bool = False, **options: Any) -> Any:
        asked.append(weights_only)
        return torch.load(checkpoint, map_location=map_location, weights_only=weights_only)

    there = SimpleNamespace(exists=lambda path: True)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: there)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("https://example.org/bomb.ckpt")
    assert asked == [True]
    assert not (checkpoint.parent / "exploded").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.mkdir [exploded]",
        "a: !!python/name:os.mkdir",
        "a: !!python/module:os",
        "- !!python/object/new:os.mkdir [exploded]",
    ],
)
def test_yaml_makes_plain_values(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="could not determine a constructor"):
        yaml_parser.load(text)
    assert list(tmp_path.iterdir()) == []
