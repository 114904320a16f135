"""The average of weights on two ranks, copied (DDP) and sharded (FSDP2), is that of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..helpers import save_tiny_model
from .averaged_ranks import CASES, Weights, averaged, on_ranks

Found = dict[str, dict[str, Weights]]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("one")
    return {case: averaged(case, model, folder) for case in CASES}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def ranks(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, on_ranks(model, folder, request.param)


@pytest.fixture
def two(ranks: tuple[Path, Found], case: str) -> tuple[Path, Found]:
    """Returns the results of two ranks, where the strategy runs the case."""
    if case not in ranks[1]:
        pytest.skip("sharded layers are not compiled")
    return ranks


def assert_close(found: Weights, expected: Weights, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_average_of_one(case: str, one: Found, two: tuple[Path, Found]) -> None:
    """Trained, validated, resumed, exported, and validated from a checkpoint."""
    found, expected = two[1][case], one[case]
    assert found.keys() == expected.keys()
    for kind in expected:
        assert_close(found[kind], expected[kind])
    own = {name: found["own"][name] for name in found["average"]}
    assert distance(found["average"], own) > 1e-3, "the average is what trains: nothing would be seen"


@pytest.mark.parametrize("case", CASES)
def test_what_is_looked_at_is_the_average_and_nothing_else(case: str, two: tuple[Path, Found], model: str) -> None:
    found = two[1][case]
    shown = found["own"] | found["average"]
    assert_close(found["validated"], shown, 0)
    assert_close(found["from a checkpoint"], shown, 0)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    loaded = {name: p.detach() for name, p in plain.named_parameters()}
    if case == "adapter":  # merged: W + (alpha / r) B A, of the average
        name = "model.layers.0.self_attn.q_proj"
        a, b = (found["average"][f"model.base_model.model.{name}.lora_{k}.default.weight"] for k in "AB")
        expected = loaded[f"{name}.weight"] + 8 / 2 * b @ a
        torch.testing.assert_close(found["exported"][f"{name}.weight"], expected, rtol=0, atol=1e-7)
    else:
        assert_close({f"model.{k}": v for k, v in found["exported"].items()}, found["average"], 0)
    reference = {name.removeprefix("base_model.model."): weight for name, weight in found["reference"].items()}
    assert bool(reference) == (case != "sft")
    if reference:
        assert_close({k.replace(".base_layer.", "."): v for k, v in reference.items() if "lora_" not in k}, loaded, 0)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_continues_from_a_checkpoint_of_two(
    case: str, one: Found, two: tuple[Path, Found], model: str, tmp_path: Path
) -> None:
    found = averaged(case, model, tmp_path, resume=str(two[0] / f"{case}-1.ckpt"))
    for kind in one[case]:
        assert_close(found[kind], one[case][kind])
