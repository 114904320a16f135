"""Interrupted at any batch boundary and resumed, a run ends bit for bit where it would have ended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger

from rlhf_lightning import (
    ContextCompressionModule,
    DPOModule,
    GRPOModule,
    KTOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    SFTModule,
    SimPOModule,
)
from rlhf_lightning.callbacks import ReferenceSync, TrainingCheckpoint
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules import (
    ContextDataModule,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    UnpairedDataModule,
)

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]

LORA = {"r": 4, "lora_dropout": 0.3}
DEMONSTRATIONS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(11)]
PAIRS = [{"prompt": f"{n}+{n}=?", "chosen": f"#{2 * n}", "rejected": f"#{2 * n + 1} no"} for n in range(11)]
LABELLED = [{"prompt": f"{n}+1=?", "completion": f"#{n + n % 2}", "label": n % 2 == 1} for n in range(12)]
STEPS = [{"prompt": f"{n}?", "completions": ["a=1\n", f"b={n}\n"], "labels": [True, n % 2 == 0]} for n in range(11)]
CONTEXTS = [{"context": f"{n}7{n}1 {n}3" * (1 + n % 3), "prompt": "?", "completion": f"#{n}"} for n in range(11)]
PROMPTS = [{"prompt": f"{n}+{n}="} for n in range(5)]


def digits(completion_ids: list[list[int]]) -> list[float]:
    """A reward that differs between samples."""
    return [sum(tokens) % 7 / 7 for tokens in completion_ids]


class Metrics(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Noise(lightning.Callback):
    """Draws random numbers wherever Lightning lets it, as other people's callbacks and loaders do."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.draw()

    def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
        self.draw()

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.draw()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.log("drawn", self.draw())

    def draw(self) -> float:
        return float(torch.rand(())) + random.random() + float(np.random.rand())


class DrawingLoader:
    """A loader that draws from the global random state whenever it is begun, as torch's own do."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.state_dict, self.load_state_dict = loader, loader.state_dict, loader.load_state_dict

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        torch.rand(3)
        yield from self.loader


class DrawingData(SFTDataModule):
    """Rows from such a loader."""

    def train_dataloader(self) -> Any:
        return DrawingLoader(super().train_dataloader())


@dataclass
class Run:
    """A kind of run: everything that is the same in the whole run and in a resumed one."""

    module: Callable[[str], PostTrainingModule]
    data: Callable[[], lightning.LightningDataModule]
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[lightning.Callback]] = list
    steps: int = 9


def pairs(**options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(train=PAIRS, val=PAIRS[:3], global_batch_size=3, **options)


def prompts() -> PromptDataModule:
    return PromptDataModule(train=PROMPTS, val=PROMPTS[:2], global_batch_size=2)


ON_POLICY = {"rewards": [digits], "num_generations": 2, "max_completion_length": 4, "num_updates": 2}
RUNS: dict[str, Run] = {
    "sft": Run(
        lambda model: SFTModule(model, lora=LORA),
        lambda: SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3),
        {"val_check_interval": 2},
    ),
    "sft-streamed": Run(
        lambda model: SFTModule(model, lora=LORA),
        lambda: SFTDataModule(train=DEMONSTRATIONS, streaming=True, shuffle_buffer=4, global_batch_size=3),
    ),
    "sft-foreign": Run(  # a loader that draws when it is begun
        lambda model: SFTModule(model, lora=LORA),
        lambda: DrawingData(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3),
    ),
    "dpo": Run(lambda model: DPOModule(model, lora=LORA), pairs),
    "dpo-full": Run(lambda model: DPOModule(model), pairs),
    "dpo-coupled": Run(lambda model: DPOModule(model, lora=LORA, loss_type="aot", micro_batch_tokens=30), pairs),
    "dpo-precomputed": Run(lambda model: DPOModule(model, lora=LORA, reference="precomputed"), pairs),
    "dpo-moving": Run(
        lambda model: DPOModule(model, lora=LORA, reference="frozen"),
        pairs,
        callbacks=lambda: [ReferenceSync(alpha=0.5, every_n_steps=2)],
    ),
    "simpo": Run(lambda model: SimPOModule(model, lora=LORA), pairs),
    "reward": Run(lambda model: RewardModule(model, lora=LORA, num_models=2), pairs),
    "process": Run(
        lambda model: ProcessRewardModule(model, lora=LORA),
        lambda: StepwiseDataModule(train=STEPS, val=STEPS[:3], global_batch_size=3),
    ),
    "kto": Run(
        lambda model: KTOModule(model, lora=LORA),
        lambda: UnpairedDataModule(train=LABELLED, val=LABELLED[:4], global_batch_size=4, shuffle=False),
    ),
    "kto-running": Run(  # no row has a partner: the estimate is the running one
        lambda model: KTOModule(model, lora=LORA, undesirable_weight=0.0),
        lambda: UnpairedDataModule(train=LABELLED[1::2], global_batch_size=1),
        steps=8,
    ),
    "compression": Run(
        lambda model: ContextCompressionModule(
            model, ratio=2, segment_length=6, encoder_rank=2, kl_coef=0.5, train_decoder=True, dropout=0.1
        ),
        lambda: ContextDataModule(train=CONTEXTS, val=CONTEXTS[:3], global_batch_size=3),
        {"val_check_interval": 2},
    ),
    "grpo": Run(lambda model: GRPOModule(model, lora=LORA, beta=0.1, **ON_POLICY), prompts, steps=10),
    "ppo": Run(lambda model: PPOModule(model, lora=LORA, kl_coef=0.1, **ON_POLICY), prompts, steps=10),
}


def fit(run: Run, model: Path, folder: Path, *, resume: str | Path | None = None) -> Metrics:
    """Runs, with checkpoints after every batch; other seeds and other draws must not matter when it is resumed."""
    lightning.seed_everything(1 if resume is None else 2, verbose=False)
    metrics = Metrics()
    options = {"num_sanity_val_steps": 2, "log_every_n_steps": 1, "max_epochs": -1, "max_steps": run.steps}
    saver = TrainingCheckpoint(str(folder), every_n_steps=1, keep=99)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=metrics,
        callbacks=[saver, *run.callbacks(), Noise()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(options | run.trainer),
    )
    module = run.module(str(model))
    module._optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    module._lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    trainer.fit(module, datamodule=run.data(), ckpt_path=resume)
    return metrics


def final(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of the last step."""
    path = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return path, torch.load(path, weights_only=True)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal to the bit, everywhere in two nested structures."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for n, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}/{n}")
    else:
        assert left == right or (left != left and right != right), where


def ignore_totals(checkpoint: dict[str, Any]) -> None:
    """Takes out what Lightning counts otherwise in a resumed run, and nothing depends on; and the names of files."""
    del checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]
    for key in [key for key in checkpoint["callbacks"] if key.startswith("TrainingCheckpoint")]:
        del checkpoint["callbacks"][key]


def assert_resumes(run: Run, model: Path, tmp_path: Path, at: Callable[[list[int]], list[int]]) -> dict[str, Any]:
    """Resumes from some of the checkpoints; returns the last one of the whole run."""
    logged = fit(run, model, tmp_path / "whole")
    last, expected = final(tmp_path / "whole")
    steps = sorted(int(path.stem.partition("=")[2]) for path in (tmp_path / "whole").glob("*.ckpt"))
    assert len(steps) >= 4
    ignore_totals(expected)
    for step in at(steps):
        folder = tmp_path / f"from {step}"
        again = fit(run, model, folder, resume=tmp_path / "whole" / f"step={step}.ckpt")
        path, found = final(folder)
        ignore_totals(found)
        assert path.name == last.name
        assert_same(found, expected, f"resumed after step {step}: ")
        assert again.rows, "nothing was logged"
        assert_same(again.rows, logged.rows[-len(again.rows) :], f"logged, resumed after step {step}: ")
    return expected


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "at",
    [
        pytest.param(lambda steps: [steps[len(steps) // 2]], id="in the middle"),
        pytest.param(lambda steps: [steps[0], steps[-2]], id="next to the ends", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(name, at, tiny_model_folder, tmp_path):
    checkpoint = assert_resumes(RUNS[name], tiny_model_folder(), tmp_path, at)
    drawn = checkpoint["post_training"]["random"][0]
    assert set(drawn) == {"torch", "cuda", "numpy", "python"}


@pytest.mark.slow
def test_a_resumed_run_with_compiled_layers(tiny_model_folder, tmp_path):
    """By torch's own compiler, whose rounding differs from that of plain layers: no pass is plain in one run alone."""

    interval = {"val_check_interval": 2}
    run = Run(lambda model: SFTModule(model, lora=LORA, compile=True), RUNS["sft"].data, interval, steps=6)
    assert_resumes(run, tiny_model_folder(), tmp_path, lambda steps: [steps[0], steps[2]])


@pytest.mark.parametrize("interval", [1.0, 2], ids=["at the ends of epochs", "in the middle"])
def test_early_stopping_counts_on_and_stays_stopped(tiny_model_folder, tmp_path, interval):
    stopped: list[int] = []

    def callbacks() -> list[lightning.Callback]:
        class Seen(EarlyStopping):
            def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
                stopped.append(trainer.global_step)

        return [Seen("val/loss", mode="max", patience=2)]  # the loss falls: the third validation is the last

    run = Run(
        lambda model: SFTModule(model, lora=LORA),
        lambda: SFTDataModule(train=DEMONSTRATIONS, val=DEMONSTRATIONS[:3], global_batch_size=3),
        {"val_check_interval": interval, "num_sanity_val_steps": 0},
        callbacks,
        steps=40,
    )
    expected = {1.0: 12, 2: 6}[interval]
    at = [2, 3, 4, 5] + [8, 11] * (interval == 1.0)
    assert_resumes(run, tiny_model_folder(), tmp_path, lambda steps: at)
    assert set(stopped) == {expected}
    steps = [int(path.stem.partition("=")[2]) for path in (tmp_path / "whole").glob("*.ckpt")]
    assert max(steps) == expected
    fit(run, tiny_model_folder(), tmp_path / "again", resume=tmp_path / "whole" / f"step={expected}.ckpt")
    assert stopped[-1] == expected
