"""What Lightning offers works with every kind of method, seen by values, or is refused at the start with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from rlhf_lightning import DPOModule, GRPOModule, SFTModule
from rlhf_lightning.core.hooks import CORE_HOOKS
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import tiny_model

Folder = Callable[[str], Path]
ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(4)]
PAIRS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(4)]
METHODS = ("sft", "dpo", "grpo")


def count_digits(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(character.isdigit() for character in text)) for text in completions]


def make(method: str, folder: Path, base: Callable[[type], type] = lambda cls: cls, **options: Any) -> Any:
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    if method == "sft":
        return base(SFTModule)(str(folder), **optimizer, **options)
    if method == "dpo":
        return base(DPOModule)(str(folder), reference="frozen", **optimizer, **options)
    extra = {"rewards": [count_digits], "num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    return base(GRPOModule)(str(folder), **extra, **optimizer, **options)


def rows(method: str, **options: Any) -> Any:
    kinds = {"sft": (SFTDataModule, ROWS), "dpo": (PreferenceDataModule, PAIRS), "grpo": (PromptDataModule, ROWS)}
    kind, train = kinds[method]
    return kind(**({"train": train, "val": train[:2], "global_batch_size": 2} | options))


def trainer(*callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return lightning.Trainer(callbacks=list(callbacks), **(defaults | options))


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


# Hooks that a subclass overrides.


def forgetful(cls: type) -> type:
    """A subclass whose overrides of the core's hooks never call super()."""

    def ignore(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None

    overrides = dict.fromkeys((name for name in CORE_HOOKS if name != "configure_callbacks"), ignore)
    others = dict.fromkeys(("setup", "teardown", "on_fit_end", "on_train_batch_end", "on_train_end"), ignore)
    return type(f"Forgetful{cls.__name__}", (cls,), overrides | others | {"configure_callbacks": lambda self: []})


@pytest.mark.parametrize("method", METHODS)
def test_hooks_overridden_without_super_lose_nothing(method: str, tiny_model_folder: Folder, tmp_path: Path) -> None:
    found = []
    for base in (lambda cls: cls, forgetful):
        lightning.seed_everything(0)
        module, run = make(method, tiny_model_folder("llama"), base), trainer()
        run.fit(module, rows(method))
        checkpoint = tmp_path / f"{base.__name__}.ckpt"
        run.save_checkpoint(checkpoint)
        state = torch.load(checkpoint, weights_only=True)
        found.append(
            (
                weights(module),
                float(run.callback_metrics.get("val/loss", run.callback_metrics.get("val/reward"))),
                state,
            )
        )
    (first, value, state), (second, again, other) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert value == again
    assert state.keys() == other.keys()
    with pytest.raises(ValueError, match="gradient_clip_val"):  # the core's own checks are made, too
        trainer(gradient_clip_val=1.0).fit(make(method, tiny_model_folder("llama"), forgetful), rows(method))


def test_an_override_that_calls_super_runs_the_core_once(tiny_model_folder: Folder) -> None:
    calls = []

    class Counted(SFTModule):
        def place_on_device(self) -> None:
            calls.append("placed")
            super().place_on_device()

    class Polite(Counted):
        def on_fit_start(self) -> None:
            calls.append("before")
            super().on_fit_start()
            calls.append("after")

    trainer(max_steps=1).fit(Polite(str(tiny_model_folder("llama"))), rows("sft", val=None))
    assert calls == ["before", "placed", "after"]


def test_a_subclass_may_build_its_own_model(tiny_model_folder: Folder) -> None:
    class Own(DPOModule):
        def configure_model(self) -> None:
            if self.model is None:
                self.model = tiny_model("llama", seed=5).train()

    module = Own(str(tiny_model_folder("llama")), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    run = trainer()
    run.fit(module, rows("dpo"))
    start = dict(tiny_model("llama", seed=5).named_parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in module.model.named_parameters())
    reference = dict(module.references[0].model.named_parameters())
    assert all(torch.equal(weight, start[name]) for name, weight in reference.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_that_only_returns_a_loss_is_refused(method: str, tiny_model_folder: Folder) -> None:
    def automatic(cls: type) -> type:
        def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            return next(self.parameters()).sum()

        return type("Automatic", (cls,), {"training_step": training_step})

    with pytest.raises(
        ValueError, match=r"training_step returned a Tensor and made no optimizer step; .*override loss"
    ):
        trainer().fit(make(method, tiny_model_folder("llama"), automatic), rows(method))


@pytest.mark.parametrize("hook", ["optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"])
def test_hooks_that_are_never_called_are_refused(hook: str, tiny_model_folder: Folder) -> None:
    cls = type("Mine", (SFTModule,), {hook: lambda self, *args, **kwargs: None})
    with pytest.raises(
        ValueError, match=f"Mine overrides {hook}, which is never called where a module steps manually: "
    ):
        trainer().fit(cls(str(tiny_model_folder("llama"))), rows("sft"))


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_see_what_a_step_came_to(method: str, tiny_model_folder: Folder) -> None:
    seen: list[tuple[float, float]] = []
    zeroed: list[bool] = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((float(outputs["loss"]), float(trainer.callback_metrics["train/loss"])))
            assert {"grad_norm", "learning_rate"} < outputs.keys()

        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            zeroed.append(any(weight.grad is not None for weight in module.parameters()))

    trainer(Look()).fit(make(method, tiny_model_folder("llama")), rows(method))
    assert len(seen) == 2
    assert all(given == logged for given, logged in seen)
    assert zeroed == [True, True]


# Optimizers and schedules.


def scheduled(folder: Path, returned: Callable[[Any], Any], **options: Any) -> list[float]:
    """The learning rate after every step of two epochs of two batches."""

    class Mine(SFTModule):
        def configure_optimizers(self) -> Any:
            return returned(torch.optim.SGD(self.parameters(), lr=1.0e-9))

    rates: list[float] = []

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] * 1e9)

        def on_train_end(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] * 1e9)

    trainer(Look(), max_epochs=2, **options).fit(Mine(str(folder)), rows("sft"))
    return rates


def half(optimizer: Any, **options: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 1, gamma=0.5), **options}


SCHEDULES = {
    "epochs are Lightning's default": (lambda o: ([o], [half(o)["scheduler"]]), [1, 1, 0.5, 0.5, 0.25]),
    "epoch": (lambda o: {"optimizer": o, "lr_scheduler": half(o, interval="epoch")}, [1, 1, 0.5, 0.5, 0.25]),
    "every other epoch": (lambda o: ([o], [half(o, interval="epoch", frequency=2)]), [1, 1, 1, 1, 0.5]),
    "step": (lambda o: {"optimizer": o, "lr_scheduler": half(o, interval="step")}, [1, 0.5, 0.25, 0.125, 0.0625]),
    "every other step": (lambda o: ([o], [half(o, interval="step", frequency=2)]), [1, 1, 0.5, 0.5, 0.25]),
    "two": (lambda o: ([o], [half(o, interval="step"), half(o)]), [1, 0.5, 0.125, 0.0625, 0.015625]),
    # The loss stands still: the first value is the best, and every later one halves the rate.
    "plateau": (
        lambda o: {
            "optimizer": o,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(o, factor=0.5, patience=0, eps=0), "monitor": "val/loss"},
        },
        [1, 1, 1, 1, 0.5],
    ),
    "plateau, monitor next to it": (
        lambda o: {
            "optimizer": o,
            "lr_scheduler": ReduceLROnPlateau(o, factor=0.5, patience=0, eps=0),
            "monitor": "val/loss",
        },
        [1, 1, 1, 1, 0.5],
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_go_by_their_interval_frequency_and_metric(case: str, tiny_model_folder: Folder) -> None:
    returned, expected = SCHEDULES[case]
    assert scheduled(tiny_model_folder("llama"), returned) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda o: [o, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)], "returns 2 optimizers; a batch"),
        (lambda o: None, "returns no optimizers; a batch makes a step of one here"),
        (lambda o: ([o], [ReduceLROnPlateau(o)]), r"returns ReduceLROnPlateau without a metric: return \{'optimizer'"),
        (lambda o: ([o], [{"scheduler": ReduceLROnPlateau(o), "monitor": "val/los"}]), "waits for 'val/los', which is"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned")
def test_optimizers_that_no_step_could_use(returned: Any, message: str, tiny_model_folder: Folder) -> None:
    with pytest.raises(ValueError, match=message):
        scheduled(tiny_model_folder("llama"), returned)


# Lightning's checkpoints.


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_train_steps": 2}, [3, 6]),
        ({"every_n_train_steps": 6}, [6]),
        ({"every_n_train_steps": 4}, [6]),
        ({"train_time_interval": timedelta(0)}, [3, 6]),
        ({"train_time_interval": timedelta(days=1)}, []),
        ({"every_n_train_steps": 1, "monitor": "train/loss", "mode": "min", "save_top_k": 1}, [6]),
        ({"save_on_train_epoch_end": True}, [6]),
    ],
)
def test_checkpoints_come_when_lightning_says(
    options: dict[str, Any], expected: list[int], tiny_model_folder: Folder, tmp_path: Path
) -> None:
    class Thrice(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for _ in range(3):
                result = super().training_step(batch, batch_idx)
            return result

    module = Thrice(str(tiny_model_folder("llama")), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    saver = ModelCheckpoint(tmp_path, "{step}", **({"save_top_k": -1} | options))
    trainer(saver).fit(module, rows("sft", val=None, train=ROWS[:2] * 2, shuffle=False))
    assert steps_saved(tmp_path) == expected
    if expected:
        last = torch.load(tmp_path / f"step={expected[-1]}.ckpt", weights_only=True)
        assert last["global_step"] == expected[-1]


# Refused features, with their replacements.


class Freezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.get_input_embeddings())

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.get_input_embeddings(), optimizer, lr=0.1)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: StochasticWeightAveraging(1e-2),
            "only raise the learning rate: use rlhf_lightning.callbacks.WeightAver",
        ),
        (
            EMAWeightAveraging,
            "copies the whole module, reference policies included.*: use rlhf_lightning.callbacks.Wei",
        ),
        (
            lambda: GradientAccumulationScheduler({0: 2}),
            "one batch is one optimizer step here: set the datamodule's glob",
        ),
        (
            lambda: ModelPruning("l1_unstructured", [], amount=0.5),
            "prunes in hooks of layers.*: prune the exported model",
        ),
        (Freezing, r"Freezing freezes layers before fit has built the model .*: call module.configure_model\(\) first"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_callbacks_that_would_do_something_else_are_refused(
    callback: Any, message: str, method: str, tiny_model_folder: Folder
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(callback()).fit(make(method, tiny_model_folder("llama")), rows(method))


def test_a_compiled_or_watched_module_is_refused(tiny_model_folder: Folder) -> None:
    compiled: Any = torch.compile(SFTModule(str(tiny_model_folder("llama"))))
    with pytest.raises(ValueError, match=r"was given to torch.compile, .*: pass the module itself"):
        trainer().fit(compiled, rows("sft"))
    module = SFTModule(str(tiny_model_folder("llama")))
    module._wandb_hook_names = []  # what wandb.watch leaves on a module that has no weights yet
    with pytest.raises(
        ValueError, match=r"WandbLogger.watch found no weights before fit has built the model of SFTMod"
    ):
        trainer().fit(module, rows("sft"))
    module._wandb_hook_names = ["parameters/"]
    with pytest.raises(ValueError, match=r"write logger.watch\(module, log='gradients', log_graph=False\)"):
        trainer().fit(module, rows("sft"))


def test_freezing_before_fit(tiny_model_folder: Folder) -> None:
    module = make("dpo", tiny_model_folder("llama"))
    module.freeze()
    with pytest.raises(ValueError, match=r"nothing is trainable: .*call unfreeze\(\) after freeze\(\)"):
        trainer().fit(module, rows("dpo"))
    module.unfreeze()
    trainer().fit(module, rows("dpo"))
    module = make("sft", tiny_model_folder("llama"))
    module.configure_model()
    seen = []

    class Look(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(module.model.get_input_embeddings().weight.detach().clone())

    before = module.model.get_input_embeddings().weight.detach().clone()
    trainer(Freezing(), Look(), max_epochs=2).fit(module, rows("sft"))
    assert torch.equal(seen[0], before)
    assert not torch.equal(seen[1], before)


# Features that work as anywhere.


@pytest.mark.parametrize("method", METHODS)
def test_several_loaders_have_numbers_of_their_own(method: str, tiny_model_folder: Folder) -> None:
    module, data = make(method, tiny_model_folder("llama")), rows(method)
    single, expected = trainer(), []
    name = "val/reward" if method == "grpo" else "val/loss"
    loaders = []
    for part in (slice(0, 1), slice(1, 4)):
        part_data = rows(method, val=data.sources["train"][part], tokenizer=module.tokenizer)
        single.validate(module, datamodule=part_data, verbose=False)
        expected.append(float(single.callback_metrics[name]))
        loaders.append(part_data.val_dataloader())
    run = trainer()
    run.validate(module, dataloaders=loaders, verbose=False)
    found = [float(run.callback_metrics[f"{name}/dataloader_idx_{n}"]) for n in range(2)]
    assert found == pytest.approx(expected)
    assert name not in run.callback_metrics


FEATURES: dict[str, dict[str, Any]] = {
    "overfit_batches": {"overfit_batches": 1},
    "limits": {"limit_train_batches": 1, "limit_val_batches": 1},
    "val_check_interval": {"val_check_interval": 1},
    "detect_anomaly": {"detect_anomaly": True},
    "simple profiler": {"profiler": "simple"},
    "advanced profiler": {"profiler": "advanced"},
    "barebones": {"barebones": True, "logger": None, "enable_progress_bar": None, "enable_checkpointing": None},
    "max_time": {"max_time": timedelta(hours=1)},
    "tqdm": {"enable_progress_bar": True, "callbacks": TQDMProgressBar},
    "rich": {"enable_progress_bar": True, "callbacks": RichProgressBar},
    "device stats": {"logger": DummyLogger, "callbacks": lambda: DeviceStatsMonitor(cpu_stats=False)},
    "timer": {"callbacks": lambda: Timer(timedelta(hours=1), interval="step")},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_change_no_weights(feature: str, tiny_model_folder: Folder) -> None:
    """One step on the same batch, whatever watches it."""
    options = copy.copy(FEATURES[feature])
    callbacks = [options.pop("callbacks")()] if "callbacks" in options else []
    options = {name: value() if name == "logger" and value else value for name, value in options.items()}
    found = []
    for own, given in ((callbacks, options), ([], {})):
        if given.get("barebones"):
            given = {**given, "num_sanity_val_steps": None, "enable_model_summary": None}
        module = make("sft", tiny_model_folder("llama"))
        run = trainer(*own, **{"max_steps": 1, "max_epochs": -1} | given)
        run.fit(module, rows("sft", train=ROWS[:2]))
        assert run.global_step == 1
        found.append(weights(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_timer_and_early_stopping_end_a_run(tiny_model_folder: Folder) -> None:
    for callback in (
        Timer(timedelta(microseconds=1), interval="step"),
        EarlyStopping("val/loss", patience=1, min_delta=1e6),
    ):
        run = trainer(callback, max_epochs=5)
        run.fit(make("sft", tiny_model_folder("llama")), rows("sft"))
        assert run.global_step == {Timer: 1, EarlyStopping: 4}[type(callback)]


class Remembering(DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[float]] = {}
        self.settings: dict[str, Any] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(float(value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings |= dict(params)


def test_loggers_get_the_rates_and_what_a_run_depends_on(tiny_model_folder: Folder) -> None:
    logger = Remembering()
    module = SFTModule(
        str(tiny_model_folder("llama")),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.25, weight_decay=0.125),
        lr_scheduler=lambda o: StepLR(o, 1, gamma=0.5),
    )
    run = trainer(LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    run.fit(module, rows("sft", max_length=64))
    rates = [values for name, values in logger.metrics.items() if name in ("lr-AdamW/pg1", "lr-AdamW/pg2")]
    assert rates == [[0.25, 0.125]] * 2  # with weight decay, and norms and biases without
    assert logger.settings["optimizer"]["name"] == "AdamW"
    assert (logger.settings["optimizer"]["lr"], logger.settings["optimizer"]["weight_decay"]) == (0.25, 0.125)
    assert logger.settings["lr_scheduler"] == {"name": "StepLR", "interval": "step", "step_size": 1, "gamma": 0.5}
    data = logger.settings["data"]
    assert (data["name"], data["global_batch_size"], data["max_length"]) == ("SFTDataModule", 2, 64)


def test_batches_from_a_plain_data_loader(tiny_model_folder: Folder) -> None:
    found = []
    for plain in (False, True):
        module = make("dpo", tiny_model_folder("llama"))
        data = rows("dpo", shuffle=False, tokenizer=module.tokenizer)
        if plain:
            data.setup("fit")
            examples = [example for batch in data.train_dataloader() for example in batch.examples]
            loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=ExampleBatch)  # type: ignore[arg-type]
            trainer().fit(module, train_dataloaders=loader)
        else:
            trainer().fit(module, datamodule=data)
        found.append(weights(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_loads_without_the_run(method: str, tiny_model_folder: Folder, tmp_path: Path) -> None:
    module, run = make(method, tiny_model_folder("llama")), trainer()
    run.fit(module, rows(method))
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    found = weights(loaded)
    assert all(torch.equal(found[name], weight) for name, weight in weights(module).items())
