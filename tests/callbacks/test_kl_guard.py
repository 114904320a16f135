from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.callbacks import KLGuard
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..rl.fixed_rollouts import prompts


def watch(guard: KLGuard, values: Sequence[float]) -> int | None:
    """The iteration at which the guard stops a run that logs these values."""
    for number, value in enumerate(values):
        run: Any = SimpleNamespace(callback_metrics={"train/kl": value}, should_stop=False, global_step=10 * number)
        guard.on_train_batch_end(run, None, None, None, number)  # type: ignore[arg-type]
        if run.should_stop:
            assert guard.stopped_at == 10 * number
            return number
    return None


VALUES = [0.1, 0.6, 0.2, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("max_kl", "patience", "expected"), [(0.5, 0, 1), (0.5, 1, 4), (0.5, 2, 5), (0.5, 3, None), (0.6, 0, 3)]
)
def test_when_it_stops(max_kl: float, patience: int, expected: int | None) -> None:
    assert watch(KLGuard(max_kl, patience=patience), VALUES) == expected


def test_a_divergence_that_is_not_a_number_stops() -> None:
    assert watch(KLGuard(0.5), [0.1, float("nan")]) == 1


def test_a_resumed_run_remembers() -> None:
    first, second = KLGuard(0.5, patience=1), KLGuard(0.5, patience=1)
    assert watch(first, VALUES[:4]) is None
    second.load_state_dict(first.state_dict())
    assert watch(second, VALUES[4:]) == 0


def shouting(completion_ids: Sequence[list[int]]) -> list[float]:
    """A reward that a policy can only please by leaving its reference: one token, again and again."""
    return [tokens.count(7) / 4 for tokens in completion_ids]


class Watch(lightning.Callback):
    def __init__(self) -> None:
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.kl.append(float(trainer.callback_metrics["train/kl"]))


@pytest.mark.parametrize(("cls", "given"), [(GRPOModule, {"reference": "frozen"}), (PPOModule, {"num_updates": 2})])
def test_it_stops_a_run(cls: Any, given: dict[str, Any], tmp_path: Any) -> None:
    folder = str(save_tiny_model(tmp_path, "llama", initializer_range=0.1))
    module = cls(
        folder, rewards=[shouting], max_completion_length=8, optimizer=partial(torch.optim.AdamW, lr=0.01), **given
    )
    seen = Watch()
    run = trainer("32-true", max_epochs=1)
    run.callbacks += [seen, KLGuard(0.05)]
    run.fit(module, Batches(*(ExampleBatch(prompts(8)) for _ in range(40))))
    assert 1 < len(seen.kl) < 40
    assert max(seen.kl[:-1]) <= 0.05 < seen.kl[-1]


def test_nothing_to_watch(tmp_path: Any) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    module = GRPOModule(folder, rewards=[shouting], max_completion_length=4)
    run = trainer("32-true", max_steps=1)
    run.callbacks.append(KLGuard(0.05))
    message = "monitor is 'train/kl', which is not logged in training (divergences that are: none): give the module a"
    with pytest.raises(ValueError, match=re.escape(message)):
        run.fit(module, Batches(ExampleBatch(prompts(2))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_kl": 0}, "max_kl is 0; it must be a finite number above 0"),
        ({"max_kl": 1, "patience": -1}, "patience is -1"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        KLGuard(**given)
