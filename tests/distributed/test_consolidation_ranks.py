"""Fisher information on two ranks, copied (DDP) and sharded (FSDP2), is that of single rows on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..callbacks.test_elastic_weight_consolidation import FIRST, SECOND, write
from ..helpers import save_tiny_model
from .consolidated_ranks import CASES, Weights, consolidated, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write(FIRST, folder / "first.jsonl")
    write(SECOND, folder / "second.jsonl")
    return folder


@pytest.fixture(scope="module")
def one(model: str, folder: Path) -> dict[str, dict[str, Weights]]:
    return {case: consolidated(case, model, folder) for case in CASES}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_does(
    strategy: str, model: str, folder: Path, one: dict[str, dict[str, Weights]]
) -> None:
    """Of two tasks, before two steps that they keep near; squares of sums over ranks would be others."""
    found = on_ranks(model, folder, strategy)
    for case, expected in one.items():
        for kind, weights in expected.items():
            assert found[case][kind].keys() == weights.keys()
            for name, value in weights.items():
                difference = float((found[case][kind][name] - value).norm())
                assert difference <= 1e-5 * float(value.norm()), (case, kind, name)
        assert all(bool(value.any()) for value in expected["information"].values())
        assert float(expected["penalty"]["penalty"]) > 0
        assert all(torch.isfinite(value).all() for value in expected["trained"].values())
