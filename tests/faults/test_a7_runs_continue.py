"""A run that is stopped anywhere and given more ends as one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning import GRPOModule, SFTModule
from rlhf_lightning.callbacks import TrainingCheckpoint
from rlhf_lightning.cli import main
from rlhf_lightning.core.stopping import StopOnSignal
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule
from tests.integration.test_resume import LORA, Metrics, Noise, assert_same, digits, ignore_totals

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]
ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(7)]  # an epoch: four batches of 2, 2, 2, 1
PROMPTS = [{"prompt": f"{n}+{n}="} for n in range(7)]
ON_POLICY: dict[str, Any] = {"rewards": [digits], "num_generations": 2, "max_completion_length": 2, "num_updates": 2}


@dataclass(frozen=True)
class Kind:
    """Options that a stopped run and an unstopped one share."""

    streaming: bool = False
    validates: float | int | None = 1.0  # Lightning's val_check_interval; None: no validation rows
    on_policy: bool = False


@dataclass(frozen=True)
class Stop:
    """Ends the first part of a run."""

    limits: tuple[tuple[str, int], ...] = ()
    signal_at: int | None = None  # after the batch that makes this step
    in_validation: bool = False  # or in the validation that follows it


class Signals(lightning.Callback):
    """Sends this process a signal at some moment."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.stop.signal_at and not self.stop.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.stop.signal_at and self.stop.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    kind: Kind,
    model: Path,
    folder: Path,
    *callbacks: lightning.Callback,
    saver: ModelCheckpoint | None = None,
    resume: str | Path | None = None,
    **limits: Any,
) -> tuple[lightning.Trainer, Metrics]:
    """A run; what it draws before training must not matter where it is resumed."""
    lightning.seed_everything(1 if resume is None else 2, verbose=False)
    metrics = Metrics()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=metrics,
        callbacks=[saver or TrainingCheckpoint(str(folder), every_n_steps=1000), Noise(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        val_check_interval=None if kind.validates is None else kind.validates,
        **limits,
    )
    validation = None if kind.validates is None else 3
    data: Any
    if kind.on_policy:
        module: Any = GRPOModule(str(model), lora=LORA, beta=0.1, **ON_POLICY)
        data, rows = PromptDataModule, PROMPTS
    else:
        module = SFTModule(str(model), lora=LORA)
        data, rows = SFTDataModule, ROWS
    module._optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    module._lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    rows = data(
        train=rows,
        val=rows[:validation] if validation else None,
        global_batch_size=2,
        streaming=kind.streaming,
        shuffle_buffer=4,
    )
    trainer.fit(module, datamodule=rows, ckpt_path=resume)
    return trainer, metrics


def last(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    ignore_totals(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tmp_path_factory) -> Callable[..., tuple[dict[str, Any], list[Any]]]:
    """The last checkpoint and the log of a run that nothing stops, once for each kind."""

    @cache
    def run(kind: Kind, **limits: int) -> tuple[dict[str, Any], list[Any]]:
        folder = tmp_path_factory.mktemp("whole")
        _, metrics = fit(kind, tiny_model_folder(), folder, **limits)
        return load(last(folder)), metrics.rows

    return run


def assert_goes_on(kind: Kind, stop: Stop, limits: dict[str, int], whole: Any, model: Path, folder: Path) -> None:
    expected, logged = whole(kind, **limits)
    callbacks = [Signals(stop)]
    rows: list[Any] = []
    if stop.signal_at is None:
        _, metrics = fit(kind, model, folder, *callbacks, **(limits | dict(stop.limits)))
        rows = metrics.rows
    else:
        metrics = Metrics()
        with pytest.raises(SIGTERMException) as stopped:
            fit(kind, model, folder, *callbacks, Copy(metrics), **limits)
        assert stopped.value.code == 128 + signal.SIGTERM
        rows = metrics.rows
    trainer, metrics = fit(kind, model, folder, resume="last", **limits)
    assert trainer.ckpt_path is not None
    assert_same(rows + metrics.rows, logged, f"{kind} {stop} logged")
    assert_same(load(last(folder)), expected, f"{kind} {stop}")


class Copy(lightning.Callback):
    """Hands out the rows of a run that does not come to its end."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_exception(self, trainer: lightning.Trainer, *args: Any) -> None:
        assert isinstance(trainer.logger, Metrics)
        self.metrics.rows = trainer.logger.rows


def limits_of(name: str, kind: Kind) -> dict[str, int]:
    steps = 20 if kind.on_policy else 10
    return {
        "steps": {"max_epochs": -1, "max_steps": steps},
        "epochs": {"max_epochs": 3},
        "both": {"max_epochs": 3, "max_steps": steps},
    }[name]


def stops(kind: Kind, name: str) -> Iterator[Stop]:
    """Every place in which a run of a kind can be stopped by a limit or a signal."""
    steps = 2 if kind.on_policy else 1
    for step in range(1, 9):
        if name == "both":
            yield Stop((("max_epochs", 1 + (step - 1) // 4), ("max_steps", step * steps)))
        if name != "epochs":
            yield Stop((("max_steps", step * steps),))
        yield Stop(signal_at=step * steps)
        if kind.validates is not None and (
            step % 4 == 0 if kind.validates == 1.0 else (step - 1) % 4 % kind.validates == kind.validates - 1
        ):
            yield Stop(signal_at=step * steps, in_validation=True)
    if name == "epochs":
        yield from (Stop((("max_epochs", epochs),)) for epochs in (1, 2))


# One of every kind of run, limit and stop; `test_wherever_it_is_stopped` has them all.
FAST = [
    (Kind(), "both", Stop((("max_epochs", 2), ("max_steps", 5)))),
    (Kind(), "epochs", Stop(signal_at=3)),
    (Kind(), "steps", Stop((("max_steps", 4),))),
    (Kind(validates=3), "both", Stop(signal_at=3, in_validation=True)),
    (Kind(True, 2), "both", Stop((("max_epochs", 1), ("max_steps", 2)))),
    (Kind(True, None), "epochs", Stop((("max_epochs", 2),))),
    (Kind(on_policy=True), "both", Stop((("max_epochs", 1), ("max_steps", 3)))),
    (Kind(on_policy=True), "both", Stop(signal_at=8, in_validation=True)),
]


@pytest.mark.parametrize(("kind", "name", "stop"), FAST, ids=range(len(FAST)))
def test_a_run_that_is_given_more_ends_as_one_that_was_never_stopped(
    kind, name, stop, whole, tiny_model_folder, tmp_path
):
    assert_goes_on(kind, stop, limits_of(name, kind), whole, tiny_model_folder(), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["steps", "epochs", "both"])
@pytest.mark.parametrize("validates", [None, 1.0, 2, 3])
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["offline", "on-policy"])
def test_wherever_it_is_stopped(on_policy, streaming, validates, name, whole, tiny_model_folder, tmp_path):
    kind = Kind(streaming, validates, on_policy)
    for number, stop in enumerate(stops(kind, name)):
        folder = tmp_path / str(number)
        assert_goes_on(kind, stop, limits_of(name, kind), whole, tiny_model_folder(), folder)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"save_last": True}, {"max_epochs": 1, "max_steps": 2}),  # saved when the epoch that is cut short "ends"
        ({"every_n_train_steps": 4, "save_last": True}, {"max_epochs": 1}),  # before the validation of the same step
        ({"every_n_train_steps": 6, "save_last": True}, {"max_epochs": 2, "max_steps": 6}),
    ],
    ids=["at a cut", "before validation", "in an epoch"],
)
def test_lightnings_own_checkpoints_continue_too(options, limits, whole, tiny_model_folder, tmp_path):
    kind = Kind()
    expected, logged = whole(kind, **limits_of("both", kind))
    saver = ModelCheckpoint(tmp_path / "own", **options)
    fit(kind, tiny_model_folder(), tmp_path / "first", saver, **limits)
    resume = tmp_path / "own" / "last.ckpt"
    _, metrics = fit(kind, tiny_model_folder(), tmp_path / "second", resume=resume, **limits_of("both", kind))
    assert metrics.rows
    assert_same(metrics.rows, logged[-len(metrics.rows) :], "logged")
    found = load(last(tmp_path / "second"))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "post_training"):
        assert_same(found[name], expected[name], name)


def test_more_time_is_more(whole, tiny_model_folder, tmp_path):
    kind, limits = Kind(), {"max_epochs": 3}

    class Late(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                next(c for c in trainer.callbacks if isinstance(c, Timer))._start_time["train"] -= 3600

    fit(kind, tiny_model_folder(), tmp_path, Late(), max_time=timedelta(hours=1), **limits)
    assert last(tmp_path).name == "step=3.ckpt"
    trainer, _ = fit(kind, tiny_model_folder(), tmp_path, resume="last", max_time=timedelta(hours=1), **limits)
    assert trainer.global_step == 3, "no more time was given"
    trainer, _ = fit(kind, tiny_model_folder(), tmp_path, resume="last", max_time=timedelta(hours=9), **limits)
    assert trainer.global_step == 12
    found, (expected, _) = load(last(tmp_path)), whole(kind, **limits)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "post_training"):
        assert_same(found[name], expected[name], name)


def test_what_was_stopped_on_purpose_stays_so(tiny_model_folder, tmp_path):
    def stopper() -> EarlyStopping:
        return EarlyStopping("val/loss", mode="max", patience=1)  # the loss falls: the second validation is the last

    trainer, _ = fit(Kind(), tiny_model_folder(), tmp_path, stopper(), max_epochs=9)
    assert trainer.global_step == 8
    trainer, _ = fit(Kind(), tiny_model_folder(), tmp_path, stopper(), resume="last", max_epochs=9)
    assert trainer.global_step == 8


def test_the_newest_checkpoint_is_that_of_the_latest_step(tiny_model_folder, tmp_path):
    saver = TrainingCheckpoint(str(tmp_path), every_n_steps=2, keep=9)
    fit(Kind(), tiny_model_folder(), tmp_path, saver=saver, max_epochs=-1, max_steps=10)
    (tmp_path / "step=best.ckpt").write_bytes(b"somebody else's")
    for age, step in enumerate((10, 2, 8, 4, 6)):  # as copying leaves them
        os.utime(tmp_path / f"step={step}.ckpt", ns=(age * 10**9, age * 10**9))
    assert saver.newest() == tmp_path / "step=10.ckpt"


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and a run keeps to that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_says_how_to_continue_and_is_the_exit_status(signum, tiny_model_folder, tmp_path, caplog):
    class Presses(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stopped:
        fit(Kind(), tiny_model_folder(), tmp_path, Presses(), max_epochs=3)
    assert stopped.value.code == 128 + signum
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]
    assert f"stopped by {signum.name} after step 3" in caplog.text
    assert f"{str(tmp_path / 'step=3.ckpt')!r} holds the whole run up to step 3" in caplog.text
    assert "--ckpt_path=last" in caplog.text
    assert signal.getsignal(signum) == before


def test_ctrl_c_for_the_second_time_stops_at_once(tiny_model_folder, tmp_path, monkeypatch):
    seen = []

    class Presses(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))._noted -= 60
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("the batch is trained")

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(Kind(), tiny_model_folder(), tmp_path, Presses(), max_epochs=3)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not seen
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("entrance", ["validate", "test", "predict"])
def test_the_last_of_no_checkpoints_is_an_error_where_nothing_is_trained(entrance, tiny_model_folder, tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[TrainingCheckpoint(str(tmp_path))]
    )
    data = SFTDataModule(val=ROWS, test=ROWS, predict=ROWS)
    with pytest.raises(ValueError, match=r"ckpt_path is 'last', and there is no checkpoint in '.*': name one"):
        getattr(trainer, entrance)(SFTModule(str(tiny_model_folder())), data, ckpt_path="last")


def test_the_command_line_says_so_too_whatever_makes_the_checkpoints(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    args = ["validate", "--model=SFTModule", f"--model.model={tiny_model_folder()}", "--data=SFTDataModule"]
    args += [f"--data.val={tmp_path / 'rows.jsonl'}", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as left:
        main([*args, "--trainer.accelerator=cpu", "--trainer.logger=false"])
    assert left.value.code == 1
    assert "ckpt_path is 'last', and validate finds no checkpoint" in capsys.readouterr().err


def test_a_pipeline_that_is_terminated_says_so_by_its_exit_status(tmp_path):
    config = tmp_path / "pipeline.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "title": "one stage",
                "run_dir": str(tmp_path / "run"),
                "stages": {
                    "sft": {
                        "kind": "fit",
                        "config": ["configs/sft/tiny.yaml"],
                        "trainer": {"callbacks": [{"class_path": f"{__name__}.Terminates"}]},
                    }
                },
            }
        )
    )
    with pytest.raises(SystemExit) as left:
        main(["pipeline", "--config", str(config)])
    assert left.value.code == 128 + signal.SIGTERM


class Terminates(lightning.Callback):
    """Sends SIGTERM in the first batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
