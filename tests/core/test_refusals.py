"""Regressions of fixed bugs: refusals in one line, and steps that nothing may spoil."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.core.module import PostTrainingModule
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer

PAIRS = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1} or so"} for n in range(1, 9)]
ROWS = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n} is it"} for n in range(1, 9)]
SGD = partial(torch.optim.SGD, lr=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def weights(module: PostTrainingModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


# Gradients.


@pytest.mark.parametrize("limit", [0.25, None])
def test_scaled_gradients_are_clipped_at_their_own_size(limit: float | None, folder: str) -> None:
    """With 16-mixed the loss, and so the gradient that is clipped, is multiplied by thousands."""
    found = {}
    for kind in ("scaled", "plain"):
        scaler = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))
        precision: dict[str, Any] = {"plugins": [scaler]} if kind == "scaled" else {"precision": "32-true"}
        run = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **precision,
        )
        module = SFTModule(folder, optimizer=SGD, max_grad_norm=limit)
        module.configure_model()
        before = weights(module)
        run.fit(module, SFTDataModule(train=ROWS, global_batch_size=4, shuffle=False))
        update = sum(float((p - before[name]).square().sum()) for name, p in weights(module).items()) ** 0.5
        found[kind] = (update, float(run.callback_metrics["train/grad_norm"]))
    assert found["scaled"][1] == pytest.approx(found["plain"][1], rel=0.02)
    assert found["scaled"][0] == pytest.approx(found["plain"][0], rel=0.02)
    assert found["scaled"][0] == pytest.approx(found["plain"][1] if limit is None else limit, rel=0.02)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=1e-2)])
def test_a_batch_that_lost_all_its_rows_changes_nothing(place: int, optimizer: Any, folder: str) -> None:
    long = {"prompt": "1+1=", "completion": "2" * 40}
    found = []
    for rows in (ROWS[:2], [*ROWS[:place], long, *ROWS[place:2]]):
        module = SFTModule(folder, optimizer=optimizer)
        data = SFTDataModule(train=rows, global_batch_size=1, max_length=20, streaming=True, shuffle=False)
        run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0)
        run.fit(module, data)
        found.append(weights(module))
        assert torch.isfinite(run.callback_metrics["train/loss"])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# Refusals.


def fit(module: PostTrainingModule, data: Any, folder: Path, *, resume: str | None = None, epochs: int = 1) -> str:
    """Trains and returns the last checkpoint."""
    saver = ModelCheckpoint(dirpath=folder, filename="last", save_top_k=-1)
    run = trainer("32-true", max_epochs=epochs, enable_checkpointing=True, callbacks=[saver], num_sanity_val_steps=0)
    run.fit(module, data, ckpt_path=resume, weights_only=False)
    return str(folder / "last.ckpt")


def pairs() -> PreferenceDataModule:
    return PreferenceDataModule(train=PAIRS, global_batch_size=4)


def test_a_reference_that_cannot_be_precomputed_any_more_is_refused(folder: str, tmp_path: Path) -> None:
    checkpoint = fit(DPOModule(folder, optimizer=SGD), pairs(), tmp_path / "frozen")
    later = DPOModule(folder, optimizer=SGD, reference="precomputed")
    with pytest.raises(ValueError, match="the checkpoint holds no precomputed log-probs, and the policy has moved"):
        fit(later, pairs(), tmp_path / "precomputed", resume=checkpoint, epochs=2)


def test_a_schedule_that_waits_for_a_metric_is_refused(folder: str, tmp_path: Path) -> None:
    schedule = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1)
    module = SFTModule(folder, optimizer=SGD, lr_scheduler=schedule)
    with pytest.raises(ValueError, match=r"lr_scheduler is ReduceLROnPlateau.*use rlhf_lightning\.core\.WarmupSched"):
        fit(module, SFTDataModule(train=ROWS, global_batch_size=4), tmp_path)


def test_a_run_that_continues_for_longer_has_a_schedule_of_its_own_length(folder: str, tmp_path: Path) -> None:
    def module() -> SFTModule:
        schedule = partial(WarmupSchedule, decay="linear")
        return SFTModule(folder, optimizer=partial(torch.optim.SGD, lr=0.1), lr_scheduler=schedule)

    data = partial(SFTDataModule, train=ROWS, global_batch_size=4)
    checkpoint = fit(module(), data(), tmp_path / "short")
    saved = torch.load(checkpoint, weights_only=False)["lr_schedulers"][0]
    assert "total_steps" not in saved
    longer = module()
    fit(longer, data(), tmp_path / "long", resume=checkpoint, epochs=4)
    schedule = longer.lr_schedulers()
    assert isinstance(schedule, WarmupSchedule)
    assert (schedule.total_steps, schedule.last_epoch) == (8, 8)
    # After 2 of 8 steps the rate falls from 6 / 8 on: without the longer length it would stay at 0.
    short = module()
    fit(short, data(), tmp_path / "third", resume=checkpoint, epochs=2)
    rate = short.lr_schedulers().optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
    assert rate == pytest.approx(0.0, abs=1e-12)
    assert schedule._factor(2) == 0.75


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_the_fused_head_cannot_read_are_refused(extra: dict[str, Any], folder: str) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "lm_head"], **extra}
    with pytest.raises(ValueError, match="output projection has a DoRA adapter or one with a bias"):
        SFTModule(folder, lora=lora).configure_model()
    # On any other layer they are peft's own business.
    SFTModule(folder, lora={**lora, "target_modules": ["q_proj"]}).configure_model()


@pytest.mark.parametrize("kind", ["pissa", "olora", "loftq", "eva"])
def test_adapters_that_change_their_base_are_refused(kind: str, folder: str) -> None:
    module = SFTModule(folder, lora={"r": 4, "init_lora_weights": kind})
    with pytest.raises(ValueError, match=f"init_lora_weights is '{kind}', which changes the frozen weights.*use true"):
        module.configure_model()


def test_an_adapter_that_does_not_begin_at_zero_is_no_reference(folder: str) -> None:
    lora = {"r": 4, "init_lora_weights": False}
    with pytest.raises(ValueError, match="the adapter does not begin at zero: use reference='frozen'"):
        DPOModule(folder, lora=lora, reference="adapter").configure_model()
    DPOModule(folder, lora=lora, reference="frozen").configure_model()


@pytest.mark.parametrize(("token", "where"), [(-100, 1), (-1, 0), (999, 2)])
def test_tokens_outside_the_vocabulary_are_refused(token: int, where: int, folder: str) -> None:
    tokens = [5, 6, 7]
    tokens[where] = token
    rows = [Example("rows:0", Segment([5, 6], [0, 1])), Example("rows:1", Segment(tokens, [0, 1, 1]))]
    with pytest.raises(ValueError, match=f"row rows:1 has token {token}, the model's vocabulary has .*: the tokenizer"):
        trainer("32-true", max_steps=1, num_sanity_val_steps=0).fit(SFTModule(folder), Batches(ExampleBatch(rows)))
