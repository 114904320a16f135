"""The load-balancing loss of a policy's routers, over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed.collectives import sum_vector_over_ranks
from ..losses.router import RouterSums, load_balancing_loss
from ..models import base_model
from ..models.config_losses import OF_BALANCE, router_losses
from ..models.routers import RouterRecorder, Routers, find_routers, recording

AUX_LOSS = "aux_loss"  # its name in the normalizers of a global batch and in the log


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model, with its coefficient; ``losses.router`` has the formula.

    Args:
        model: the model.
        routers: its routers.
        coef: factor of the loss, above 0.
    """

    model: nn.Module
    routers: Routers
    coef: float

    def recording(self) -> AbstractContextManager[RouterRecorder]:
        """Records the routers' outputs of the passes in the context."""
        return recording(self.model, self.routers)

    def summed(self, parts: Sequence[RouterSums], device: torch.device) -> RouterSums:
        """Sums the recorded statistics of all micro-batches of all ranks; every rank calls it, with any number."""
        count = self.routers.num_experts
        # One vector, so that all ranks take part in one collective however many micro-batches each has.
        vector = torch.zeros(1 + 2 * count, dtype=torch.float64, device=device)
        for part in parts:
            vector += torch.cat([part.weight[None], part.choices_E, part.probs_E.detach().double()])
        weight, choices_E, probs_E = sum_vector_over_ranks(vector).split([1, count, count])
        return RouterSums(weight[0], choices_E, probs_E)

    def share(self, part: RouterSums, whole: RouterSums) -> Tensor:
        """Computes the share of a part of the global batch in its loss: ``()``."""
        return self.coef * load_balancing_loss(part, whole)


def router_loss_of(model: nn.Module, coef: float | None) -> RouterLoss | None:
    """Returns the load-balancing loss that a model is trained with.

    Args:
        model: a causal language model, or one wrapped by PEFT.
        coef: the coefficient, at least 0; ``None`` for that of the model's config, if it requests the loss.

    Returns:
        ``None`` if the coefficient is 0, or if only the config requests a loss that is not supported.

    Raises:
        ValueError: a coefficient above 0 was given, and the loss of this model is not supported.
    """
    config = base_model(model).config
    asked = {name: value for name, value in router_losses(config).items() if name in OF_BALANCE}
    value = next(iter(asked.values()), 0.0) if coef is None else coef
    if value == 0:
        return None
    routers = find_routers(model)
    if routers is not None:
        return RouterLoss(model, routers, value)
    if coef is None:  # report_config_losses warns
        return None
    raise ValueError(
        f"router_aux_loss_coef is {coef:g}, but {config.model_type} has no routers whose load-balancing loss "
        "transformers computes from recorded logits: remove it, or use a mixture of experts such as qwen3_moe"
    )
