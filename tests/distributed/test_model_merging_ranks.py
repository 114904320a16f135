"""Merges of snapshots on two ranks, copied (DDP) and sharded (FSDP2), are those of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..helpers import save_tiny_model
from .merged_ranks import CASES, Found, merged, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("one")
    return {case: merged(case, model, folder, None) for case in CASES}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Found]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, on_ranks(model, folder, request.param)


def assert_close(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 if name == "history" else 1e-9
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_merge_as_one(case: str, one: dict[str, Found], two: tuple[Path, dict[str, Found]]) -> None:
    """Trained, interrupted after the first epoch, and resumed."""
    assert_close(two[1][case], one[case])
    kept = one[case]["history"][:, 3]
    assert (kept == (0.0 if case == "rejected" else 1.0)).all()
    assert len(kept) == {"mean": 3, "end": 2, "warp": 1, "rejected": 3}[case]


@pytest.mark.parametrize("case", CASES)
def test_one_rank_continues_from_a_checkpoint_of_two(
    case: str, one: dict[str, Found], two: tuple[Path, dict[str, Found]], model: str, tmp_path: Path
) -> None:
    assert_close(merged(case, model, tmp_path, str(two[0] / f"{case}-1.ckpt")), one[case])
