"""Presets by the plan of their memory, on models of the published sizes; no weights are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen2Config, Qwen3Config

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.cli import main
from rlhf_lightning.planning.plan import Plan, decoder_of, plan

PRESETS = Path(__file__).parents[2] / "configs" / "presets"
GIB = float(1 << 30)
_QWEN2 = {"vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 32768}
# The config of each preset's model, and the number of its weights as published.
MODELS: dict[str, tuple[Any, int]] = {
    "laptop_1_7b": (
        Qwen3Config(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=6144,
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=40960,
        ),
        1_720_574_976,
    ),
    "qlora_7b": (
        Qwen2Config(
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            **_QWEN2,
        ),
        7_615_616_512,
    ),
    "fsdp2_70b": (
        Qwen2Config(
            hidden_size=8192,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            intermediate_size=29568,
            **_QWEN2,
        ),
        72_706_203_648,
    ),
}


def folder(name: str, tmp_path: Path) -> str:
    MODELS[name][0].save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def planned(name: str, tmp_path: Path, method: type = SFTModule) -> Plan:
    written = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    options = written["model"]["init_args"] | {"model": folder(name, tmp_path)}
    return plan(method, options, written["trainer"]["precision"])


def test_every_preset_is_planned() -> None:
    assert {file.stem for file in PRESETS.glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_the_published_number_of_weights(name: str, tmp_path: Path) -> None:
    assert decoder_of(folder(name, tmp_path)).weights == MODELS[name][1]


@pytest.mark.parametrize("method", [SFTModule, DPOModule])
@pytest.mark.parametrize(("name", "card"), [("laptop_1_7b", 14), ("qlora_7b", 22)])
def test_one_device_is_enough(name: str, card: float, method: type, tmp_path: Path) -> None:
    found = planned(name, tmp_path, method)
    assert 0.3 * card * GIB < found.total <= card * GIB, [(part.what, part.size / GIB) for part in found.parts]


def test_eight_devices_are_enough_and_two_are_not(tmp_path: Path) -> None:
    found = planned("fsdp2_70b", tmp_path)
    sharded = sum(part.size for part in found.parts if part.what in ("weights", "gradients", "optimizer"))
    # Besides its shard, a device holds two layers while they run, and the head.
    layer = 2 * (MODELS["fsdp2_70b"][1] - 2 * 152064 * 8192) / 80
    whole = 2 * layer + 2 * 152064 * 8192
    assert sharded / 8 + whole + found.total - sharded <= 75 * GIB
    assert sharded / 2 + whole + found.total - sharded > 75 * GIB
    assert sharded == pytest.approx(2 * MODELS["fsdp2_70b"][1], rel=0.03)


def within(written: Any, config: Any) -> bool:
    """Whether a configuration has all that was written."""
    if isinstance(written, dict):
        return all(within(value, config[name]) for name, value in written.items())
    return bool(written == config or str(written) == str(config))


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("name", MODELS)
def test_presets_stack_on_methods(name: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [f"--config=configs/{method}/default.yaml", f"--config=configs/presets/{name}.yaml"]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *configs, "--data.train=rows.jsonl", "--print_config"])
    assert exit_info.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert within(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()), config)


def test_the_command_reads_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = ["--config", "configs/sft/default.yaml", "--config", "configs/presets/qlora_7b.yaml"]
    main(["memory", *configs, f"--model.model={folder('qlora_7b', tmp_path)}", "--data.train=rows.jsonl", "--card=24"])
    assert "GiB: fits on a card of 24 GiB" in capsys.readouterr().out
