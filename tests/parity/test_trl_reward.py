"""The pairwise reward loss against TRL's, value and gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the parity tests need the `parity` extra: pip install rlhf-lightning[parity]")

from trl import RewardTrainer

from rlhf_lightning.losses.reward import bradley_terry_loss, centering_penalty

from .trl_stub import Model, trainer


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("coefficient", [None, 0.03])
def test_value_and_gradient(margin: torch.Tensor | None, coefficient: float | None) -> None:
    rewards = torch.randn(8, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    chosen, rejected = rewards[:, 0].chunk(2)
    inputs = {"attention_mask": torch.ones(8, 1)} | ({} if margin is None else {"margin": margin})
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=coefficient))
    theirs = RewardTrainer.compute_loss(fake, Model(SimpleNamespace(logits=rewards)), inputs)

    losses = bradley_terry_loss(chosen, rejected, margin=0.0 if margin is None else margin)
    losses = losses + (coefficient or 0.0) * centering_penalty(chosen, rejected)
    torch.testing.assert_close(losses.sum() / 4, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, rewards, retain_graph=True)[0] for loss in (losses.sum() / 4, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
