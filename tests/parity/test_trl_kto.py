"""The unpaired losses against TRL's, value and gradient."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the parity tests need the `parity` extra: pip install rlhf-lightning[parity]")

from trl import KTOTrainer

from rlhf_lightning.losses.kto import kto_kl, kto_loss

from .trl_stub import Model, head_outputs, trainer

OPTIONS = {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.7}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[True, False, True, True, False], [True] * 5, [False] * 5])
@pytest.mark.parametrize("kl_shift", [2.0, -2.0])
def test_value_and_gradient(loss_type: str, labels: list[bool], kl_shift: float) -> None:
    generator = torch.Generator().manual_seed(11)
    drawn = -torch.randn(4, 5, 7, generator=generator, dtype=torch.float64).abs()
    logprobs, reference, kl_logprobs, kl_reference = drawn.unbind()
    # The estimate of the KL is clamped at 0: once on either side.
    kl_logprobs = kl_logprobs + kl_shift
    logprobs = logprobs.clone().requires_grad_()
    label = torch.tensor(labels)
    ones = torch.ones(5, 8, dtype=torch.long)
    fake = trainer(
        ref_model=Model(*[head_outputs(values) for values in (kl_reference, reference)][loss_type != "kto" :]),
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=False,
        loss_type=loss_type,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        **OPTIONS,
    )
    fake._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, fake)
    policy = Model(*[head_outputs(values) for values in (kl_logprobs, logprobs)][loss_type != "kto" :])
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = {"label": label} | {f"{prefix}{name}": ones for name in names for prefix in ("", "KL_")}
    theirs = KTOTrainer._compute_loss(fake, policy, inputs, return_outputs=False)

    kl = kto_kl(kl_logprobs.sum(-1), kl_reference.sum(-1))
    assert (kl > 0) == (kl_shift > 0)
    losses = kto_loss(logprobs.sum(-1), reference.sum(-1), label_B=label, kl=kl, loss_type=loss_type, **OPTIONS)
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (losses.mean(), theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert gradients[0].norm() > 0
