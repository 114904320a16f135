"""Learned rewards and judges multiply in bf16 where the policy is trained so on a GPU, and hold their weights so."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.core.device_precision import frozen_dtype
from rlhf_lightning.models.half_weights import HalfLinear
from rlhf_lightning.rewards.judges import ModelJudge
from rlhf_lightning.rewards.learned import ProcessModelReward, RewardModelReward

from ..budgets.trace import traced_cuda
from ..gpu.steps import save_model
from ..helpers import char_tokenizer

PROMPTS, ANSWERS = ["1+1=", "2+3=", "2+3="], ["2", "5\nno", "7"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    base = save_model(place / "base", initializer_range=0.2)
    for name, kind in (("reward", RewardModule), ("process", ProcessRewardModule)):
        kind(base).save_pretrained(str(place / name))
    return {name: str(place / name) for name in ("base", "reward", "process")}


def policy(precision: str, device: str = "cuda") -> Any:
    trainer = SimpleNamespace(precision=precision)
    return SimpleNamespace(device=torch.device(device), tokenizer=char_tokenizer(), _trainer=trainer)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("bf16-true", "cuda", torch.bfloat16),
        ("32-true", "cuda", None),
        ("16-mixed", "cuda", None),
        ("bf16-mixed", "cpu", None),
    ],
)
def test_it_follows_the_policy(precision: str, device: str, expected: torch.dtype | None) -> None:
    assert frozen_dtype(policy(precision, device)) == expected
    assert frozen_dtype(SimpleNamespace(device=torch.device("cuda"))) is None


def scores(made: Any, precision: str, device: str = "cuda") -> tuple[list[float], float]:
    """Rewards, and the bytes of weights that the second call casts."""
    with traced_cuda() as tracer:
        made.attach(policy(precision, device))
        arguments = ([f"{p}{a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)],)
        arguments = arguments if isinstance(made, ModelJudge) else (PROMPTS, ANSWERS)  # type: ignore[assignment]
        made(*arguments)
        made.attach(policy(precision, device))
        tracer.take()
        found = made(*arguments)
        return found, tracer.take().totals["casts"]


KINDS = {"reward": RewardModelReward, "process": ProcessModelReward, "base": ModelJudge}


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_autocast_on_weights_that_are_kept_rounded(name: str, folders: dict[str, str]) -> None:
    made = KINDS[name](folders[name])
    model: nn.Module = made.scorer.model if name == "reward" else made.model
    plain = copy.deepcopy(model)
    single, _ = scores(KINDS[name](folders[name], dtype="float32"), "bf16-mixed")
    found, cast = scores(made, "bf16-mixed")
    kept = [layer for layer in model.modules() if isinstance(layer, HalfLinear)]
    assert len(kept) >= 14
    assert cast == 0
    assert found != single
    assert found == pytest.approx(single, abs=3e-2)

    # The oracle: weights in fp32, which autocast rounds in every call.
    again = KINDS[name](folders[name])
    if name == "reward":
        again.scorer.model = plain
    else:
        again.model = plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lightning.inference.text_scorers.hold_frozen", lambda *args, **options: None)
        naive, naive_cast = scores(again, "bf16-mixed")
    assert naive == found
    assert naive_cast > 0


@pytest.mark.parametrize("name", KINDS)
def test_on_a_cpu_and_in_single_precision_nothing_changes(name: str, folders: dict[str, str]) -> None:
    single, _ = scores(KINDS[name](folders[name], dtype="float32"), "32-true")
    assert scores(KINDS[name](folders[name]), "32-true")[0] == single
    assert scores(KINDS[name](folders[name]), "bf16-mixed", "cpu")[0] == pytest.approx(single, abs=1e-6)


def test_an_unknown_dtype_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'half'; it must be one of float32, bfloat16, float16, auto"):
        ModelJudge(folders["base"], dtype="half")  # type: ignore[arg-type]
