"""Adapters in fp32 on weights in bf16 (precision bf16-true), on one rank, on two (DDP), and in shards (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_lightning.distributed.fsdp2 import check_one_dtype
from rlhf_lightning.models import load_causal_lm
from rlhf_lightning.models.backbone import decoder_blocks

from ..distributed.sharding_jobs import on_ranks, run_job
from ..helpers import save_tiny_model

METHODS = ("sft", "dpo")
Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3"))


def jobs(model: str, folder: Path) -> Jobs:
    # SGD: AdamW's first steps have the size of the rate for gradients of any size, those of bf16's rounding included.
    given = {"model": model, "precision": "bf16-true", "sgd": True, "options": {"lora": {"r": 4}}}
    return {
        name: {"method": name, **given, "save": f"{folder}/{name}.ckpt", "export": f"{folder}/{name}"}
        for name in METHODS
    }


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return {name: run_job(job) for name, job in jobs(model, tmp_path_factory.mktemp("one")).items()}


def adapter_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if "lora_" in name}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of two adapters relative to what was learned: all of B, which begins at 0."""
    names = [name for name in expected if "lora_B" in name]
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    return float(difference.norm() / torch.cat([expected[name].flatten() for name in names]).norm())


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapters_stay_in_fp32_on_two_ranks(strategy: str, model: str, one: Jobs, tmp_path: Path) -> None:
    two = on_ranks(jobs(model, tmp_path), tmp_path, strategy, 2)
    for name in METHODS:
        weights, expected = (results[name]["weights"] for results in (two, one))
        assert weights.keys() == expected.keys()
        adapter = adapter_of(weights)
        assert {weight.dtype for weight in adapter.values()} == {torch.float32}
        assert {weight.dtype for other, weight in weights.items() if other not in adapter} == {torch.bfloat16}
        # Not one of them has been through bf16, which keeps one number in 65,536 of those of fp32.
        for key, weight in adapter.items():
            assert (weight != weight.bfloat16().float()).float().mean() > 0.99, key
        assert apart(adapter, adapter_of(expected)) < 0.02
        assert two[name]["metrics"] == pytest.approx(one[name]["metrics"], rel=0.02, abs=0.02)
        # Neither a checkpoint nor an export rounds them.
        saved = adapter_of(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"])
        exported = load_file(tmp_path / name / "adapter_model.safetensors")
        for key, weight in adapter.items():
            torch.testing.assert_close(saved[key], weight, rtol=0, atol=0)
            plain = key.removeprefix("model.").replace(".default.", ".")
            torch.testing.assert_close(exported[plain], weight, rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sharded_run_takes_them_up_again(model: str, tmp_path: Path) -> None:
    """An epoch and a second one, as on one rank."""
    first = jobs(model, tmp_path)
    for job in first.values():
        run_job(job)
    second = {name: {k: v for k, v in job.items() if k not in ("save", "export")} for name, job in first.items()}
    second = {name: job | {"resume": f"{tmp_path}/{name}.ckpt"} for name, job in second.items()}
    two = on_ranks(second, tmp_path, "fsdp2", 2)
    for name, job in second.items():
        found, expected = adapter_of(two[name]["weights"]), adapter_of(run_job(job)["weights"])
        assert {weight.dtype for weight in found.values()} == {torch.float32}
        assert apart(found, expected) < 0.02


@pytest.mark.parametrize(
    ("lora", "refused"),
    [({}, False), ({"modules_to_save": ["lm_head"]}, False), ({"modules_to_save": ["k_proj"]}, True)],
)
def test_a_unit_with_two_trained_dtypes_is_refused(lora: dict[str, Any], refused: bool, model: str) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], **lora}
    half = load_causal_lm(model, dtype=torch.bfloat16, lora=options)
    whole = load_causal_lm(model, dtype=torch.float32, lora=options)
    for unit in decoder_blocks(whole):
        check_one_dtype(unit)
    if not refused:
        for unit in decoder_blocks(half):
            check_one_dtype(unit)
        return
    with pytest.raises(
        ValueError, match=r"in torch.float32 \(self_attn.*lora_A.*\) and torch.bfloat16 \(.*k_proj.*"
    ) as error:
        check_one_dtype(decoder_blocks(half)[0])
    assert "use precision 'bf16-mixed', strategy 'ddp', or a lora without modules_to_save" in str(error.value)
    assert "\n" not in str(error.value)
