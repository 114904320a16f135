"""The supervised losses against TRL's, value and gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the parity tests need the `parity` extra: pip install rlhf-lightning[parity]")

from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTTrainer

from rlhf_lightning.losses.sft import sft_loss

from .trl_stub import Model, head_outputs, trainer


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(11, (3, 6), generator=generator)
    labels[:, :2], labels[1, 4:] = -100, -100
    return logits, labels


def trl_loss(logits: Tensor, labels: Tensor, loss_type: str, label_smoothing: float) -> Tensor:
    targets = labels[:, 1:]
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    fused = head_outputs(torch.where(targets == -100, 0, logprobs))
    fused.label_mask = targets != -100
    answers = [fused] if label_smoothing == 0 else [{"logits": logits}, fused]
    fake = trainer(
        compute_loss_func=None,
        label_smoother=LabelSmoother(label_smoothing) if label_smoothing else None,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
    )
    inputs = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    return SFTTrainer.compute_loss(fake, Model(*answers), inputs)


@pytest.mark.parametrize(("loss_type", "label_smoothing"), [("nll", 0.0), ("nll", 0.1), ("dft", 0.0)])
def test_value_and_gradient(loss_type: str, label_smoothing: float) -> None:
    logits, labels = draw()
    counted = labels[:, 1:] != -100
    logprobs_NV = logits[:, :-1][counted].log_softmax(-1)
    ours = sft_loss(
        logprobs_NV.gather(-1, labels[:, 1:][counted][:, None])[:, 0],
        mean_logprobs_N=logprobs_NV.mean(-1),
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    )
    ours = ours.sum() / counted.sum()
    theirs = trl_loss(logits, labels, loss_type, label_smoothing)
    # The label smoother of transformers adds up the vocabulary in fp32.
    rtol = 1e-7 if label_smoothing else 1e-10
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-14)
