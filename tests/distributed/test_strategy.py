"""The strategy `fsdp2`: the same weights as on one rank, checkpoints that move, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from safetensors.torch import load_file
from torch import nn

from rlhf_lightning import FSDP2Strategy
from rlhf_lightning.core.gradients import clip_gradients
from rlhf_lightning.core.trainer_checks import check_strategy
from rlhf_lightning.distributed.fsdp2 import check_can_shard
from rlhf_lightning.distributed.lockstep import _reached, _Zero
from rlhf_lightning.distributed.strategy import check_can_be_sharded
from rlhf_lightning.models.backbone import decoder_blocks

from ..helpers import nested, save_tiny_model, tiny_model
from .sharding_jobs import on_ranks, run_job, written

# `make invariance` runs all jobs; otherwise the ones that show most of what can go wrong.
EVERYTHING = "RLHF_LIGHTNING_ALL_RANKS" in os.environ
WARM_UP = {"value.warmup_iterations": 1}
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "model": "gpt2"},  # tied weights
    "dpo-adapter": {"method": "dpo", "model": "qwen3", "options": {"lora": {"r": 4}}},
    # Embeddings of slots and an encoder within layers that run again.
    "compression": {"method": "compression", "model": "qwen3", "options": {"gradient_checkpointing": True}},
    "grpo-live": {"method": "grpo-live", "model": "qwen3"},
    "ppo-critic": {"method": "ppo", "model": "qwen3", "options": {"value.model": "gpt2", **WARM_UP}},
}
MORE_JOBS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo", "model": "qwen3", "options": {"init": "random"}},  # a reference that a checkpoint holds
    "dpo-checkpointed": {"method": "dpo", "model": "gpt2", "options": {"gradient_checkpointing": True}},
    "compression-decoder": {"method": "compression-decoder", "model": "gpt2"},
    "simpo": {"method": "simpo", "model": "qwen3"},
    "kto": {"method": "kto", "model": "gpt2", "options": {"lora": {"r": 4}, "reference": "frozen"}},
    "reward": {"method": "reward", "model": "qwen3"},
    "process": {"method": "process", "model": "gpt2"},
    "grpo": {"method": "grpo", "model": "gpt2"},
    "ppo": {"method": "ppo", "model": "qwen3", "options": WARM_UP},
    "ppo-live": {"method": "ppo-live", "model": "qwen3"},
}
CHOSEN = JOBS | (MORE_JOBS if EVERYTHING else {})
RESUMED = ["sft", "dpo-adapter", "compression", *(["dpo", "ppo", "reward"] if EVERYTHING else [])]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = {arch: str(save_tiny_model(tmp_path_factory.mktemp("models") / arch, arch)) for arch in ("qwen3", "gpt2")}
    found = {}
    for name, job in CHOSEN.items():
        options = dict(job.get("options", {}))
        if "value.model" in options:
            options["value.model"] = folders[options["value.model"]]
        found[name] = job | {"model": folders[job["model"]], "options": nested(options)}
    return found


@pytest.fixture(scope="module")
def one(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, {name: run_job(job) for name, job in written(jobs, folder).items()}


@pytest.fixture(scope="module")
def two(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(written(jobs, folder), folder, "fsdp2", 2)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-8, msg=name)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_three_steps_on_two_ranks_are_those_on_one(name: str, one: tuple[Path, Any], two: tuple[Path, Any]) -> None:
    assert_same(two[1][name], one[1][name])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_exports_are_the_same_folders(name: str, one: tuple[Path, Any], two: tuple[Path, Any]) -> None:
    expected, found = (folder / name for folder, _ in (one, two))
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for file in expected.glob("*.safetensors"):
        weights, other = load_file(file), load_file(found / file.name)
        assert weights.keys() == other.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(other[key], weight, rtol=0, atol=1e-8, msg=key)
    for file in expected.glob("*config.json"):
        if file.name != "adapter_config.json":  # peft writes a set, in any order
            assert (found / file.name).read_text() == file.read_text()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_move_between_strategies_and_numbers_of_ranks(
    jobs: dict[str, dict[str, Any]], one: tuple[Path, Any], two: tuple[Path, Any], tmp_path: Path
) -> None:
    from_one = {name: jobs[name] | {"resume": f"{one[0]}/{name}.ckpt"} for name in RESUMED}
    from_two = {name: jobs[name] | {"resume": f"{two[0]}/{name}.ckpt"} for name in RESUMED}
    expected = {name: run_job(job) for name, job in from_one.items()}
    sharded = on_ranks(from_one, tmp_path, "fsdp2", 3)
    copied = on_ranks(from_two, tmp_path, "ddp", 2) if EVERYTHING else {}
    for name in RESUMED:
        moved = [(expected[name]["weights"][k] - w).abs().max() for k, w in one[1][name]["weights"].items()]
        assert max(moved) > 1e-3, "the resumed epoch changed nothing"
        assert_same(run_job(from_two[name]), expected[name])
        for results in filter(None, (sharded, copied)):
            assert_same(results[name], expected[name])


def test_the_name_is_known_to_lightning() -> None:
    assert StrategyRegistry.get("fsdp2").__class__ is FSDP2Strategy
    assert isinstance(lightning.Trainer(accelerator="cpu", devices=2, strategy="fsdp2").strategy, FSDP2Strategy)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy(), r"FSDP1\).*neither step by hand nor clip.*write strategy: fsdp2"),
        (object.__new__(DeepSpeedStrategy), r"DeepSpeedStrategy, whose engine averages, clips .*strategy: fsdp2"),
        (ModelParallelStrategy(), r"ModelParallelStrategy, which .* hangs .*class_path: rlhf_lightning.FSDP2Strategy"),
    ],
)
def test_other_sharded_strategies_are_refused(strategy: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        check_strategy(strategy)
    assert "\n" not in str(error.value)


def test_our_strategy_is_not_refused() -> None:
    check_strategy(FSDP2Strategy())


@pytest.mark.parametrize(
    ("precision", "quantization", "reason"),
    [
        ("bf16-mixed", "nf4", r"quantization is 'nf4'.*cannot be split over ranks: use strategy 'ddp'"),
        ("16-mixed", None, r"precision is '16-mixed'.*scale their losses apart: use 'bf16-mixed'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(precision: str, quantization: str | None, reason: str) -> None:
    check_can_be_sharded("bf16-mixed", None)
    with pytest.raises(ValueError, match=reason):
        check_can_be_sharded(precision, quantization)


def test_stored_quantised_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"packs a whole matrix .* cannot be split"):
        check_can_shard(nn.Sequential(Linear4bit(4, 4)))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3_moe", "gemma3_text", "gpt_neox"])
def test_units_are_the_decoder_blocks(arch: str) -> None:
    model = tiny_model(arch)
    blocks = decoder_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    inside = {id(p) for block in blocks for p in block.parameters()}
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert not inside & embeddings


def test_zero_passes_no_nan_on() -> None:
    hidden = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    zero = _Zero.apply(hidden)
    zero.backward()
    assert zero.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [0, 0, 0]


def test_reached_finds_what_a_loss_depends_on() -> None:
    weight = torch.ones(2, requires_grad=True)
    first, second = weight * 2, weight * 3
    waiting = [(0, first), (1, second)]
    assert _reached((first * second).sum(), waiting) == {0, 1}
    assert _reached((first.exp() + second.detach()).sum(), waiting) == {0}
    assert _reached((weight * 5).sum(), waiting) == set()


def test_clipping_whole_gradients_is_torchs() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert float(clip_gradients(parameters, 1.0)) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx([0.8], rel=1e-5)
