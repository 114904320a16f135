"""A rejection restores every part of a run: weights, optimizer, schedule, random states, rows to come, average."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from rlhf_lightning import GRPOModule, SFTModule
from rlhf_lightning.callbacks import CapabilityGate, WeightAverage, capability_gate
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule

from ..integration.test_resume import DEMONSTRATIONS, LORA, PROMPTS, Noise, assert_same, digits
from .test_capability_gate import suite, verdicts

__all__ = ["verdicts"]  # a fixture

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]

PARTS = ("weights", "optimizer", "schedule", "random", "average")


class Spy(lightning.Callback):
    """Notes the state before each step, and the rows of its batch."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average
        self.seen: list[tuple[int, dict[str, Any]]] = []
        self.rows: list[list[str]] = []
        self.ended: dict[str, Any] = {}

    def state(self, trainer: Any, module: Any) -> dict[str, Any]:
        found = {
            "weights": {name: weight.detach().clone() for name, weight in module.named_parameters()},
            "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
            "schedule": copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
            "average": copy.deepcopy(self.average.state_dict()),
        }
        # As plain values, which can be compared to the bit.
        found["random"] = [found["random"][0], *map(str, found["random"][1:])]
        return found

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.global_step, self.state(trainer, pl_module)))
        self.rows.append([example.row_id for example in batch.examples])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = self.state(trainer, pl_module)


def sft(model: str) -> tuple[PostTrainingModule, lightning.LightningDataModule]:
    """An adapter with dropout, several micro-batches a step, and epochs of four steps."""
    module = SFTModule(model, lora=LORA, micro_batch_tokens=16, **rates())
    return module, SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3)


def full(model: str) -> tuple[PostTrainingModule, lightning.LightningDataModule]:
    module = SFTModule(model, dropout=0.2, **rates())
    return module, SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3)


def grpo(model: str) -> tuple[PostTrainingModule, lightning.LightningDataModule]:
    """Two updates of each batch, so that boundaries lie where a batch ends."""
    options = {"rewards": [digits], "num_generations": 2, "max_completion_length": 4, "num_updates": 2}
    module = GRPOModule(model, lora=LORA, **options, **rates())
    return module, PromptDataModule(train=PROMPTS, val=PROMPTS[:2], global_batch_size=2)


def rates() -> dict[str, Any]:
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (1 + n))
    return {"optimizer": partial(torch.optim.AdamW, lr=0.01), "lr_scheduler": schedule}


def run(make: Any, model: str, place: Path, every: int, steps: int, **criteria: Any) -> tuple[Spy, CapabilityGate]:
    """Validates between boundaries and at some of them."""
    lightning.seed_everything(1, verbose=False)
    average = WeightAverage(decay=0.5)
    gate = CapabilityGate(suite(place), str(place / "accepted"), every_n_steps=every, criteria=criteria)
    spy = Spy(average)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, val_check_interval=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[gate, average, Noise(), spy],
    )  # fmt: skip
    module, data = make(model)
    trainer.fit(module, datamodule=data)
    return spy, gate


def parts_that_differ(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    found = set()
    for part in PARTS:
        try:
            assert_same(left[part], right[part])
        except AssertionError:
            found.add(part)
    return found


@pytest.mark.parametrize("make", [sft, full, grpo])
@pytest.mark.parametrize("on_reject", ["smaller_step", "new_seed", "stop"])
def test_each_part_of_the_state_is_that_of_the_accepted_one(
    make: Any, on_reject: str, tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]
) -> None:
    """Accepted within an epoch, rejected twice (or once, and stopped) after an epoch has ended, then accepted."""
    every, steps = (2, 6) if make is not grpo else (4, 12)
    stops = on_reject == "stop"
    verdicts.extend(["accept", "stop"] if stops else ["accept", "reject", "reject", "accept"])
    spy, gate = run(make, str(tiny_model_folder()), tmp_path, every, steps, on_reject=on_reject)
    told = [(entry["step"], entry["verdict"]) for entry in gate.history]
    assert told[:2] == [(every, "accept"), (2 * every, "stop" if stops else "reject")]
    places = [n for n, (step, _) in enumerate(spy.seen) if step == every]
    accepted = spy.seen[places[0]][1]
    # The rejected steps had changed everything.
    before = spy.seen[places[0] + 1][1]
    assert parts_that_differ(accepted, before) == set(PARTS)
    if stops:
        assert gate.accepted == every
        assert parts_that_differ(accepted, spy.ended) <= {"random"}
        return

    assert len(places) == 3
    for number, place in enumerate(places[1:], start=1):
        found = spy.seen[place][1]
        if on_reject == "smaller_step":
            assert parts_that_differ(accepted, found) == {"optimizer", "schedule"}
            scale(found, 2.0**number)
            assert parts_that_differ(accepted, found) == set()
        else:
            assert parts_that_differ(accepted, found) == {"random"}
        # The rows to come.
        length = places[1] - places[0]
        assert spy.rows[place : place + length] == spy.rows[places[0] : places[1]]
    assert len({str(row) for row in spy.rows}) > 1
    if on_reject == "new_seed":
        assert len({str(spy.seen[place][1]["random"]) for place in places}) == 3


@pytest.mark.parametrize("make", [sft, grpo])
def test_an_average_of_weights_is_that_of_a_run_without_rejections(
    make: Any, tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate is rejected once, the last one when training has ended."""
    monkeypatch.setattr(capability_gate, "scale_learning_rates", lambda trainer, factor: None)
    every, steps = (3, 7) if make is sft else (4, 10)
    ends = []
    for name in ("plain", "again"):
        (tmp_path / name).mkdir()
        verdicts[:] = ["reject", "accept"] * 3 if name == "again" else []
        spy, gate = run(make, str(tiny_model_folder()), tmp_path / name, every, steps)
        ends.append(spy.ended)
    assert [entry["verdict"] for entry in gate.history] == ["reject", "accept"] * 3
    assert ends[1]["average"]["num_steps"] == steps
    assert parts_that_differ(*ends) == set()


def test_a_run_has_one_gate(tiny_model_folder: Any, tmp_path: Path) -> None:
    """Two would have to go back to states of each other that are gone, and forget each other's rejections."""
    gates = [CapabilityGate(suite(tmp_path), str(tmp_path / name), every_n_steps=n) for n, name in ((1, "a"), (2, "b"))]
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=gates,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module, data = sft(str(tiny_model_folder()))
    with pytest.raises(ValueError, match=r"^there are 2 CapabilityGates, and one would take back .* tasks of all$"):
        trainer.fit(module, datamodule=data)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def scale(state: dict[str, Any], factor: float) -> None:
    """Takes back what a smaller step has changed, which is exact for a power of two."""
    for group in state["optimizer"]["param_groups"]:
        for name in ("lr", "initial_lr"):
            group[name] *= factor
    for name in ("base_lrs", "_last_lr"):
        state["schedule"][name] = [rate * factor for rate in state["schedule"][name]]
