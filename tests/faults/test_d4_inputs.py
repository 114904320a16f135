"""Whatever a stage reads besides its configuration is part of what it is a function of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_lightning.pipeline.manifest import stage_key
from rlhf_lightning.utils.inputs import input_hashes, own_sources


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, in which there is one of each kind of input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the current folder is added
    for name in ("gsm8k", "base", "base2", "adapter", "my_tools", "rows+more"):
        (tmp_path / name).mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    (tmp_path / "base/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base2"}))
    (tmp_path / "base2/model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"adapter")
    adapter = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "my_verifier_d4.py").write_text("import my_helper_d4\n\ndef check(): ...\n")
    (tmp_path / "my_helper_d4.py").write_text("LIMIT = 1\n")
    (tmp_path / "my_tools/__init__.py").write_text("")
    (tmp_path / "my_tools/rewards.py").write_text("from .limits import LIMIT\n\nclass Good: ...\n")
    (tmp_path / "my_tools/limits.py").write_text("LIMIT = 1\n")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "rows+more/train.jsonl").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text("{}")
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path / "gsm8k"))
    return tmp_path


REWARDS = ["my_verifier_d4.check", {"class_path": "my_tools.rewards.Good"}]
CONFIG = {
    "model": {"init_args": {"model": "adapter", "rewards": REWARDS}},
    "data": {
        "init_args": {
            "train": ["gsm8k:prompts?rows=3", "pairs.jsonl"],
            "val": "gsm8k:prompts?path=rows+more",
            "transform": "my_tools.rewards.Good",
            "chat_template": "template.jinja",
        }
    },
}
READ = [
    "gsm8k/train.jsonl",
    "adapter/adapter_model.safetensors",
    "base/model.safetensors",
    "base2/model.safetensors",
    "my_verifier_d4.py",
    "my_helper_d4.py",
    "my_tools/rewards.py",
    "my_tools/limits.py",
    "template.jinja",
    "rows+more/train.jsonl",
    "pairs.jsonl",
]


@pytest.mark.parametrize("file", READ)
def test_a_change_of_any_input_changes_the_key(file: str, place: Path) -> None:
    def key() -> str:
        return stage_key(CONFIG, input_hashes(CONFIG), place / "run")

    before = key()
    assert key() == before
    written = (place / file).read_bytes()
    (place / file).write_bytes(written + b"\n# another\n")
    assert key() != before
    (place / file).write_bytes(written)
    assert key() == before


def test_another_folder_of_gsm8k_is_another_input(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"prompts": "gsm8k:prompts?rows=3"}
    before = input_hashes(config)
    monkeypatch.setenv("GSM8K_DIR", str(place / "rows+more"))
    (place / "rows+more/train.jsonl").write_text('{"a": 1}')
    assert input_hashes(config) != before


def test_what_nobody_reads_changes_nothing(place: Path) -> None:
    callbacks = [{"init_args": {"dirpath": str(place)}}]
    config = CONFIG | {"trainer": {"default_root_dir": str(place), "callbacks": callbacks}}
    before = input_hashes(config)
    (place / "notes.txt").write_text("another")
    (place / "unused.py").write_text("pass")
    assert input_hashes(config) == before


def test_sources_of_installed_packages_are_left_to_their_versions(place: Path) -> None:
    for dotted in ("torch.optim.AdamW", "json.dumps", "rlhf_lightning.modules.DPOModule", "no_such.thing", "my_tools"):
        assert (own_sources(dotted) == []) == (dotted != "my_tools")
    assert [file.name for file in own_sources("my_verifier_d4.check")] == ["my_helper_d4.py", "my_verifier_d4.py"]


def test_the_module_is_not_run(place: Path) -> None:
    (place / "loud_d4.py").write_text("raise SystemExit('run')\n")
    assert [file.name for file in own_sources("loud_d4.thing")] == ["loud_d4.py"]
    assert "source of loud_d4.thing" in input_hashes({"verifier": "loud_d4.thing"})


@pytest.mark.parametrize("odd", ["a" * 5000, "a\0b", "", "~", ".", "${x}", "x?y=%ff", "\ud800"])
def test_odd_texts_are_no_inputs(odd: str, place: Path) -> None:
    assert input_hashes({"anything": odd}) == {}
