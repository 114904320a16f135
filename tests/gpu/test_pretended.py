"""``fit`` on a card, as Lightning places every method on it, without a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from rlhf_lightning import GRPOModule, PPOModule, RewardModule
from rlhf_lightning.callbacks import ReferenceSync, WeightAverage
from rlhf_lightning.models.backbone import check_output_head
from rlhf_lightning.models.layout import probe_batch
from rlhf_lightning.models.routers import find_routers
from rlhf_lightning.rewards.learned import RewardModelReward
from rlhf_lightning.sequences import ExampleBatch

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
        "a critic of its own": lambda: (PPOModule(**scored, value_model=scorer), prompts, [], {}),
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
    devices = {t.device.type for t in tensors if isinstance(t, Tensor)}
    assert devices == {"cpu"}
