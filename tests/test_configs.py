"""Every YAML that is shipped parses, through the real command line; every tiny one trains."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning import core
from rlhf_lightning.cli import main
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.fit_stage import StageCLI

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = sorted(folder.name for folder in CONFIGS.iterdir() if (folder / "default.yaml").is_file())
FRAGMENTS = sorted(file for name in ("data", "logger", "model", "trainer") for file in (CONFIGS / name).glob("*.yaml"))
PIPELINES = sorted((CONFIGS / "pipelines").glob("*.yaml"))
REQUIRED = {"model", "train"}  # what default.yaml leaves to the user
GROUPS = {"sampling", "loss", "advantages", "tree", "kl", "off_policy", "entropy", "value", "gae"}


def printed(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *args, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_methods_are_found():
    assert {"sft", "dpo"} <= set(METHODS)
    assert all((CONFIGS / method / "tiny.yaml").is_file() for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_default_is_complete_and_commented(capsys, method):
    file = CONFIGS / method / "default.yaml"
    config = printed(capsys, "--config", str(file), "--model.init_args.model=m", "--data.init_args.train=rows.jsonl")
    written = yaml.safe_load(file.read_text())
    for section in ("model", "data"):
        assert config[section]["class_path"] == written[section]["class_path"]
        options, shown = config[section]["init_args"], written[section]["init_args"]
        assert set(options) - set(shown) <= REQUIRED
        for name in GROUPS & set(options):
            assert set(options[name].get("init_args", options[name])) == set(shown[name])
    for line in file.read_text().splitlines():
        name = line.strip().partition(":")[0].removeprefix("- ")
        plain = {"shuffle", "drop_last", "weight_decay", "project", "name", "save_dir", "accelerator", "devices"}
        plain |= {"max_epochs", "log_every_n_steps", "num_sanity_val_steps", "default_root_dir", "mode"}
        plain |= {"seed_everything"}
        if ": " in line and "#" not in line and "class_path" not in line:
            assert name in plain, f"{line!r} has no comment"
    assert written["trainer"]["precision"] is None  # by the device
    assert written["model"]["init_args"]["optimizer"]["init_args"]["fused"] is True
    lora = inspect.signature(core.PostTrainingModule).parameters["lora"]
    assert lora.default is None


def stacks() -> list[Any]:
    """Every fragment on every method whose rows it fits. Of the fragments for all, a third is fast: each on some."""
    found = []
    for number, fragment in enumerate(FRAGMENTS):
        contract = yaml.safe_load(fragment.read_text()).get("data", {}).get("class_path")
        for place, method in enumerate(METHODS):
            tiny = yaml.safe_load((CONFIGS / method / "tiny.yaml").read_text())
            if contract in (None, tiny["data"]["class_path"]):
                fast = contract is not None or (number + place) % 3 == 0
                name = f"{fragment.parent.name}-{fragment.stem}-{method}"
                found.append(pytest.param(fragment, method, id=name, marks=() if fast else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("fragment", "method"), stacks())
def test_fragments_stack_on_every_method(capsys, method, fragment):
    tiny = CONFIGS / method / "tiny.yaml"
    written = yaml.safe_load(fragment.read_text())
    config = printed(capsys, "--config", str(tiny), "--config", str(fragment))
    for section in ("model", "data"):
        for name, value in written.get(section, {}).get("init_args", {}).items():
            assert config[section]["init_args"][name] == value
    for name, value in written.get("trainer", {}).items():
        if name != "logger":
            assert str(config["trainer"][name]) == str(value)


@pytest.mark.parametrize("method", METHODS)
def test_tiny_trains(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the model comes from the package then
    once = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", f"configs/{method}/tiny.yaml", *once])
    assert (tmp_path / f"runs/tiny-{method}/model/model.safetensors").is_file()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_search_trees_train(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = ["--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", f"configs/{method}/tree.yaml", *once])
    history = [json.loads(line) for line in Path(f"runs/tree-{method}/history.jsonl").read_text().splitlines()]
    logged = {name: value for row in history for name, value in row.items()}
    # Six simulations of three steps each are more than the four samples, and share what they begin with.
    assert logged["train/tree/completions"] > 4 + 3
    assert 0 < logged["train/tree/shared"] < 1
    assert logged["train/tree/depth"] > 1


@pytest.mark.parametrize("method", METHODS)
def test_tiny_validates_tests_and_predicts(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for subcommand in ("validate", "test", "predict"):
        output = ["--output=predictions.jsonl"] if subcommand == "predict" else []
        main([subcommand, "--config", f"configs/{method}/tiny.yaml", "--trainer.enable_progress_bar=false", *output])
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert len({row["row_id"] for row in rows}) == len(rows) > 0


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.stem)
def test_pipelines_build(file, tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    pipeline = load_pipeline(file, run_dir=tmp_path / "run")
    for name, stage in pipeline.stages.items():
        if stage.kind == "fit":
            merged = StageCLI(stage, pipeline.folder(name), 0).merged
            logger = merged["trainer"]["logger"]
            assert logger["class_path"].endswith("WandbLogger")
            assert logger["init_args"]["offline"] is True
