"""The precision of a trainer that names none, by its device; and cuDNN's attention, off on CUDA."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_utilities.core import rank_zero

from rlhf_lightning.cli import PostTrainingCLI
from rlhf_lightning.core.device_precision import default_precision
from rlhf_lightning.inference import LocalEngine
from rlhf_lightning.models.own_attention import avoid_cudnn_attention

from ..helpers import tiny_model


@pytest.fixture(params=["Ampere", "Volta", "no GPU"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine's GPU, by the answers of torch to those who look for one."""
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: request.param != "no GPU"))

    def has_bf16(including_emulation: bool = True) -> bool:
        assert request.param != "no GPU", "CUDA was asked although there is no GPU"
        return including_emulation or request.param == "Ampere"

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    return str(request.param)


@pytest.mark.parametrize("accelerator", [None, "auto", "gpu", "cuda", CUDAAccelerator()])
def test_half_precision_where_the_gpu_has_it(card: str, accelerator: Any) -> None:
    expected = "bf16-mixed" if card == "Ampere" else None
    assert default_precision({"accelerator": accelerator, "devices": 2, "strategy": "fsdp2"}) == expected
    assert default_precision({"accelerator": accelerator, "plugins": [], "precision": None}) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"accelerator": "cpu"},
        {"accelerator": CPUAccelerator()},
        {"accelerator": "mps"},
        {"precision": "32-true"},
        {"precision": 16},
        {"plugins": [MixedPrecision("16-mixed", "cuda")]},
        {"plugins": MixedPrecision("16-mixed", "cuda")},
        {"strategy": SingleDeviceStrategy("cpu", precision_plugin=MixedPrecision("bf16-mixed", "cuda"))},
        {"strategy": "ddp_notebook"},
    ],
    ids=lambda given: re.sub(r"<[\w.]*?(\w+) object at \w+>", r"\1", str(given)),  # the same in every process
)
def test_what_is_said_is_kept(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert default_precision(given) is None


@pytest.mark.parametrize("options", [[], ["--trainer.precision=32-true"]], ids=str)
def test_the_command_line(
    card: str, options: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every default.yaml leaves the precision out; what is taken instead is said in one line."""
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(LightningCLI, "_instantiate_trainer", lambda self, config, callbacks: built.append(config))
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda self: self.before_instantiate_classes())
    monkeypatch.setattr(rank_zero.log, "propagate", False)
    monkeypatch.setattr(rank_zero.log, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger=rank_zero.log.name)
    file = Path(__file__).parents[2] / "configs" / "sft" / "default.yaml"
    cli = PostTrainingCLI(["--config", str(file), "--model.model=m", "--data.train=rows.jsonl", *options], run=False)
    cli.config_init = cli.config
    cli.instantiate_trainer(logger=False, callbacks=[])
    chosen = card == "Ampere" and not options
    assert built[0]["precision"] == ("bf16-mixed" if chosen else "32-true" if options else None)
    said = ["trainer.precision is bf16-mixed, which this GPU has; 32-true computes in fp32"]
    assert [message for message in caplog.messages if message.startswith("trainer.")] == said * chosen


def test_cudnn_attention_is_off_on_cuda_alone() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        avoid_cudnn_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        avoid_cudnn_attention(torch.device("cuda", 1))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_an_engine_asks_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("rlhf_lightning.inference.engine.avoid_cudnn_attention", asked.append)
    LocalEngine(tiny_model("llama"), None).generate([[5, 6]])
    assert asked == [torch.device("cpu")]
