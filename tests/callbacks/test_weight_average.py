from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule, PPOModule, SFTModule
from rlhf_lightning.callbacks import ModelExport, TrainingCheckpoint, WeightAverage
from rlhf_lightning.models.critic import ValueModel
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from ..rl.fixed_rollouts import FixedGRPO, FixedPPO, options, prompts

DECAY = 0.8
SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def trained(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Steps(lightning.Callback):
    """The weights after every optimizer step, those at each validation, and those after it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.weights.append(trained(pl_module)))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trained(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.after.append(trained(pl_module))


def mean(weights: list[dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """The definition: weights decay**(t - k), normalised to 1."""
    factors = [decay ** (len(weights) - k) for k in range(1, len(weights) + 1)]
    total = sum(factors)
    return {
        name: torch.stack([f / total * w[name] for f, w in zip(factors, weights, strict=True)]).sum(dim=0)
        for name in weights[0]
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name].to(weight), weight, rtol=tolerance, atol=tolerance), name


def fit(module: Any, batches: Batches, *callbacks: Any, val: Batches | None = None, **given: Any) -> Any:
    ckpt_path = given.pop("ckpt_path", None)
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "callbacks": list(callbacks), **given}
    run = trainer(settings.pop("precision", "64-true"), **settings)
    run.fit(module, batches, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


def batches(count: int = 4, rows: Any = demonstrations) -> Batches:
    """Batches of rows that differ."""
    examples = rows(3 * count)
    return Batches(*(ExampleBatch(examples[3 * n : 3 * n + 3]) for n in range(count)))


def test_a_hand_made_average(folder: str) -> None:
    """With d = 1/2 after three steps: (1 w1 + 2 w2 + 4 w3) / 7."""
    steps, average = Steps(), WeightAverage(0.5)
    fit(SFTModule(folder, optimizer=SGD), batches(3), steps, average)
    one, two, three = steps.weights
    expected = {name: (one[name] + 2 * two[name] + 4 * three[name]) / 7 for name in one}
    assert_close(average.average, expected)
    assert not torch.allclose(next(iter(expected.values())), next(iter(three.values())), rtol=1e-9)


@pytest.mark.parametrize(("decay", "start"), [(DECAY, 0), (0.0, 0), (1.0, 0), (DECAY, 2)])
def test_the_formula(decay: float, start: int, folder: str) -> None:
    steps, average = Steps(), WeightAverage(decay, start_step=start)
    fit(SFTModule(folder, optimizer=ADAM), batches(5), steps, average)
    assert len(steps.weights) == average.num_steps == 5
    assert_close(average.average, mean(steps.weights[start:], decay))


@pytest.mark.parametrize("cls", [FixedGRPO, FixedPPO])
def test_every_update_of_an_iteration_counts(cls: Any, folder: str) -> None:
    given = options(num_generations=3, num_updates=2, num_mini_batches=2, optimizer=SGD)
    steps, average = Steps(), WeightAverage(DECAY)
    module = cls(folder, **given)
    fit(module, batches(2, prompts), steps, average)
    assert len(steps.weights) == 8
    assert_close(average.average, mean(steps.weights))
    assert any("critic" in name for name in average.average) == (cls is FixedPPO)


def test_an_adapter_alone_is_averaged_and_the_reference_left_alone(folder: str) -> None:
    steps, average = Steps(), WeightAverage(DECAY)
    module = DPOModule(folder, lora={"r": 2}, reference="frozen", optimizer=ADAM)
    fit(module, batches(3, pairs), steps, average, val=batches(1, pairs))
    assert average.average
    assert all("lora_" in name for name in average.average)
    assert_close(average.average, mean(steps.weights))
    plain = AutoModelForCausalLM.from_pretrained(folder).double().state_dict()
    for name, weight in module.references[0].model.named_parameters():
        found = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" not in found:
            assert torch.equal(weight, plain[found]), name
    frozen = [(name, p) for name, p in module.model.named_parameters() if not p.requires_grad and "lora_" not in name]
    for name, weight in frozen:
        assert torch.equal(weight, plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")]), name


@pytest.mark.parametrize("order", [1, -1])
def test_validation_and_exports_see_it_and_training_does_not(order: int, folder: str, tmp_path: Path) -> None:
    """Whichever way the callbacks are listed."""
    steps, average = Steps(), WeightAverage(DECAY)
    best = ModelExport(str(tmp_path / "best"), monitor="val/loss", mode="min")
    last = ModelExport(str(tmp_path / "last"))
    now_and_then = ModelExport(str(tmp_path / "at-{step}"), every_n_steps=2)
    module = SFTModule(folder, optimizer=ADAM)
    run = fit(
        module,
        batches(4),
        *[steps, average, best, last, now_and_then][::order],
        val=batches(1),
        val_check_interval=2,
    )
    # The run without the callback.
    plain = Steps()
    fit(SFTModule(folder, optimizer=ADAM), batches(4), plain, val=batches(1), val_check_interval=2)
    for found, expected in zip(steps.weights + steps.after, plain.weights + plain.after, strict=True):
        assert_close(found, expected, 0.0)
    assert_close(trained(module), plain.weights[-1], 0.0)
    assert len(steps.validated) == 2
    for found, count in zip(steps.validated, (2, 4), strict=True):
        assert_close(found, mean(steps.weights[:count]))

    def exported(name: str) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        return {f"model.{n}": p.detach() for n, p in model.named_parameters()}

    assert_close(exported("at-2"), mean(steps.weights[:2]), 1e-12)
    assert_close(exported("last"), mean(steps.weights))
    assert_close(exported("best"), mean(steps.weights[: best.step]))
    # The same trainer measures the average afterwards, too; the weights that train come back.
    run.validate(module, batches(1), verbose=False)
    assert_close(steps.validated[-1], mean(steps.weights))
    assert_close(trained(module), plain.weights[-1], 0.0)
    module.save_pretrained(str(tmp_path / "by-hand"))
    assert_close(exported("by-hand"), mean(steps.weights))


def test_a_critic_is_exported_with_the_average(folder: str, tmp_path: Path) -> None:
    steps = Steps()
    export = ModelExport(str(tmp_path / "model"), critic_folder=str(tmp_path / "critic"))
    module = ppo(folder)
    fit(module, batches(2, prompts), steps, WeightAverage(DECAY), export, precision="32-true")
    name = "critic.head.weight"
    found = ValueModel.from_pretrained(tmp_path / "critic").head.weight
    torch.testing.assert_close(found, mean(steps.weights)[name].to(found), rtol=0, atol=1e-6)
    assert not torch.allclose(found, steps.weights[-1][name].to(found), rtol=0, atol=1e-6)
    assert_close({name: trained(module)[name]}, {name: steps.weights[-1][name]}, 0.0)


def test_half_precision_is_averaged_in_single(folder: str) -> None:
    steps, average = Steps(), WeightAverage(0.99)
    module = SFTModule(folder, optimizer=ADAM)
    fit(module, batches(3), steps, average, val=batches(1), precision="bf16-true", val_check_interval=3)
    assert {w.dtype for w in steps.weights[0].values()} == {torch.bfloat16}
    assert {w.dtype for w in average.average.values()} == {torch.float32}
    expected = mean([{n: w.double() for n, w in each.items()} for each in steps.weights], 0.99)
    assert_close(average.average, expected, 1e-6)
    assert_close(steps.validated[0], {n: w.to(torch.bfloat16) for n, w in average.average.items()}, 0.0)
    assert_close(trained(module), steps.weights[-1], 0.0)


@pytest.mark.parametrize("make", [lambda f: SFTModule(f, optimizer=ADAM), lambda f: ppo(f)], ids=["sft", "ppo"])
def test_a_resumed_run_continues_exactly(make: Any, folder: str, tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: str | None = None) -> tuple[Any, WeightAverage]:
        average = WeightAverage(DECAY, start_step=1)
        module = make(folder)
        saver = TrainingCheckpoint(str(tmp_path / name), every_n_steps=2)
        rows = prompts if isinstance(module, PPOModule) else demonstrations
        given = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 2, "enable_checkpointing": True}
        given |= {"precision": "32-true", "ckpt_path": resume, "default_root_dir": str(tmp_path)}
        fit(module, batches(2, rows), average, saver, val=batches(1, rows), **given)
        return module, average

    module, average = run("whole", 8)
    run("half", 4)
    again, resumed = run("half", 8, str(tmp_path / "half" / "step=4.ckpt"))
    assert resumed.num_steps == average.num_steps == 8
    assert_close(trained(again), trained(module), 0.0)
    assert_close(resumed.average, average.average, 0.0)
    # In the checkpoint the weights that train have their usual place.
    saved = torch.load(tmp_path / "half" / "step=8.ckpt", weights_only=True)
    weights = {name: saved["state_dict"][name] for name in trained(module)}
    assert_close(weights, trained(module), 0.0)


def ppo(folder: str) -> PPOModule:
    return FixedPPO(folder, **options(num_updates=2, optimizer=ADAM))


def test_a_checkpoint_without_an_average_starts_one(folder: str, tmp_path: Path) -> None:
    first = fit(SFTModule(folder, optimizer=ADAM), batches(2))
    first.save_checkpoint(tmp_path / "plain.ckpt")
    steps, average = Steps(), WeightAverage(DECAY)
    resume = {"ckpt_path": str(tmp_path / "plain.ckpt"), "max_epochs": 2}
    fit(SFTModule(folder, optimizer=ADAM), batches(2), steps, average, **resume)
    assert len(steps.weights) == 2
    assert_close(average.average, mean(steps.weights))


def test_an_average_of_other_weights_is_refused(folder: str) -> None:
    first, second = WeightAverage(DECAY), WeightAverage(DECAY)
    fit(SFTModule(folder, optimizer=ADAM), batches(1), first)
    module = SFTModule(folder, optimizer=ADAM, lora={"r": 2})
    run = trainer("64-true", max_steps=1)
    second.setup(run, module, "fit")
    second.load_state_dict(first.state_dict())
    module.configure_model()
    with pytest.raises(ValueError, match="the checkpoint's average is not one of the weights that are trained here"):
        second.on_train_start(run, module)


class Fails(lightning.Callback):
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        raise KeyError("stop")


def test_an_error_in_validation_leaves_the_weights_that_train(folder: str) -> None:
    steps, module = Steps(), SFTModule(folder, optimizer=ADAM)
    with pytest.raises(KeyError, match="stop"):
        fit(module, batches(2), steps, WeightAverage(DECAY), Fails(), val=batches(1))
    assert_close(trained(module), steps.weights[-1], 0.0)
    assert not torch.equal(next(iter(trained(module).values())), next(iter(steps.validated[-1].values())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decay": 1.5}, "decay is 1.5; it must be in [0, 1]"),
        ({"decay": float("nan")}, "decay is nan; it must be in [0, 1]"),
        ({"start_step": -1}, "start_step is -1; it must be a whole number of at least 0"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightAverage(**given)


def test_a_module_that_is_not_ours() -> None:
    with pytest.raises(ValueError, match="WeightAverage needs a PostTrainingModule; it was given a BoringModel"):
        trainer("32-true", max_steps=1, callbacks=[WeightAverage()]).fit(BoringModel())
