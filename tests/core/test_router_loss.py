"""The load-balancing loss of a step, against autograd through transformers' own loss of one padded batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule, RewardModule, SFTModule
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.core.router_loss import RouterLoss
from rlhf_lightning.losses.router import RouterSums
from rlhf_lightning.sequences import Example, ExampleBatch, pack

from ..faults.small_models import small_model
from ..helpers import char_tokenizer, save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from ..rl.fixed_rollouts import FixedPPO, picky, prompts

COEF = 0.5
SGD = partial(torch.optim.SGD, lr=10.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    small_model("mixtral").save_pretrained(place / "mixtral")
    char_tokenizer().save_pretrained(place / "mixtral")
    noisy = {"router_jitter_noise": 0.3, "attention_dropout": 0.3}
    model = small_model("mixtral")
    model.config.update(noisy)
    model.save_pretrained(place / "noisy")
    char_tokenizer().save_pretrained(place / "noisy")
    qwen = save_tiny_model(place / "qwen3_moe", "qwen3_moe", initializer_range=0.05)
    return {"mixtral": str(place / "mixtral"), "noisy": str(place / "noisy"), "qwen3_moe": str(qwen)}


def run(module: PostTrainingModule, rows: list[Example], precision: str = "32-true") -> dict[str, Any]:
    """The gradient of one step, by name, and what was logged."""
    module.max_grad_norm, module._optimizer = None, SGD
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit = trainer(precision, max_steps=1, num_sanity_val_steps=0)
    fit.fit(module, Batches(ExampleBatch(rows)))
    gradient = {name: (before[name] - p.detach()) / 10.0 for name, p in module.named_parameters()}
    return {"gradient": gradient, "metrics": {k: float(v) for k, v in fit.callback_metrics.items()}}


def own_loss(folder: str, rows: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """Transformers' load-balancing loss of all sequences, prompts repeated, as one padded batch; and its gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    padded = pack(rows, share_prefix=False).padded(extra=2)
    given = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    loss = model(**given, output_router_logits=True, use_cache=False).aux_loss
    loss.backward()
    return float(loss.detach()), {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "method", "rows", "options"),
    [
        ("qwen3_moe", DPOModule, pairs(5), {"micro_batch_tokens": 30}),  # several micro-batches with shared prompts
        ("mixtral", SFTModule, demonstrations(5), {"dropout": 0.0}),  # the whole batch at once
    ],
)
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_a_step_has_the_gradient_of_transformers_loss(
    folders: dict[str, str], kind: str, method: Any, rows: list[Example], options: dict[str, Any]
) -> None:
    expected, slopes = own_loss(folders[kind], rows)
    balanced = run(method(folders[kind], router_aux_loss_coef=COEF, **options), rows)
    plain = run(method(folders[kind], router_aux_loss_coef=0.0, **options), rows)
    assert balanced["metrics"].pop("train/aux_loss") == pytest.approx(expected, rel=1e-5)
    assert balanced["metrics"]["train/loss"] == pytest.approx(plain["metrics"]["train/loss"], rel=1e-5)
    assert balanced["metrics"].keys() == plain["metrics"].keys()
    largest = max(float(slope.norm()) for slope in slopes.values())
    seen = 0
    for name, slope in slopes.items():
        found = (balanced["gradient"][name] - plain["gradient"][name]) / COEF
        error = float((found - slope).norm())
        assert error < 2e-4 * max(float(slope.norm()), 0.05 * largest), (name, error, float(slope.norm()))
        seen += "gate.weight" in name and float(slope.norm()) > 0.1 * largest
    assert seen == 2, "the routers of both layers have a gradient worth comparing"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RouterSums, RouterSums]]:
    """Records the routers' sums in each backward pass, and in all of them by the pass before."""
    found: list[tuple[RouterSums, RouterSums]] = []
    share = RouterLoss.share

    def noted(self: RouterLoss, part: RouterSums, whole: RouterSums) -> Tensor:
        found.append((part, whole))
        return share(self, part, whole)

    monkeypatch.setattr(RouterLoss, "share", noted)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_dropout_and_noise_are_the_same_in_both_passes(
    folders: dict[str, str], precision: str, recorded: list[tuple[RouterSums, RouterSums]]
) -> None:
    module = SFTModule(folders["noisy"], micro_batch_tokens=25, router_aux_loss_coef=COEF)
    gradient = run(module, demonstrations(6), precision)["gradient"]
    assert len(recorded) > 2
    total = recorded[0][0]
    for part, _ in recorded[1:]:
        total = total + part
    for _, whole in recorded:
        assert total.choices_E.tolist() == whole.choices_E.tolist()
        torch.testing.assert_close(total.probs_E.double(), whole.probs_E)
    assert float(gradient["model.model.layers.0.mlp.gate.weight"].norm()) > 1e-3


def test_a_critic_that_warms_up_leaves_the_routers_alone(folders: dict[str, str]) -> None:
    found = {}
    for iterations in (0, 1):
        options = {"num_updates": 1, "max_completion_length": 10, "kl_coef": 0.0, "num_mini_batches": 2}
        module = FixedPPO(
            folders["qwen3_moe"],
            rewards=[picky],
            value={"warmup_iterations": iterations},
            router_aux_loss_coef=COEF,
            **options,
        )
        found[iterations] = run(module, prompts(4))
    gate = "model.model.layers.0.mlp.gate.weight"
    assert float(found[0]["gradient"][gate].norm()) > 1e-3
    assert float(found[1]["gradient"][gate].norm()) == 0
    assert found[0]["metrics"]["train/aux_loss"] > 1.9
    assert "train/aux_loss" not in found[1]["metrics"]


def test_members_that_take_turns_have_the_mean_of_their_losses(
    folders: dict[str, str], recorded: list[tuple[RouterSums, RouterSums]]
) -> None:
    lora = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj"], "init_lora_weights": False}
    options: dict[str, Any] = {"num_models": 2, "ensemble": "adapters", "lora": lora, "bootstrap": False}
    rows = pairs(4)
    both = run(RewardModule(folders["qwen3_moe"], router_aux_loss_coef=COEF, **options), rows)
    off = run(RewardModule(folders["qwen3_moe"], router_aux_loss_coef=0.0, **options), rows)
    (first, _), (second, _) = recorded
    assert not torch.equal(first.probs_E, second.probs_E)

    def slope(part: RouterSums) -> float:
        """The loss by its definition."""
        f, p = part.choices_E / part.weight, part.probs_E.detach().double() / part.weight
        return 4 * float((f * p).sum())

    assert both["metrics"]["train/aux_loss"] == pytest.approx((slope(first) + slope(second)) / 2, rel=1e-6)
    moved = {n: both["gradient"][n] - off["gradient"][n] for n in off["gradient"]}
    assert sum(float(value.norm()) > 0 for name, value in moved.items() if "lora_B" in name) == 4  # two layers each


def test_what_is_no_coefficient_is_refused(folders: dict[str, str]) -> None:
    for value in (-0.1, float("inf"), "a lot", True):
        with pytest.raises(ValueError, match=r"router_aux_loss_coef is .*; it must be at least 0"):
            SFTModule(folders["qwen3_moe"], router_aux_loss_coef=value)  # type: ignore[arg-type]


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path, "qwen3"))
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef is 0.1, but qwen3 has no routers .* mixture of experts"
    ):
        SFTModule(folder, router_aux_loss_coef=0.1).configure_model()
    SFTModule(folder, router_aux_loss_coef=0.0).configure_model()
