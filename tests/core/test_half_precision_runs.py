"""Runs in ``bf16-mixed`` have the bits of runs in which torch's autocast rounds every weight in every call."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule
from rlhf_lightning.callbacks import ReferenceSync
from rlhf_lightning.models.half_weights import HalfLinear
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches
from ..invariance.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "adapters": ("dpo", {"lora": {"r": 4}}),
    "recomputed": ("dpo", {"gradient_checkpointing": True}),
    "coupled": ("dpo-coupled", {}),
    "kto": ("kto", {}),
    "reward": ("reward", {}),
    "process": ("process", {}),
    "step labels": ("process-tokens", {"lora": {"r": 4}}),
    "ppo": ("ppo", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")
    AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(place)
    return str(place)


def fit(module: Any, rows: Any, *callbacks: Any, precision: Any = "bf16-mixed", steps: int = 2) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet}
    trainer = lightning.Trainer(precision=precision, callbacks=[*callbacks], **settings)
    trainer.fit(module, Batches(*(ExampleBatch(rows(5)) for _ in range(steps))), Batches(ExampleBatch(rows(3))))
    return trainer


def held(module: Any) -> list[HalfLinear]:
    models = [module, *(getattr(reference, "model", module) for reference in module.references)]
    return [layer for model in models for layer in model.modules() if isinstance(layer, HalfLinear)]


@pytest.mark.parametrize(
    "name", [n if n in ("dpo", "adapters") else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_no_bit_of_a_run_changes(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and metrics after two steps of several micro-batches and a validation."""
    method, options = METHODS[RUNS[name][0]], RUNS[name][1]
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("rlhf_lightning.core.module.rounded", lambda *models: nullcontext())
            monkeypatch.setattr("rlhf_lightning.core.module.hold_frozen", lambda *args, **options: None)
            monkeypatch.setattr("rlhf_lightning.models.reference.hold_frozen", lambda *args, **options: None)
        torch.manual_seed(0)
        given = {**method.options, "optimizer": ADAM, "micro_batch_tokens": 40, **options}
        module = method.module(folder, **given)
        trainer = fit(module, method.rows)
        assert bool(held(module)) == (not plain)  # references, frozen weights, projections that a head leaves unused
        weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        found.append((weights, {n: float(v) for n, v in trainer.callback_metrics.items()}))
    assert found[0][1] == found[1][1]
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(weight, found[1][0][n]) for n, weight in found[0][0].items())


def test_single_precision_keeps_its_weights(folder: str) -> None:
    module = METHODS["dpo"].module(folder, **METHODS["dpo"].options)
    fit(module, METHODS["dpo"].rows, precision="32-true", steps=1)
    assert not held(module)
    [reference] = module.references
    assert {p.dtype for p in reference.model.parameters()} == {torch.float32}


def test_a_reference_that_moves_stays_in_single_precision(folder: str) -> None:
    """Its small moves would be rounded away."""
    module = DPOModule(folder)
    fit(module, METHODS["dpo"].rows, ReferenceSync(alpha=0.01, every_n_steps=1), steps=1)
    assert not held(module)


def test_a_rounded_reference_is_not_taken_for_another(folder: str) -> None:
    module = DPOModule(folder)
    fit(module, METHODS["dpo"].rows, steps=1)
    fit(module, METHODS["dpo"].rows, steps=1)
    assert held(module)
    with pytest.raises(ValueError, match=r"rounded to torch.bfloat16 for an earlier run of this module: build a new"):
        fit(module, METHODS["dpo"].rows, precision="32-true", steps=1)


def test_a_run_in_another_precision_has_the_weights_as_they_were(folder: str) -> None:
    """Those under an adapter, which bf16 holds exactly."""
    module = DPOModule(folder, lora={"r": 2, "target_modules": ["q_proj"]})
    fit(module, METHODS["dpo"].rows, steps=1)
    assert held(module)
    fit(module, METHODS["dpo"].rows, precision="32-true", steps=1)
    assert not held(module)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    layers = module.model.get_base_model().model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, stored["model.layers.1.mlp.up_proj.weight"])


class Unfreeze(lightning.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        weights = list(pl_module.model.model.layers[0].parameters())
        for weight in weights:
            weight.requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": weights})


def test_layers_that_are_unfrozen_train_in_single_precision(folder: str) -> None:
    module = METHODS["sft"].module(folder, optimizer=partial(torch.optim.SGD, lr=1e-3))
    module.configure_model()
    module.model.model.layers[0].requires_grad_(False)
    before = module.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    fit(module, METHODS["sft"].rows, Unfreeze(), steps=1)
    after = module.model.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.float32
    # A step below what bf16 can hold.
    assert 0 < float((after - before).abs().max()) < float(before.abs().max()) * 2**-9


def test_checkpoints_hold_frozen_layers(folder: str, tmp_path: Path) -> None:
    """A checkpoint of layers that are kept in half precision loads into layers that are not."""
    module = METHODS["sft"].module(folder, optimizer=ADAM)
    module.configure_model()
    module.model.model.layers[0].requires_grad_(False)
    trainer = fit(module, METHODS["sft"].rows, steps=1)
    assert held(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    for name, weight in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.float()), name
