"""Digests of contents and configurations, and writing that is whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rlhf_lightning.pipeline.manifest import Manifest, stage_key
from rlhf_lightning.utils.files import content_hash, write_atomically
from rlhf_lightning.utils.inputs import input_hashes


def test_content_hash_is_of_contents_and_names(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "x").write_text("1")
        (tmp_path / folder / "sub/y").write_text("2")
    assert content_hash(tmp_path / "a/x") == hashlib.sha256(b"1").hexdigest()
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b/x").rename(tmp_path / "b/z")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    assert content_hash(tmp_path / "none") is None


def test_inputs_are_what_a_configuration_reads(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "gsm"
    rows.write_text("{}")
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}")
    config = {
        "model": {"init_args": {"model": str(folder), "tokenizer": None}},
        "data": {"init_args": {"train": [str(rows), "sums:prompts?rows=2"], "val": f"gsm8k:prompts?path={folder}"}},
        "trainer": {"default_root_dir": str(tmp_path), "callbacks": [{"init_args": {"prompts": f"{rows}?a=b"}}]},
    }
    assert input_hashes(config) == {str(folder): content_hash(folder), str(rows): content_hash(rows)}


def test_packaged_models_are_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert input_hashes({"model": "configs/models/nano"}).keys() == {"configs/models/nano"}


def test_keys_follow_configs_and_inputs_and_not_the_run_directory():
    def key(run_dir: str, beta: float = 0.1, digest: str = "1") -> str:
        inputs = {f"{run_dir}/sft/model": digest, "/tmp/m/rows.jsonl": "2"}
        return stage_key({"beta": beta, "model": f"{run_dir}/sft/model"}, inputs, Path(run_dir))

    assert key("/tmp/a") == key("/tmp/z")
    assert len({key("/tmp/a"), key("/tmp/a", beta=0.2), key("/tmp/a", digest="3")}) == 3


def test_a_stage_is_finished_only_with_its_outputs_as_they_were(tmp_path):
    (tmp_path / "out").write_text("whole")
    manifest = Manifest(tmp_path / "manifest.json")
    manifest.stages["s"] = {"status": "finished", "key": "k", "outputs": {"out": content_hash(tmp_path / "out")}}
    manifest.save()
    manifest = Manifest(tmp_path / "manifest.json")
    assert manifest.is_finished("s", "k", tmp_path)
    assert not manifest.is_finished("s", "other", tmp_path)
    assert not manifest.is_finished("t", "k", tmp_path)
    (tmp_path / "out").write_text("half")
    assert not manifest.is_finished("s", "k", tmp_path)
    (tmp_path / "out").unlink()
    assert not manifest.is_finished("s", "k", tmp_path)
    manifest.stages["s"]["status"] = "running"
    (tmp_path / "out").write_text("whole")
    assert not manifest.is_finished("s", "k", tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "manifest.json"
    write_atomically(file, json.dumps({"stages": {"old": {}}}))

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "{}")
    assert Manifest(file).stages == {"old": {}}


def test_models_of_other_roles_are_inputs(tmp_path):
    """A critic or a judge that was trained again makes another result of the same configuration."""
    for name in ("critic", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    reward = {"class_path": "x.ConstitutionReward", "init_args": {"judge": str(tmp_path / "judge")}}
    config = {"model": {"init_args": {"value": {"model": str(tmp_path / "critic")}, "rewards": [reward]}}}
    assert input_hashes(config).keys() == {str(tmp_path / "critic"), str(tmp_path / "judge")}


@pytest.mark.parametrize("run_dir", [".", "1", "e", "runs"])
def test_a_run_directory_with_any_name_has_keys(run_dir):
    """Its name may stand in numbers and words that are no paths."""

    def key(beta: float) -> str:
        return stage_key({"beta": beta, "on": True, "path": f"{run_dir}/x"}, {}, Path(run_dir))

    assert len({key(0.1), key(1.5), key(1.25)}) == 3
