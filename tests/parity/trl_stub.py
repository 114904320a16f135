"""Calls the losses of the installed TRL without a model: they are methods of its trainers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Accelerator:
    """One process on a CPU: everything gathered is what was given."""

    device = torch.device("cpu")
    num_processes = 1
    parallelism_config = None

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


class Model(nn.Module):
    """Answers its calls with the given outputs, one after the other and then the last again."""

    is_gradient_checkpointing = False  # the trainers ask before they call a reference

    def __init__(self, *answers: SimpleNamespace) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def head_outputs(log_probs: Tensor, log_sum_sq_probs: Tensor | None = None) -> SimpleNamespace:
    """What TRL's fused head returns; only the log-probs reach a loss."""
    nothing = torch.zeros_like(log_probs.detach())
    return SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=log_sum_sq_probs,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
        label_mask=log_probs != 0,
    )


def trainer(**attributes: Any) -> SimpleNamespace:
    """A stand-in for a TRL trainer, with what all of them read."""
    defaults: dict[str, Any] = {
        "accelerator": Accelerator(),
        "model": Model(SimpleNamespace()),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(defaults | attributes))
