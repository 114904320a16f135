"""Throughput and model-flops utilisation of training: printed, and consistent with each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import Throughput
from rlhf_lightning.callbacks.throughput import flops_per_token, peak_flops_of
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches
from .steps import device_trainer

LARGE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}


def batches(count: int, rows: int, length: int, vocab: int) -> Batches:
    rng = np.random.default_rng(0)

    def row(number: int) -> Example:
        tokens = rng.integers(3, vocab, size=length)
        completion = Segment(tokens[length // 2 :], np.ones(length - length // 2))
        return Example(f"rows:{number}", Segment(tokens[: length // 2], children=(completion,)))

    return Batches(*(ExampleBatch([row(rows * n + k) for k in range(rows)]) for n in range(count)))


def test_tokens_per_second_and_utilisation(device: torch.device, tmp_path: Path) -> None:
    on_gpu = device.type == "cuda"
    folder = save_tiny_model(tmp_path, "llama", **(LARGE if on_gpu else {}))
    length, rows, precision = (1024, 16, "bf16-mixed") if on_gpu else (40, 4, "32-true")
    peak = peak_flops_of(torch.cuda.get_device_name(device), precision) if on_gpu else 1e12
    options: dict[str, Any] = {"micro_batch_tokens": 16384, "optimizer": partial(torch.optim.AdamW, lr=1e-4)}
    module = SFTModule(str(folder), **options)
    # The first batches pay for compiling and warming up; what is logged last is of the last five alone.
    callback = Throughput(None if on_gpu else peak, every_n_batches=5)
    run = device_trainer(device, precision, max_epochs=1, callbacks=[callback])
    run.fit(module, batches(10, rows, length, LARGE["vocab_size"] if on_gpu else 60))  # type: ignore[arg-type]
    seen = {name: float(value) for name, value in run.callback_metrics.items()}
    speed = seen["throughput/tokens_per_second"]
    assert speed == pytest.approx(rows * length / seen["time/batch"], rel=1e-4)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(f"\n{name}: {speed:,.0f} tokens/s, peak {seen['memory/peak_gib']:.1f} GiB", end="")
    if peak is None:
        print(", utilisation unknown: its peak is in no table")
        return
    print(f", model-flops utilisation {seen['throughput/mfu']:.1%} of {peak / 1e12:,.0f} TFLOP/s")
    assert seen["throughput/mfu"] == pytest.approx(speed * flops_per_token(module.model, length) / peak, rel=1e-4)
    assert 0 < seen["throughput/mfu"] < 1
