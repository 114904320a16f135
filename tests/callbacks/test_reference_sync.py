from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from rlhf_lightning import DPOModule, GRPOModule, SFTModule
from rlhf_lightning.callbacks import ReferenceSync
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from ..rl.fixed_rollouts import FixedGRPO, options, prompts

ALPHA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def weights(model: Any, part: str = "") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


class Watch(lightning.Callback):
    """The policy's weights after each batch."""

    def __init__(self, part: str = "") -> None:
        self.part = part
        self.policies: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.policies.append(weights(pl_module.model, self.part))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.policies.append(weights(pl_module.model, self.part))


def fit(module: Any, batches: Batches, *callbacks: Any, **given: Any) -> Any:
    run = trainer("64-true", max_epochs=1, **given)
    run.callbacks += callbacks
    run.fit(module, batches)
    return run


def moved(start: dict[str, Tensor], policies: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    for policy in policies:
        start = {name: ALPHA * policy[name] + (1 - ALPHA) * weight for name, weight in start.items()}
    return start


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize(("every", "after"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_a_frozen_reference_follows(every: int, after: list[int], folder: str) -> None:
    module = DPOModule(folder, optimizer=partial(torch.optim.SGD, lr=0.1))
    watch = Watch()
    fit(module, Batches(*(ExampleBatch(pairs(3)) for _ in range(4))), watch, ReferenceSync(ALPHA, every))
    expected = moved(watch.policies[0], [watch.policies[n] for n in after])
    assert_close(weights(module.references[0].model), expected)
    assert not all(torch.equal(watch.policies[0][n], w) for n, w in watch.policies[-1].items())


def test_updates_of_an_iteration_are_steps(folder: str) -> None:
    """Three steps a batch: a multiple of two is passed after the first batch once, after the second twice."""
    given = options(num_generations=3, num_updates=3, beta=0.1, optimizer=partial(torch.optim.SGD, lr=0.1))
    module = FixedGRPO(folder, **given)
    watch = Watch()
    fit(module, Batches(*(ExampleBatch(prompts(3)) for _ in range(2))), watch, ReferenceSync(ALPHA, 2))
    start, first, second = watch.policies
    assert_close(weights(module.references[0].model), moved(start, [first, second, second]))


def test_a_copied_adapter_follows(folder: str, tmp_path: Path) -> None:
    start = DPOModule(folder, lora={"r": 2, "init_lora_weights": False})
    start.configure_model()
    start.save_pretrained(str(tmp_path / "adapter"))
    module = DPOModule(str(tmp_path / "adapter"), optimizer=partial(torch.optim.SGD, lr=1.0))
    watch = Watch(".default.")
    fit(module, Batches(*(ExampleBatch(pairs(3)) for _ in range(2))), watch, ReferenceSync(ALPHA, 1))
    expected = moved(watch.policies[0], watch.policies[1:])
    found = {name.replace(".ref.", ".default."): w for name, w in weights(module.model, ".ref.").items()}
    assert_close(found, expected)
    assert not any(p.requires_grad for name, p in module.model.named_parameters() if ".ref." in name)


def test_a_resumed_run_has_the_moved_reference(folder: str, tmp_path: Path) -> None:
    def run(batches: int, ckpt_path: Path | None = None) -> tuple[Any, Any, ReferenceSync]:
        module = DPOModule(folder, optimizer=partial(torch.optim.SGD, lr=0.1))
        sync = ReferenceSync(ALPHA, 2)
        training = trainer("64-true", max_epochs=1)
        training.callbacks.append(sync)
        loader = Batches(*(ExampleBatch(pairs(3)) for _ in range(batches)))
        training.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
        return module, training, sync

    first, training, _ = run(3)
    training.save_checkpoint(tmp_path / "half.ckpt")
    again, _, sync = run(3, tmp_path / "half.ckpt")
    assert sync.num_syncs == 1
    assert_close(weights(again.references[0].model), weights(first.references[0].model))
    fresh = DPOModule(folder)
    fresh.configure_model()
    fresh.double()
    assert not torch.equal(
        next(iter(weights(fresh.model).values())), next(iter(weights(again.references[0].model).values()))
    )


def test_references_that_cannot_move(folder: str) -> None:
    cases: list[tuple[Any, Batches, str]] = [
        (SFTModule(folder), Batches(ExampleBatch(demonstrations(2))), "SFTModule has no reference policy"),
        (
            DPOModule(folder, lora={"r": 2}),
            Batches(ExampleBatch(pairs(2))),
            "the reference of DPOModule is its model with the adapter off, which cannot move: use reference='frozen'",
        ),
        (
            GRPOModule(folder, **options()),
            Batches(ExampleBatch(prompts(2))),
            "GRPOModule has no reference in memory that could move",
        ),
    ]
    for module, batches, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, batches, ReferenceSync())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"alpha": 0.0}, "alpha is 0.0; it must be in (0, 1]"), ({"every_n_steps": 0}, "every_n_steps is 0; it must be")],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ReferenceSync(**given)
