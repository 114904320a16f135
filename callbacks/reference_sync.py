"""Moves the reference policy towards the policy during training."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from ..core import PostTrainingModule
from ..models import AdapterReference, FrozenReference
from ..models.reference import ADAPTER_COPY


class ReferenceSync(lightning.Callback):
    r"""Moves the reference policy towards the policy at regular intervals.

    Paper: Learn Your Reference Model for Real Good Alignment (Gorbatovski et al., 2024, arXiv:2404.09656):

    .. math:: \pi_{ref} \leftarrow \alpha\, \pi + (1 - \alpha)\, \pi_{ref}

    in the space of weights, every ``every_n_steps`` optimizer steps. With alpha 1 it is the paper's hard update, below
    1 its soft one. For every method with a reference in memory: DPO, KTO, GRPO and PPO. Checkpoints hold the moved
    reference, since it can no longer be rebuilt from the model's folder.

    Args:
        alpha: in (0, 1]; the paper uses 0.6 with 64 steps, and 1 with 512.
        every_n_steps: at least 1.

    Raises:
        ValueError: a number out of range; in training, a module whose reference cannot move.

    Example::

        lightning.Trainer(callbacks=[ReferenceSync(alpha=0.6, every_n_steps=64)]).fit(module, data)
    """

    def __init__(self, alpha: float = 0.6, every_n_steps: int = 64) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be in (0, 1] (1 replaces the reference by the policy)")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        self.alpha = alpha
        self.every_n_steps = every_n_steps
        self.num_syncs = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks that there is a reference that can move, and makes checkpoints hold it."""
        reference = _reference(pl_module)
        reference.rebuildable = False
        if isinstance(reference, FrozenReference):
            reference.moves = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the reference once for every multiple of ``every_n_steps`` that the last batch has passed."""
        # A batch may make several steps and pass several multiples.
        while self.num_syncs < trainer.global_step // self.every_n_steps:
            self.num_syncs += 1
            self.sync(pl_module)

    @torch.no_grad()
    def sync(self, pl_module: lightning.LightningModule) -> None:
        """Moves the reference once."""
        # reference <- (1 - alpha) reference + alpha policy
        for moved, policy in _pairs(_reference(pl_module), pl_module):
            moved.lerp_(policy.detach().to(moved), self.alpha)

    def state_dict(self) -> dict[str, int]:
        """Returns how often the reference has moved."""
        return {"num_syncs": self.num_syncs}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the state of an earlier run."""
        self.num_syncs = state_dict["num_syncs"]


def _reference(module: lightning.LightningModule) -> FrozenReference | AdapterReference:
    name = type(module).__name__
    if not isinstance(module, PostTrainingModule) or module.reference is None:
        raise ValueError(f"{name} has no reference policy, so ReferenceSync has nothing to move: remove it")
    for reference in module.references:
        if isinstance(reference, AdapterReference) and ADAPTER_COPY in reference.model.peft_config:
            return reference
        if isinstance(reference, FrozenReference):
            return reference
        raise ValueError(
            f"the reference of {name} is its model with the adapter off, which cannot move: use reference='frozen'"
        )
    raise ValueError(
        f"{name} has no reference in memory that could move: use reference='frozen', and with GRPO and PPO a weight "
        "above 0 for the divergence from it"
    )


def _pairs(
    reference: FrozenReference | AdapterReference, module: lightning.LightningModule
) -> list[tuple[Tensor, Tensor]]:
    """Pairs each weight of the reference with that of the policy."""
    policy: Any = module.model
    if isinstance(reference, FrozenReference):
        return _same_names(dict(reference.model.named_parameters()), dict(policy.named_parameters()))

    # An adapter's copy, and the weights outside of the adapter that the reference keeps.
    weights = dict(policy.named_parameters())
    copies = {name: weight for name, weight in weights.items() if f".{ADAPTER_COPY}." in name}
    active = policy.active_adapter
    moved = [(weight, weights[name.replace(f".{ADAPTER_COPY}.", f".{active}.")]) for name, weight in copies.items()]
    return moved + [(weight, weights[name]) for name, weight in reference.kept.items()]


def _same_names(moved: dict[str, nn.Parameter], policy: dict[str, nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    return [(moved[name], policy[name]) for name in moved]
