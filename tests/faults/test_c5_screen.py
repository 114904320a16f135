"""Scripts are as quiet as the command line; a bar takes one line; what takes long shows how far it has come."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from rlhf_lightning import DPOModule
from rlhf_lightning.core.progress_bar import OneLineProgressBar
from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.utils import progress as progress_file
from rlhf_lightning.utils.progress import progress

Folder = Callable[[str], Path]
PAIRS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(4)]


def test_a_script_gets_no_useless_advice(tiny_model_folder: Folder) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, enable_model_summary=False,
            log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(DPOModule(str(tiny_model_folder("llama"))), PreferenceDataModule(train=PAIRS, global_batch_size=4))
    said = [str(warning.message) for warning in found]
    assert not [
        text for text in said if "LeafSpec" in text or "Total length of `list`" in text or "val_dataloader" in text
    ]


@pytest.mark.parametrize("width", [80, 200])
def test_a_bar_takes_one_line(width: int, tiny_model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    bar = RichProgressBar()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=4, max_epochs=-1, callbacks=[bar],
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    data = PreferenceDataModule(train=PAIRS, val=PAIRS[:2], global_batch_size=2)
    trainer.fit(DPOModule(str(tiny_model_folder("llama"))), data)
    assert type(bar) is OneLineProgressBar
    shown = screen.getvalue().replace("\r", "\n").splitlines()
    lines = [line for line in shown if "Epoch" in line]
    assert lines
    assert not [line for line in lines if "/-2" in line]
    assert [line for line in lines if "loss: 0.69" in line]
    # A bar that needs more lines moves the cursor up as often before it is drawn again.
    assert "\x1b[1A" not in "".join(part for part in screen.getvalue().split("Validation")[0:1])
    if width == 200:
        assert [line for line in lines if "margins:" in line]


def test_progress_without_a_terminal_is_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: float(next(times))))
    said: list[str] = []
    monkeypatch.setattr(progress_file, "rank_zero_info", said.append)
    assert list(progress(range(7), "counting")) == list(range(7))
    assert said == [
        "counting: 3 of 7 (43%) in 30 s, about 40 s left",
        "counting: 6 of 7 (86%) in 60 s, about 10 s left",
    ]
    assert list(progress(iter("ab"), "reading")) == ["a", "b"]


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress_file, "Console", lambda **options: Console(file=screen, width=80, force_terminal=True))
    assert list(progress(range(3), "counting [x]")) == [0, 1, 2]
    assert "counting [x]" in screen.getvalue()
    assert "3/3" in screen.getvalue()
