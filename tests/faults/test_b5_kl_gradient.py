"""The gradient of the corrected KL estimate is that of the divergence, whatever ratio the policy's loss takes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses.policy_gradient import LOSS_TYPES
from rlhf_lightning.modules import GRPOModule

LENGTH, VOCAB = 3, 3
EVERY = torch.tensor(list(product(range(VOCAB), repeat=LENGTH)))  # all 27 sequences

LEVELS = (None, "token", "sequence", "sequence_token")
LOSSES = [pair for pair in product(LOSS_TYPES, LEVELS) if pair != ("gspo", "token")]  # that would be grpo


def expected_value(estimator: str, policy: Tensor, reference: Tensor) -> Tensor:
    """The sum over positions of the estimate's expectation under the policy, from the definition."""
    p, ratio = policy.exp(), policy - reference
    value = {"k1": ratio, "k2": ratio.square() / 2, "k3": (-ratio).exp() - 1 + ratio}[estimator]
    return (p * value).sum()


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_the_mean_gradient_over_all_sequences_is_the_divergences(
    loss_type: str, estimator: str, level: str | None, moved: bool
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(LENGTH, VOCAB, dtype=torch.float64).requires_grad_()
    reference = torch.randn(LENGTH, VOCAB, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    drift = 0.3 * torch.randn(LENGTH, VOCAB, dtype=torch.float64) if moved else 0.0
    old = (logits.detach() + drift).log_softmax(-1)
    (expected,) = torch.autograd.grad(expected_value(estimator, policy, reference), logits, retain_graph=True)

    def of_tokens(table: Tensor) -> Tensor:
        return table[torch.arange(LENGTH), EVERY].flatten()

    module = GRPOModule(
        "no model",
        rewards=["builtins.len"],
        beta=1.0,
        loss={"loss_type": loss_type, "importance_sampling_level": level},  # type: ignore[arg-type]
        kl={"estimator": estimator},  # type: ignore[arg-type]
    )
    sequence_index = torch.arange(len(EVERY)).repeat_interleave(LENGTH)
    loss, _ = module.token_losses(
        of_tokens(policy),
        {
            "advantages": torch.zeros(len(EVERY) * LENGTH, dtype=torch.float64),
            "old_logprobs": of_tokens(old),
            "ref_logprobs": of_tokens(reference),
        },
        sequence_index_N=sequence_index,
        num_sequences=len(EVERY),
    )
    chance = of_tokens(old).view(-1, LENGTH).sum(dim=1).exp()
    (found,) = torch.autograd.grad((loss * chance[sequence_index]).sum(), logits)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
