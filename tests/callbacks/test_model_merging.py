"""Merges of snapshots in training, against weights that are merged by hand."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.callbacks import ModelExport, ModelMerging, TrainingCheckpoint, WeightAverage
from rlhf_lightning.callbacks.snapshot_merges import decay_weights
from rlhf_lightning.core.measuring import measure_validation
from rlhf_lightning.datamodules import SFTDataModule

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import pairs
from ..rl.fixed_rollouts import FixedGRPO, options, prompts
from .test_weight_average import Steps, assert_close, batches, fit, trained

ADAM = partial(torch.optim.AdamW, lr=0.01)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


class Told(lightning.Callback):
    """Measures what it is told, and notes the weights that it is shown."""

    name = "val/told"

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.weights: list[Weights] = []

    def measure(self, trainer: Any, pl_module: Any) -> float:
        self.weights.append(trained(pl_module))
        return self.values.pop(0)


BETTER, WORSE = (0.0, 1.0), (1.0, 0.0)  # the policy, the merge
told = partial(ModelMerging, "val/told", "max")


class Starts(Steps):
    """Also the weights that each batch starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[Weights] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.first = trained(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.starts.append(trained(pl_module))


def mean(weights: list[Weights]) -> Weights:
    return {name: torch.stack([w[name].double() for w in weights]).mean(0) for name in weights[0]}


def sft(folder: str, **given: Any) -> SFTModule:
    return SFTModule(folder, optimizer=ADAM, **given)


@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_the_mean_of_the_last_snapshots_at_the_end(eta: float, folder: str, tmp_path: Path) -> None:
    steps, merging, judge = Starts(), told(num_models=3, snapshot_every_n_steps=1, eta=eta), Told(*BETTER)
    export = ModelExport(str(tmp_path / "model"))
    module = sft(folder)
    # Listed last, it comes first: the export holds the merge.
    fit(module, batches(5), export, steps, judge, merging)
    average = mean(steps.weights[-3:])
    expected = {name: steps.first[name] + eta * (average[name] - steps.first[name]) for name in average}
    assert_close(trained(module), expected)
    assert_close(judge.weights[0], steps.weights[-1], 0.0)
    assert_close(judge.weights[1], expected)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert_close({f"model.{n}": p.detach() for n, p in exported.named_parameters()}, expected)
    assert merging.history == [{"step": 5, "policy": 0.0, "merged": 1.0, "kept": True}]
    # The trained weights differ from it, and training is as without the callback.
    plain = Starts()
    fit(sft(folder), batches(5), plain)
    for found, other in zip(steps.weights, plain.weights, strict=True):
        assert_close(found, other, 0.0)


def test_the_last_weights_are_a_snapshot_once(folder: str) -> None:
    """Snapshots after steps 2 and 4, and the weights after step 5; with one every epoch, those of the last two."""
    for given, epochs, chosen in (
        ({"snapshot_every_n_steps": 2}, 1, [1, 3, 4]),
        ({}, 3, [1, 3, 5]),
        ({"snapshot_every_n_steps": 1, "num_models": 2}, 1, [3, 4]),
    ):
        steps, module = Starts(), sft(folder)
        fit(module, batches(5 if epochs == 1 else 2), steps, Told(*BETTER), told(**given), max_epochs=epochs)
        assert_close(trained(module), mean([steps.weights[n] for n in chosen]))


@pytest.mark.parametrize(
    ("values", "given", "kept"),
    [
        (BETTER, {}, True),
        (WORSE, {}, False),
        ((1.0, 1.0), {}, False),
        ((1.0, 0.9), {"max_drop": 0.2}, True),
        ((1.0, 0.7), {"max_drop": 0.2}, False),
        ((1.0, math.nan), {}, False),
        ((math.nan, 0.0), {}, True),
        (WORSE, {"mode": "min"}, True),
    ],
)
def test_only_what_is_better_is_kept(values: tuple[float, float], given: Any, kept: bool, folder: str) -> None:
    steps, module = Starts(), sft(folder)
    merging = ModelMerging("val/told", **{"mode": "max", "snapshot_every_n_steps": 1, **given})
    fit(module, batches(3), steps, Told(*values), merging)
    assert_close(trained(module), mean(steps.weights) if kept else steps.weights[-1], 1e-12 if kept else 0.0)
    assert [entry["kept"] for entry in merging.history] == [kept]


def test_a_policy_whose_merges_fail_is_that_without_the_callback(folder: str) -> None:
    """Bit for bit, on CPUs, with validation and dropout, whose random numbers must not move."""

    def run(*callbacks: Any) -> SFTModule:
        torch.manual_seed(1)
        module = sft(folder, dropout=0.1)
        fit(module, batches(2), *callbacks, val=batches(1), max_epochs=3)
        return module

    merging = ModelMerging("val/loss", mode="max", snapshot_every_n_steps=1, merge_every_n_epochs=1, eta=0.01)
    module = run(merging)  # back to the start, and measured by a loss that should grow: kept
    assert any(entry["kept"] for entry in merging.history)
    failing = ModelMerging("val/loss", snapshot_every_n_steps=1, merge_every_n_epochs=1, eta=0.01)
    same = run(failing)
    assert [entry["kept"] for entry in failing.history] == [False] * 3
    plain = run()
    assert_close(trained(same), trained(plain), 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(trained(module).values(), trained(plain).values(), strict=True))


def test_periodic_merges_continue_from_the_mean_with_a_fresh_optimizer(folder: str) -> None:
    steps, module = Starts(), sft(folder)
    merging = told(num_models=2, snapshot_every_n_steps=1, merge_every_n_epochs=1)
    fit(module, batches(3), steps, Told(*BETTER, *WORSE), merging, max_epochs=2)
    first = mean(steps.weights[1:3])
    assert_close(steps.starts[3], first)
    # The second epoch is a run of its own from there, moments included; its merge is not kept.
    fresh, again = Starts(), sft(folder)
    again.configure_model()

    class From(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                for name, weight in pl_module.named_parameters():
                    weight.copy_(steps.starts[3][name])

    fit(again, batches(3), From(), fresh)
    for found, expected in zip(steps.weights[3:], fresh.weights, strict=True):
        assert_close(found, expected, 0.0)
    assert_close(trained(module), steps.weights[-1], 0.0)


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    """The formula, on flattened vectors."""
    a, b = one.flatten(), other.flatten()
    if a.norm() == 0 or b.norm() == 0:
        return (1 - t) * one + t * other
    omega = torch.acos((a @ b / a.norm() / b.norm()).clamp(-1, 1))
    return (torch.sin((1 - t) * omega) * one + torch.sin(t * omega) * other) / torch.sin(omega)


@pytest.mark.parametrize(("count", "values"), [(2, BETTER), (2, WORSE), (3, BETTER)])
def test_rounds_of_warp(count: int, values: Any, folder: str) -> None:
    steps, module = Starts(), sft(folder)
    merging, rows = told(method="warp", num_models=count, eta=0.3, snapshot_every_n_steps=2), batches(2 * count)
    fit(module, rows, steps, Told(*values), merging)
    # Each policy of the round starts at the start, as a run of its own, moments included.
    start, ends = steps.first, [steps.weights[2 * n + 1] for n in range(count)]
    for n in range(count):
        assert_close(steps.starts[2 * n], start, 0.0)
    plain = Starts()
    fit(sft(folder), Batches(*rows.batches[-2:]), plain)
    assert_close(ends[-1], plain.weights[-1], 0.0)

    expected = {}
    for name, origin in start.items():
        merged = ends[0][name] - origin
        for n, end in enumerate(ends[1:], start=2):
            merged = slerp(merged, end[name] - origin, 1 / n)
        expected[name] = origin + 0.3 * merged
    assert_close(merging.start, expected if values == BETTER else ends[-1], 1e-9 if values == BETTER else 0.0)
    assert_close(trained(module), merging.start, 0.0)
    assert merging.snapshots == []
    if count == 2 and values == BETTER:  # the arc is not the chord
        head = "model.lm_head.weight"
        chord = start[head] + 0.3 * ((ends[0][head] + ends[1][head]) / 2 - start[head])
        assert (trained(module)[head] - start[head]).norm() > 1.01 * (chord - start[head]).norm()


def test_an_adapter_alone_is_merged(folder: str) -> None:
    steps = Starts()
    module = DPOModule(folder, lora={"r": 2}, reference="frozen", optimizer=ADAM)
    merging = ModelMerging("val/loss", snapshot_every_n_steps=1, num_models=2, max_drop=10.0)
    fit(module, batches(3, pairs), steps, merging, val=batches(1, pairs))
    assert merging.history[0]["kept"]
    assert all("lora_" in name for name in trained(module))
    assert_close(trained(module), mean(steps.weights[-2:]))


def test_a_policy_that_samples(folder: str) -> None:
    """Measured on its own completions, which are those of validation; the batch's samples stay for other callbacks."""
    module = FixedGRPO(folder, **options(num_generations=2, optimizer=ADAM))
    merging = ModelMerging("val/reward", snapshot_every_n_steps=1, num_models=2)
    seen: list[Any] = []

    class Samples(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append([prompt.row_id for prompt in pl_module.last_rollouts.prompts])

    rows = batches(2, prompts)
    run = fit(module, rows, Samples(), merging, val=batches(1, prompts))
    assert seen == [[e.row_id for e in batch.examples] for batch in rows]
    assert merging.history[0]["policy"] == float(run.callback_metrics["val/reward"])
    assert not merging.history[0]["kept"]  # fixed completions have one reward


def test_what_is_measured_is_what_validation_logs(folder: str) -> None:
    found: dict[str, float] = {}

    class Measures(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            state, modes = torch.get_rng_state(), [module.training for module in pl_module.modules()]
            found.update(measure_validation(trainer, pl_module))
            assert torch.equal(torch.get_rng_state(), state)
            assert [module.training for module in pl_module.modules()] == modes

    val = [Batches(*batches(2, pairs)), Batches(*batches(1, pairs))]
    for loaders in (val[0], val):
        found.clear()
        run = fit(DPOModule(folder, optimizer=ADAM), batches(1, pairs), Measures(), val=loaders)
        logged = {name: float(v) for name, v in run.callback_metrics.items() if name.startswith("val/")}
        assert found == pytest.approx(logged, rel=1e-6)
        assert "val/loss" in found or "val/loss/dataloader_idx_1" in found


# Interruptions.


# Three batches an epoch.
ROWS = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in range(6)]


@pytest.mark.parametrize(
    "given",
    [
        {"num_models": 2, "snapshot_every_n_steps": 1, "merge_every_n_epochs": 1},
        {"num_models": 3, "snapshot_every_n_steps": 1, "eta": 0.5},
        {"method": "warp", "num_models": 2, "snapshot_every_n_steps": 2, "eta": 0.5},
    ],
    ids=["mean", "end", "warp"],
)
@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_a_resumed_run_continues_exactly(stopped_at: int, given: Any, folder: str, tmp_path: Path) -> None:
    """Stopped by its number of steps, and extended; with bits that are equal on CPUs."""

    def run(name: str, steps: int, resume: str | None = None) -> tuple[Any, ModelMerging]:
        merging = ModelMerging("val/loss", max_drop=10.0, **given)
        module = sft(folder)
        saver = TrainingCheckpoint(str(tmp_path / name), every_n_steps=1, keep=9)
        data = SFTDataModule(train=ROWS, val=ROWS[:2], global_batch_size=2, tokenizer=folder)
        settings = {"max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": 0, "val_check_interval": 2}
        settings |= {"enable_checkpointing": True, "default_root_dir": str(tmp_path), "callbacks": [merging, saver]}
        run = trainer("32-true", **settings)
        run.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return module, merging

    module, merging = run("whole", 7)
    assert merging.history[-1]["kept"]
    run("part", stopped_at)
    again, resumed = run("part", 7, str(tmp_path / "part" / f"step={stopped_at}.ckpt"))
    assert_close(trained(again), trained(module), 0.0)
    assert resumed.history == merging.history
    saved = [torch.load(tmp_path / name / "step=7.ckpt", weights_only=True) for name in ("whole", "part")]
    for name in trained(module):
        assert torch.equal(saved[0]["state_dict"][name], saved[1]["state_dict"][name])


def test_a_run_that_has_ended_keeps_both(folder: str, tmp_path: Path) -> None:
    steps, module, export = Starts(), sft(folder), ModelExport(str(tmp_path / "model"))
    saver = TrainingCheckpoint(str(tmp_path / "ckpt"), every_n_steps=9)
    settings = {"enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    merging = told(snapshot_every_n_steps=1)
    fit(module, batches(3), steps, export, saver, Told(*BETTER), merging, **settings)
    path = str(tmp_path / "ckpt" / "step=3.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_close({name: saved[name] for name in steps.weights[-1]}, steps.weights[-1], 0.0)
    assert_close(trained(module), mean(steps.weights))

    # Nothing is left to train: the export is written again, and is the merge.
    again, export = sft(folder), ModelExport(str(tmp_path / "again"))
    fit(again, batches(3), export, told(snapshot_every_n_steps=1), Told(), ckpt_path=path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert_close({f"model.{n}": p.detach() for n, p in exported.named_parameters()}, trained(module))

    # A run that is extended continues from the weights that trained, not from the merge.
    whole, extended = sft(folder), sft(folder)
    fit(whole, batches(3), told(snapshot_every_n_steps=1), Told(*BETTER), max_epochs=2)
    fit(extended, batches(3), told(snapshot_every_n_steps=1), Told(*BETTER), max_epochs=2, ckpt_path=path)
    assert_close(trained(extended), trained(whole), 0.0)

    # A checkpoint that is validated shows the merge.
    seen = Starts()
    run = trainer("64-true", callbacks=[seen, told(snapshot_every_n_steps=1)])
    run.validate(sft(folder), batches(1), ckpt_path=path, verbose=False, weights_only=True)
    assert_close(seen.validated[-1], trained(module), 0.0)


DECAYS = {"linear": lambda x: 1 - x, "cosine": lambda x: math.cos(math.pi * x / 2) ** 2, "sqrt": lambda x: 1 - x**0.5}


@pytest.mark.parametrize("decay", DECAYS)
def test_weighted_means_stand_for_a_decay_of_the_updates(decay: Any, folder: str) -> None:
    steps, merging = Steps(), told(num_models=4, snapshot_every_n_steps=1, decay=decay)
    module = sft(folder)
    fit(module, batches(5), steps, merging, Told(*BETTER))
    window, rate = steps.weights[-4:], DECAYS[decay]
    expected = {name: weight.double() for name, weight in window[0].items()}
    for number, (before, after) in enumerate(pairwise(window), start=1):
        for name in expected:
            expected[name] = expected[name] + rate(number / 4) * (after[name] - before[name])
    assert_close(trained(module), expected)


def test_weights_of_a_window() -> None:
    assert decay_weights(1, "sqrt") == [1.0]
    assert decay_weights(5, "linear") == pytest.approx([0.2] * 5)
    assert decay_weights(4, "cosine") == pytest.approx([0.146447, 0.353553, 0.353553, 0.146447], abs=1e-6)
    assert decay_weights(4, "sqrt") == pytest.approx([0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5])


# Mistakes.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wrap"}, "did you mean 'warp'"),
        ({"num_models": 1}, "num_models is 1; it must be at least 2"),
        ({"snapshot_every_n_steps": 0}, "snapshot_every_n_steps is 0; it must be a whole number of at least 1"),
        ({"merge_every_n_epochs": 1, "method": "warp"}, "merge_every_n_epochs is 1 with method 'warp'"),
        ({"decay": "sqr"}, "decay is 'sqr'; it must be one of linear, cosine, sqrt; did you mean 'sqrt'?"),
        ({"decay": "sqrt", "method": "warp"}, "decay is 'sqrt' with method 'warp', which merges on the sphere"),
        ({"eta": 0.0}, "eta is 0.0; it must be in (0, 1]"),
        ({"max_drop": -1.0}, "max_drop is -1.0; it must be at least 0"),
        ({"monitor": "val/thing"}, "set mode to max or min"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelMerging(**given)


def test_a_metric_that_nothing_measures_is_refused_before_training(folder: str) -> None:
    steps = Starts()
    with pytest.raises(ValueError, match=r"'val/lost', which is not measured at validation \(measured: val/loss"):
        fit(sft(folder), batches(2), steps, ModelMerging("val/lost", "min"), val=batches(1))
    with pytest.raises(ValueError, match="there are no validation rows to measure it on"):
        fit(sft(folder), batches(2), steps, ModelMerging())
    assert steps.weights == []
    with pytest.raises(ValueError, match="ModelMerging needs a PostTrainingModule; it was given a BoringModel"):
        trainer("32-true", max_steps=1, callbacks=[ModelMerging()]).fit(BoringModel())


def test_snapshots_of_other_weights_are_refused(folder: str) -> None:
    first, second = told(snapshot_every_n_steps=1, max_drop=9.0), told(snapshot_every_n_steps=1)
    fit(sft(folder), batches(2), first, Told(*WORSE))
    module = sft(folder, lora={"r": 2})
    run = trainer("64-true", max_steps=1, callbacks=[Told()])
    second.setup(run, module, "fit")
    second.load_state_dict(first.state_dict())
    module.configure_model()
    with pytest.raises(ValueError, match=r"the checkpoint's snapshot is not one of .* or remove ModelMerging"):
        second.on_train_start(run, module)


def test_an_average_would_be_exported_in_place_of_the_merge(folder: str) -> None:
    for callbacks in ([told(snapshot_every_n_steps=1), WeightAverage()], [WeightAverage(), told()]):
        steps = Starts()
        with pytest.raises(ValueError, match=r"^ModelMerging exports its merge, and WeightAverage its average"):
            fit(sft(folder), batches(2), steps, Told(*BETTER), *callbacks)
        assert steps.weights == []
