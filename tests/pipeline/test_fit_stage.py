"""Measuring an export again: the module that wrote it computes what it computed then, heads and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning import ProcessRewardModule, RewardModule, SFTModule
from rlhf_lightning.cli import main
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.pipeline.fit_stage import load_exported
from rlhf_lightning.sequences import Example, Segment
from rlhf_lightning.utils.files import mark

PROMPTS, TEXTS = ["1+1=", "what?", "1+1="], ["2\n#2", "no\nidea", "3 or\nso"]
LORA = {"r": 2}
CASES: dict[str, tuple[type[PostTrainingModule], str, dict[str, Any]]] = {
    "classifier": (RewardModule, "llama", {}),
    "classifier of attributes": (RewardModule, "gpt2", {"attributes": ["a", "b"], "attribute_weights": [1.0, 2.0]}),
    "mlp": (RewardModule, "llama", {"head": "mlp"}),
    "pooled": (RewardModule, "qwen3", {"pooling": "mean"}),
    "heads": (RewardModule, "llama", {"num_models": 3}),
    "adapter": (RewardModule, "llama", {"lora": LORA}),
    "adapters": (RewardModule, "llama", {"num_models": 2, "ensemble": "adapters", "lora": LORA}),
    "steps": (ProcessRewardModule, "llama", {}),
    "steps and outcome": (ProcessRewardModule, "llama", {"head": "mlp", "outcome_head": True}),
    "steps by tokens": (ProcessRewardModule, "llama", {"head": "tokens", "label_tokens": ["+", "-"]}),
    "steps of an adapter": (ProcessRewardModule, "llama", {"lora": LORA}),
    "language model": (SFTModule, "gemma2", {}),
    "experts": (SFTModule, "qwen3_moe", {}),
    "language model's adapter": (SFTModule, "llama", {"lora": LORA}),
}


def move(module: Any, seed: int) -> None:
    """Moves every trainable weight, as training would, and the running means of an ensemble."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if isinstance(module, RewardModule) and module.options.num_models > 1:
        module.reward_model.means.update(torch.randn(2, 2, module.options.num_models, 1, generator=generator))


def scores(module: Any) -> list[Any]:
    if isinstance(module, SFTModule):
        rows = [Example(f"rows:{n}", Segment([5, 6, 7 + n], [0.0, 1.0, 1.0])) for n in range(2)]
        return module.score_examples(rows)["logps"].tolist()
    found = module.score(PROMPTS, TEXTS)
    if isinstance(module, ProcessRewardModule):
        return [*found, *(score for steps in module.score_steps(PROMPTS, TEXTS) for score in steps)]
    return [*found, *(value for pair in module.score_with_std(PROMPTS, TEXTS) for value in pair)]


@pytest.mark.parametrize("name", CASES)
def test_a_module_takes_back_what_it_exported(name: str, tiny_model_folder: Any, tmp_path: Path) -> None:
    cls, arch, options = CASES[name]
    module: Any = cls(str(tiny_model_folder(arch)), **options)
    module.configure_model()
    module.eval()
    move(module, seed=1)
    expected = scores(module)
    module.save_pretrained(str(tmp_path / "model"))
    move(module, seed=2)
    assert scores(module) != pytest.approx(expected, rel=1e-3)
    load_exported(module, tmp_path / "model")
    assert scores(module) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["pooled", "adapter", "adapters", "steps", "language model"])
def test_what_is_damaged_is_named(name: str, tiny_model_folder: Any, tmp_path: Path) -> None:
    cls, arch, options = CASES[name]
    module = cls(str(tiny_model_folder(arch)), **options)
    module.save_pretrained(str(tmp_path / "model"))
    for file in sorted((tmp_path / "model").glob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-8])
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*; copy or export it again") as error:
            load_exported(module, tmp_path / "model")
        assert "\n" not in str(error.value)
        file.write_bytes(content)
    load_exported(module, tmp_path / "model")


def test_a_head_that_is_missing(tiny_model_folder: Any, tmp_path: Path) -> None:
    module = RewardModule(str(tiny_model_folder()), pooling="mean")
    module.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model/reward_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model' holds no head: export it again"):
        load_exported(module, tmp_path / "model")


def test_a_merged_adapter_cannot_be_taken_back(tiny_model_folder: Any, tmp_path: Path) -> None:
    module = SFTModule(str(tiny_model_folder()), lora=LORA)
    module.save_pretrained(str(tmp_path / "model"), merge_adapter=True)
    with pytest.raises(ValueError, match="leaves no adapter to measure again: set merge_adapter: false"):
        load_exported(module, tmp_path / "model")


def test_a_stage_that_begins_again_replaces_the_states_that_its_gate_accepted(
    tiny_model_folder: Any, tmp_path: Path
) -> None:
    task = {"name": "sums", "prompts": "sums:prompts?rows=2", "verifier": "rlhf_lightning.rewards.exact_answer"}
    gate = {"suite": {"tasks": [task | {"sampling": {"max_new_tokens": 2}}]}, "folder": "${run_dir}/fit/accepted"}
    stage = {
        "kind": "fit",
        "model": {"class_path": "SFTModule", "init_args": {"model": str(tiny_model_folder())}},
        "data": {"class_path": "SFTDataModule", "init_args": {"train": "sums:demonstrations?rows=4"}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "callbacks": [{"class_path": "rlhf_lightning.callbacks.CapabilityGate", "init_args": gate}],
        },
    }
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": {"fit": stage}}))
    accepted = tmp_path / "run/fit/accepted"
    main(["pipeline", "--config", str(file)])
    (accepted / "step=9.ckpt").write_text("of the run before")
    main(["pipeline", "--config", str(file), "--force", "fit"])
    states = json.loads((accepted / "manifest.json").read_text())["accepted"]
    names = {f"step={state['step']}.ckpt" for state in states}
    assert names
    assert {path.name for path in accepted.glob("*.ckpt")} == names


def test_accepted_states_that_no_stage_wrote_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = tmp_path / "run/fit/accepted"
    accepted.mkdir(parents=True)
    mark(accepted.parent, "stage", ["model"])
    (accepted / "mine").write_text("mine")
    stage = {"kind": "fit", "model": {"class_path": "SFTModule"}, "trainer": {"max_steps": 1}}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": {"fit": stage}}))
    with pytest.raises(SystemExit):
        main(["pipeline", "--config", str(file)])
    assert "accepted' already exists and was not written by this package" in capsys.readouterr().err
    assert (accepted / "mine").read_text() == "mine"
