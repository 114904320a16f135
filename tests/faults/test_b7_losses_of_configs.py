"""A further loss that a model's config asks for is trained, as that of its routers' loads, or said not to be."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning import DPOModule, RewardModule, SFTModule
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.core.trainer_checks import report_config_losses
from rlhf_lightning.models.config_losses import logit_losses, router_losses
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from ..rl.fixed_rollouts import FixedPPO, picky, prompts
from ..rl.fixed_rollouts import options as rollouts

ASKS = {"output_router_logits": True, "router_aux_loss_coef": 0.03}


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("asking"), "qwen3_moe", **ASKS))


class Said(NamedTuple):
    """Messages of a one-step fit about losses that a config asks for, and the router loss that it logs."""

    warned: list[str]
    noted: list[str]
    aux_loss: float | None


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)

    def fit(module: PostTrainingModule, rows: list[Any]) -> Said:
        caplog.clear()
        run = trainer("32-true", max_steps=1, num_sanity_val_steps=0)
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
            warnings.simplefilter("always")
            run.fit(module, Batches(ExampleBatch(rows)))
        value = run.callback_metrics.get("train/aux_loss")
        return Said(
            [str(w.message) for w in caught if "the config of" in str(w.message)],
            [message for message in caplog.messages if "load-balancing loss" in message],
            None if value is None else float(value),
        )

    return fit


METHODS: dict[str, tuple[type[PostTrainingModule], dict[str, Any], Any]] = {
    "sft": (SFTModule, {}, demonstrations),
    "adapter": (SFTModule, {"lora": {"r": 2, "target_modules": ["q_proj"]}}, demonstrations),
    "from nothing": (SFTModule, {"init": "random"}, demonstrations),
    "a frozen reference": (DPOModule, {}, pairs),
    "a head": (RewardModule, {}, pairs),
    "policy and critic": (FixedPPO, rollouts(rewards=[picky], reward_weights=None), prompts),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_router_loss_that_a_config_asks_for_is_trained(asking: str, method: str, said: Callable[..., Said]) -> None:
    kind, options, rows = METHODS[method]
    module = kind(asking, **options)
    warned, noted, aux_loss = said(module, rows(4))
    assert warned == []
    assert len(noted) == 1, noted
    assert "\n" not in noted[0]
    for word in ("4 experts", "coefficient 0.03", "qwen3_moe", "output_router_logits: true", "router_aux_loss_coef=0"):
        assert word in noted[0]
    assert aux_loss is not None
    assert 1.5 < aux_loss < 4  # two of four experts per token: 2 where all are used alike, 4 where two alone are
    assert module.router_loss is not None
    assert module.router_loss.coef == 0.03


def test_an_option_stands_above_the_config(asking: str, tmp_path: Path, said: Callable[..., Said]) -> None:
    warned, noted, aux_loss = said(SFTModule(asking, router_aux_loss_coef=0.0), demonstrations(4))
    assert (warned, aux_loss) == ([], None)
    assert len(noted) == 1
    assert "no load-balancing loss is added, since router_aux_loss_coef is 0, although the config of" in noted[0]
    folder = str(save_tiny_model(tmp_path, "qwen3_moe"))
    warned, noted, aux_loss = said(SFTModule(folder, router_aux_loss_coef=0.2), demonstrations(4))
    assert warned == []
    assert len(noted) == 1
    assert "with the coefficient 0.2, since router_aux_loss_coef is 0.2" in noted[0]
    assert aux_loss is not None


def test_what_is_not_trained_is_not_dropped_silently(
    asking: str, said: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A critic's routers; and those of a policy whose own loss is another than the one that is known."""
    options = rollouts(rewards=[picky], reward_weights=None, value={"model": asking})
    warned, noted, _ = said(FixedPPO(asking, **options), prompts(4))
    assert (len(warned), len(noted)) == (1, 1)
    monkeypatch.setattr("rlhf_lightning.core.router_loss.find_routers", lambda model: None)
    found = said(SFTModule(asking), demonstrations(4))
    assert (len(found.warned), found.noted, found.aux_loss) == (1, [], None)
    for line, kind in ((warned[0], FixedPPO), (found.warned[0], SFTModule)):
        assert "\n" not in line
        for word in ("qwen3_moe", "router_aux_loss_coef: 0.03", "output_router_logits: true", kind.__name__, "Freeze"):
            assert word in line


@pytest.mark.parametrize("options", [{}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}])
def test_a_model_that_asks_for_none_is_trained_without_a_word(
    tmp_path: Path, options: dict[str, Any], said: Callable[..., Said]
) -> None:
    folder = str(save_tiny_model(tmp_path, "qwen3_moe", **options))
    assert said(SFTModule(folder), demonstrations(4)) == ([], [], None)


def test_a_model_whose_decoder_is_frozen_is_trained_without_a_word(asking: str, said: Callable[..., Said]) -> None:
    module = RewardModule(asking)
    module.configure_model()
    module.model.requires_grad_(False)
    assert said(module, pairs(4)) == ([], [], None)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.5}, {"router_aux_loss_coef": 0.5}),
        ("olmoe", {}, {"router_aux_loss_coef": 0.01}),
        ("jetmoe", {"aux_loss_coef": 0.25}, {"aux_loss_coef": 0.25}),
        ("dbrx", {"ffn_config": {"moe_loss_weight": 0.125}}, {"moe_loss_weight": 0.125}),
        ("granitemoe", {"router_aux_loss_coef": None}, {}),
        ("deepseek_v3", {"aux_loss_alpha": 0.5}, {"aux_loss_alpha": 0.5}),
        ("llama", {}, {}),
    ],
)
def test_coefficients_are_found_by_all_their_names(
    kind: str, options: dict[str, Any], expected: dict[str, float]
) -> None:
    assert router_losses(AutoConfig.for_model(kind, output_router_logits=True, **options)) == expected
    assert router_losses(AutoConfig.for_model(kind, output_router_logits=False, **options)) == {}


def test_a_decoder_within_asks_too() -> None:
    config = AutoConfig.for_model("qwen3_vl_moe", text_config={"output_router_logits": True})
    assert router_losses(config) == {"router_aux_loss_coef": 0.001}


BAMBA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def test_a_loss_on_logits_is_not_dropped_silently() -> None:
    config = AutoConfig.for_model("bamba", z_loss_coefficient=0.25, **BAMBA)
    module = SFTModule("bamba")
    module.model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match=r"the config of bamba .*z_loss_coefficient: 0.25.* SFTModule does not train"):
        report_config_losses(module)


def test_a_coefficient_of_zero_asks_for_no_loss_on_logits() -> None:
    assert logit_losses(AutoConfig.for_model("bamba")) == logit_losses(AutoConfig.for_model("llama")) == {}
