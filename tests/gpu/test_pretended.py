"""``fit`` on a card, as Lightning places every method on it, without a card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import GRPOModule, PPOModule, RewardModule
from rlhf_lightning.callbacks import ReferenceSync, WeightAverage
from rlhf_lightning.models.backbone import check_output_head
from rlhf_lightning.models.layout import probe_batch, resolve_layout
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.models.routers import find_routers
from rlhf_lightning.rewards.learned import RewardModelReward
from rlhf_lightning.sequences import ExampleBatch, cascade, register_attention
from rlhf_lightning.sequences.flex_attention import flex_mask
from rlhf_lightning.sequences.tree_attention import _kernel_for

from ..helpers import save_tiny_model, tiny_model
from ..invariance.harness import Batches
from ..invariance.methods import METHODS
from ..rl.fixed_rollouts import prompts
from .pretended import OnPretended, pretended_cuda
from .steps import EIGHT, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)


class Places(lightning.Callback):
    """Where everything that a module holds is while it trains."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        held = [pl_module, *(r.model for r in getattr(pl_module, "references", ()))]
        self.devices |= {str(t.device) for m in held for t in (*m.parameters(), *m.buffers())}


def fit(module: lightning.LightningModule, rows: Any, steps: int, *callbacks: Any, **options: Any) -> dict[str, Tensor]:
    """Trains a module as a user's script does, nothing configured before; its weights."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_steps=steps, num_sanity_val_steps=0, callbacks=[*callbacks], **quiet, **options)  # type: ignore[arg-type]
    trainer.fit(module, Batches(*(ExampleBatch(rows(4)) for _ in range(steps))))
    assert trainer.global_step >= steps
    return {name: p.detach().float() for name, p in module.named_parameters()}


def on_card(module: lightning.LightningModule, rows: Any, steps: int, *callbacks: Any, **options: Any) -> Any:
    places = Places()
    with pretended_cuda():
        weights = fit(module, rows, steps, places, *callbacks, strategy=OnPretended(), **options)
        assert places.devices == {"cuda:0"}
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert all(bool(torch.isfinite(p).all()) for p in weights.values())
    return weights


@pytest.mark.parametrize("name", EIGHT)
def test_every_method_starts_and_makes_the_steps_of_the_cpu(name: str, folder: str) -> None:
    method, found = METHODS[name], []
    for run in (on_card, fit):
        options = {"accelerator": "cpu"} if run is fit else {}
        optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
        module = method.module(folder, **{**method.options, "optimizer": optimizer})
        found.append(run(module, method.rows, 3, **options))
    for key, weight in found[1].items():
        torch.testing.assert_close(found[0][key], weight, rtol=1e-4, atol=1e-6, msg=key)


def held(name: str, folder: str, scorer: str) -> tuple[lightning.LightningModule, Any, list[Any], dict[str, Any]]:
    """Modules that hold more than a policy: a module, its rows, callbacks, options of the trainer."""
    sampling: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "model": folder}
    scored = {"rewards": [RewardModelReward(scorer)], **sampling}
    lora = {"r": 2, "target_modules": ["q_proj"]}
    built: dict[str, Any] = {
        "an engine, a reward model and a reference": lambda: (GRPOModule(**scored, beta=0.1), prompts, [], {}),
        "a critic of its own": lambda: (PPOModule(**scored, value={"model": scorer}), prompts, [], {}),
        "adapters": lambda: (METHODS["dpo"].module(folder, lora=lora), METHODS["dpo"].rows, [], {}),
        "members with adapters": lambda: (
            RewardModule(folder, **METHODS["reward-adapters"].options),
            METHODS["reward-adapters"].rows,
            [],
            {},
        ),
        "averaged weights": lambda: (METHODS["sft"].module(folder), METHODS["sft"].rows, [WeightAverage()], {}),
        "a reference that follows": lambda: (
            METHODS["dpo"].module(folder),
            METHODS["dpo"].rows,
            [ReferenceSync(every_n_steps=1)],
            {},
        ),
        "half precision": lambda: (METHODS["dpo"].module(folder), METHODS["dpo"].rows, [], {"precision": "bf16-true"}),
        "the padded layout": lambda: (METHODS["dpo"].module(folder, layout="padded"), METHODS["dpo"].rows, [], {}),
        "random weights": lambda: (METHODS["kto"].module(folder, init="random"), METHODS["kto"].rows, [], {}),
    }
    return built[name]()  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["sft", pytest.param("kto", marks=pytest.mark.slow)])
def test_routers_and_their_loss_are_placed(method: str, tmp_path: Path) -> None:
    """One micro-batch, and several, for which the share of each expert is counted first."""
    folder = str(save_tiny_model(tmp_path / "qwen3_moe", "qwen3_moe", initializer_range=0.05))
    options = {"router_aux_loss_coef": 0.5, "micro_batch_tokens": 40 if method == "kto" else 8192}
    on_card(METHODS[method].module(folder, **options), METHODS[method].rows, 2)


HELD = (
    "an engine, a reward model and a reference",
    "a critic of its own",
    "adapters",
    "members with adapters",
    "averaged weights",
    "a reference that follows",
    "half precision",
    "the padded layout",
    "random weights",
)


@pytest.fixture(scope="module")
def scorer(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    module = RewardModule(folder)
    module.save_pretrained(str(tmp_path_factory.mktemp("scorer") / "model"))
    return str(tmp_path_factory.getbasetemp() / "scorer0" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_whatever_a_module_holds_is_placed(name: str, folder: str, scorer: str) -> None:
    module, rows, callbacks, options = held(name, folder, scorer)
    on_card(module, rows, 2, *callbacks, **options)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets flash attention apply wherever torch says that it does on a card; which parts of it have run."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(cascade, name)

        def run(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return run

    monkeypatch.setattr(cascade, "can_use_flash_attention", lambda params: True)
    for name in ("plain_forward", "plain_backward"):
        monkeypatch.setattr(cascade, name, counted(name))
    return calls


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("wanted", "dtype", "options", "found"),
    [
        ("auto", HALF, {}, "cascade"),
        ("auto", torch.float16, {}, "cascade"),
        ("auto", SINGLE, {}, "blocks"),
        ("auto", HALF, {"dropout": 0.1}, "blocks"),
        ("auto", HALF, {"softcap": 50.0}, "flex"),
        ("auto", HALF, {"sinks": True}, "flex"),
        ("auto", HALF, {"softcap": 50.0, "dropout": 0.1}, "blocks"),
        ("auto", SINGLE, {"softcap": 50.0}, "blocks"),
        ("auto", HALF, {"softcap": 50.0, "size": 8}, "blocks"),  # less than FlexAttention takes
        ("auto", HALF, {"size": 20}, "blocks"),  # no multiple of 8
        ("auto", HALF, {"value_size": 32}, "blocks"),
        ("cascade", HALF, {}, "cascade"),
        ("cascade", SINGLE, {}, "blocks"),
        ("cascade", HALF, {"softcap": 50.0}, "blocks"),
        ("blocks", HALF, {}, "blocks"),
        ("flex", HALF, {}, "flex"),
        ("flex", SINGLE, {"softcap": 50.0}, "flex"),
        ("flex", SINGLE, {"dropout": 0.1}, "blocks"),
    ],
)
def test_kernels_by_layer(wanted: Any, dtype: torch.dtype, options: dict[str, Any], found: str, flash: Any) -> None:
    size = options.get("size", 16)
    with pretended_cuda():
        query, key = (torch.zeros(1, heads, 3, size, dtype=dtype, device="cuda") for heads in (4, 2))
        value = torch.zeros(1, 2, 3, options.get("value_size", size), dtype=dtype, device="cuda")
        sinks = torch.zeros(4) if "sinks" in options else None
        given = (options.get("dropout", 0.0), options.get("softcap"), sinks)
        assert _kernel_for(wanted, query, key, value, *given) == found


def test_what_flash_attention_does_not_take_runs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows cards and sizes, and is asked with the layer's own states."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cascade, "SDPAParams", lambda *given: given)
    monkeypatch.setattr(cascade, "can_use_flash_attention", lambda given: bool(asked.append(given)))
    with pretended_cuda():
        query, key = (torch.zeros(1, heads, 3, 16, dtype=HALF, device="cuda") for heads in (4, 2))
        assert _kernel_for("auto", query, key, key, 0.0, None, None) == "blocks"
    [(first, second, third, mask, dropout, causal, grouped)] = asked
    assert (first is query, second is key, third is key) == (True, True, True)
    assert (mask, dropout, causal, grouped) == (None, 0.0, True, True)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_runs_in_the_cascade(precision: str, folder: str, flash: list[str]) -> None:
    """Its own probe included; the step is near that of the blocks."""
    found = []
    for attention in ("auto", "blocks"):
        method = METHODS["dpo"]
        optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
        module = method.module(folder, **{**method.options, "optimizer": optimizer, "attention": attention})
        found.append(on_card(module, method.rows, 1, precision=precision))
        assert ("plain_forward" in flash, "plain_backward" in flash) == (attention == "auto",) * 2
        flash.clear()
    for key, weight in found[1].items():
        torch.testing.assert_close(found[0][key], weight, rtol=2e-2, atol=2e-3, msg=key)


def test_single_precision_runs_in_blocks(folder: str, flash: list[str]) -> None:
    on_card(METHODS["sft"].module(folder), METHODS["sft"].rows, 1)
    assert flash == []


def test_the_probe_finds_a_kernel_that_does_not_run(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    set_attention(model, register_attention())
    monkeypatch.setattr(cascade, "can_use_flash_attention", lambda params: True)

    def missing(*args: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(cascade, "plain_forward", missing)
    with pretended_cuda(), caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        assert resolve_layout(model.to("cuda"), "auto") == "padded"
    assert "the packed probe failed in torch.bfloat16 (RuntimeError: no kernel image" in caplog.text


def test_nothing_that_is_made_in_host_memory_goes_where_models_are_built() -> None:
    """Lightning builds models in the context of their device; here a device that has no values stands in for it."""
    model = tiny_model("llama")
    mixture = tiny_model("qwen3_moe")
    with torch.device("meta"):
        check_output_head(model)
        assert find_routers(mixture) is not None
        batch = probe_batch(model)
        padded = batch.padded(side="left", extra=2)
        masks = [batch.geometry.block_mask(n, window=2) for n in range(len(batch.geometry.blocks))]
        tensors = [*vars(batch).values(), *vars(padded).values(), batch.geometry.depth, batch.geometry.slot, *masks]
        for stretches in (batch.geometry.stretches(None), batch.geometry.stretches(2)):
            tensors += [*stretches.bounds, stretches.key_index]
        tensors += [flex_mask(batch.geometry, 2).kv_indices, flex_mask(batch.geometry, None).full_kv_indices]
    devices = {t.device.type for t in tensors if isinstance(t, Tensor)}
    assert devices == {"cpu"}
