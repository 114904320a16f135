"""Groups of ranks with a copy of the weights each: the steps of one rank, and checkpoints that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning import FSDP2Strategy
from rlhf_lightning.distributed.strategy import shard_group_size

from ..helpers import save_tiny_model
from .sharding_jobs import on_ranks, run_job, written

# Tied weights; a reference that a checkpoint holds; sampling.
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "model": "gpt2"},
    "dpo": {"method": "dpo", "model": "qwen3", "options": {"init": "random"}},
    "grpo-live": {"method": "grpo-live", "model": "qwen3"},
}
TWO_PAIRS = {"fsdp2": {"shard_over": 2}, "sgd": True}
RESUMED = ("sft", "dpo")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = {arch: str(save_tiny_model(tmp_path_factory.mktemp("models") / arch, arch)) for arch in ("qwen3", "gpt2")}
    return {name: job | TWO_PAIRS | {"model": folders[job["model"]]} for name, job in JOBS.items()}


@pytest.fixture(scope="module")
def one(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, {name: run_job(job) for name, job in written(jobs, folder).items()}


def resumed(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    return {f"{name} resumed": jobs[name] | {"resume": f"{folder}/{name}.ckpt"} for name in RESUMED}


@pytest.fixture(scope="module")
def four(
    jobs: dict[str, dict[str, Any]], one: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    return folder, on_ranks(written(jobs, folder) | resumed(jobs, one[0]), folder, "fsdp2", 4)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        error = float((found["weights"][name] - weight).norm() / weight.norm())
        assert error <= 1e-10, f"{name}: relative error {error:.1e}"
    # Logged in fp32.
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", JOBS)
def test_three_steps_on_two_pairs_of_ranks_are_those_on_one(
    name: str, one: tuple[Path, Any], four: tuple[Path, Any]
) -> None:
    assert_same(four[1][name], one[1][name])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", JOBS)
def test_exports_are_whole(name: str, one: tuple[Path, Any], four: tuple[Path, Any]) -> None:
    weights, found = (load_file(folder / name / "model.safetensors") for folder, _ in (one, four))
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_move_between_groups_and_one_rank(
    jobs: dict[str, dict[str, Any]], one: tuple[Path, Any], four: tuple[Path, Any]
) -> None:
    from_four = resumed(jobs, four[0])
    for name, job in resumed(jobs, one[0]).items():
        expected = run_job(job)
        before = one[1][name.removesuffix(" resumed")]["weights"]
        moved = [(expected["weights"][key] - weight).abs().max() for key, weight in before.items()]
        assert max(moved) > 1e-3, "the resumed epoch changed nothing"
        assert_same(run_job(from_four[name]), expected)
        assert_same(four[1][name], expected)


def test_group_sizes() -> None:
    assert shard_group_size("world", 8, 4) == 32
    assert shard_group_size("node", 8, 4) == 8
    assert [shard_group_size(size, 3, 2) for size in (1, 2, 3, 6)] == [1, 2, 3, 6]


def test_groups_of_unequal_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shard_over is 4, .* the 6 ranks .* use one of 1, 2, 3, 6$"):
        shard_group_size(4, 3, 2)


@pytest.mark.parametrize("value", [0, -2, True, 1.5, "host", None])
def test_what_is_no_group_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"shard_over is .*must be 'world', 'node', or a number") as error:
        FSDP2Strategy(shard_over=value)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)
