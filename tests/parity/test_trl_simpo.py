"""The reference-free family against TRL's CPO and ORPO trainers, from logits to the total loss."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the parity tests need the `parity` extra: pip install rlhf-lightning[parity]")

from rlhf_lightning.losses.simpo import NLL_WEIGHTS, simpo_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL announces that these trainers are experimental
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

from .trl_stub import Model, trainer

PROMPT, CHOSEN, REJECTED = 2, (3, 5, 1), (4, 2, 6)
BETA, GAMMA = 0.4, 0.6


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (6, 8, 11) of three chosen and three rejected completions, and their labels."""
    generator = torch.Generator().manual_seed(2)
    width = PROMPT + max(*CHOSEN, *REJECTED)
    logits = torch.randn(6, width, 11, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(11, (6, width), generator=generator)
    for row, length in enumerate((*CHOSEN, *REJECTED)):
        labels[row, :PROMPT], labels[row, PROMPT + length :] = -100, -100
    return logits, labels


def trl_loss(cls: type, logits: Tensor, labels: Tensor, **attributes: object) -> Tensor:
    # ORPO takes its likelihood over whatever is attended to, the prompt with it: here only the completion is.
    inputs = {"concatenated_input_ids": labels, "concatenated_labels": labels}
    inputs["concatenated_attention_mask"] = (labels != -100).long()
    fake = trainer(
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=lambda *_, **__: inputs,
        get_batch_logps=cls.get_batch_logps,
        beta=BETA,
        **attributes,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(fake, name, partial(getattr(cls, name), fake))
    batch = {"chosen_labels": labels[:3]}
    return cls.get_batch_loss_metrics(fake, Model(SimpleNamespace(logits=logits)), batch)[0]


def our_loss(logits: Tensor, labels: Tensor, loss_type: str, **options: float) -> Tensor:
    targets = labels[:, 1:]
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = torch.where(targets == -100, 0, logprobs).sum(-1).chunk(2)
    lengths = {"chosen_lengths": torch.tensor(CHOSEN), "rejected_lengths": torch.tensor(REJECTED)}
    preference, nll = simpo_loss(chosen, rejected, loss_type=loss_type, beta=BETA, gamma=GAMMA, **lengths, **options)
    return preference.sum() / 3 + NLL_WEIGHTS[loss_type] * nll.sum() / sum(CHOSEN)


def assert_same(ours: Tensor, theirs: Tensor, logits: Tensor, rtol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    mine, other = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert (mine - other).norm() <= rtol * other.norm()
    assert other.norm() > 0


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "alpha", "theirs"),
    [
        ("simpo", 0.0, 0.25, {"loss_type": "simpo", "alpha": 0.0, "cpo_alpha": 0.0}),
        ("simpo", 0.1, 0.25, {"loss_type": "simpo", "alpha": 0.0, "cpo_alpha": 0.0}),
        ("alphapo", 0.1, 0.25, {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.0}),
        ("alphapo", 0.0, -0.5, {"loss_type": "simpo", "alpha": -0.5, "cpo_alpha": 0.0}),
        ("cpo", 0.0, 0.25, {"loss_type": "sigmoid", "alpha": 0.0, "cpo_alpha": 1.0}),
        ("cpo", 0.2, 0.25, {"loss_type": "sigmoid", "alpha": 0.0, "cpo_alpha": 1.0}),
        ("cpo_hinge", 0.0, 0.25, {"loss_type": "hinge", "alpha": 0.0, "cpo_alpha": 1.0}),
        ("cpo_ipo", 0.0, 0.25, {"loss_type": "ipo", "alpha": 0.0, "cpo_alpha": 1.0}),
    ],
)
def test_simpo_and_cpo(loss_type: str, label_smoothing: float, alpha: float, theirs: dict[str, object]) -> None:
    logits, labels = draw(torch.float64)
    reference = trl_loss(
        CPOTrainer, logits, labels.clone(), simpo_gamma=GAMMA, label_smoothing=label_smoothing, **theirs
    )
    ours = our_loss(logits, labels, loss_type, label_smoothing=label_smoothing, alpha=alpha)
    assert_same(ours, reference, logits, rtol=1e-10)


def test_orpo() -> None:
    # TRL computes the odds in fp32 whatever comes in.
    logits, labels = draw(torch.float32)
    assert_same(our_loss(logits, labels, "orpo"), trl_loss(ORPOTrainer, logits, labels), logits, rtol=1e-5)
