"""The DPO family against TRL's, value and gradient; where TRL departs from a paper, the test says how."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the parity tests need the `parity` extra: pip install rlhf-lightning[parity]")

from trl import DPOTrainer

from rlhf_lightning.losses.preference import (
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCE_TYPES,
    LOSS_TYPES,
    LOSSES,
    ld_alpha_logps,
    preference_loss,
    wpo_weights,
)

from .trl_stub import Model, head_outputs, trainer

BETA = 0.2
PROMPT, CHOSEN, REJECTED = 2, (3, 5, 1, 4), (4, 2, 1, 6)
COMBINATIONS = [
    (loss_type, f_divergence_type)
    for loss_type in LOSS_TYPES
    for f_divergence_type in (F_DIVERGENCE_TYPES if loss_type in F_DIVERGENCE_LOSSES else ("reverse_kl",))
]


class Batch:
    """Per-token log-probs of four pairs, padded as TRL pads them and flat as we have them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.tensor([*CHOSEN, *REJECTED])
        width = PROMPT + int(lengths.max())
        position = torch.arange(width)
        self.completion_mask = ((position >= PROMPT) & (position < PROMPT + lengths[:, None])).long()
        counted = self.completion_mask[:, 1:].bool()
        self.index, self.position = counted.nonzero()[:, 0], counted.nonzero()[:, 1] - (PROMPT - 1)
        self.lengths, self.counted = lengths, counted
        shape = (3, *counted.shape)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.logprobs, self.reference, self.log_sum_sq = (torch.where(counted, -row.abs(), 0) for row in drawn)
        self.logprobs.requires_grad_()

    def sums(self, values: Tensor, ld_alpha: float) -> list[Tensor]:
        public = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        flat = values[self.counted]
        return list(
            ld_alpha_logps(flat, self.index, self.position, public_lengths_S=public, ld_alpha=ld_alpha).chunk(2)
        )


def trl_loss(
    batch: Batch,
    loss_types: list[str],
    *,
    weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> tuple[Tensor, Tensor]:
    fake = trainer(
        ref_model=Model(head_outputs(batch.reference)),
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=alpha,
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=BETA,
        label_smoothing=label_smoothing,
        use_weighting=use_weighting,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    )
    inputs = {
        "input_ids": torch.zeros_like(batch.completion_mask),
        "attention_mask": torch.ones_like(batch.completion_mask),
        "completion_mask": batch.completion_mask,
    }
    policy = Model(head_outputs(batch.logprobs, batch.log_sum_sq))
    loss = DPOTrainer._compute_loss(fake, policy, inputs, return_outputs=False)
    # TRL sums whole rows: its head has put zeros where no token counts.
    return loss.detach(), torch.autograd.grad(loss, batch.logprobs)[0] * batch.counted


def our_loss(
    batch: Batch,
    loss_types: list[str],
    *,
    weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> tuple[Tensor, Tensor]:
    keep = 1.0 if ld_alpha is None else ld_alpha
    chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
    total = torch.zeros((), dtype=batch.logprobs.dtype)
    for loss_type, weight in zip(loss_types, weights or [1.0] * len(loss_types), strict=True):
        losses = preference_loss(
            *batch.sums(batch.logprobs, keep),
            *batch.sums(batch.reference, keep),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            loss_type=loss_type,
            beta=BETA,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=alpha,
            sft_logps=batch.sums(batch.logprobs, 1.0)[0],
        )
        if use_weighting:
            flat, log_sum_sq = batch.logprobs[batch.counted], batch.log_sum_sq[batch.counted]
            chosen, rejected = wpo_weights(flat, log_sum_sq, batch.index, num_sequences=8).chunk(2)
            losses = losses * chosen * rejected
        count = len(losses) if LOSSES[loss_type].divided_by == "pairs" else chosen_lengths.sum()
        total = total + weight * losses.sum() / count
    return total.detach(), torch.autograd.grad(total, batch.logprobs)[0]


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    assert (ours[1] - theirs[1]).norm() <= rtol * theirs[1].norm()
    assert theirs[1].norm() > 0


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), [pair for pair in COMBINATIONS if pair[0] != "bco_pair"])
def test_value_and_gradient(loss_type: str, f_divergence_type: str) -> None:
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    options = {"label_smoothing": smoothing, "f_divergence_type": f_divergence_type}
    # TRL's alpha-divergence has no fp64, and EXO's epsilon is an fp32 tensor there.
    single = f_divergence_type == "alpha_divergence"
    batch = Batch(torch.float32 if single else torch.float64)
    ours, theirs = (compute(batch, [loss_type], **options) for compute in (our_loss, trl_loss))
    assert_same(ours, theirs, rtol=1e-5 if single else 1e-7 if loss_type == "exo_pair" else 1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_alpha_divergence_counts_alpha_from_the_other_end(alpha: float) -> None:
    # TRL: f'(u) = (u^(a-1) - 1) / (a - 1). The paper's table: f'(u) = (1 - u^-alpha) / alpha, that is, alpha = 1 - a.
    batch = Batch(torch.float32)
    ours = our_loss(batch, ["sigmoid"], f_divergence_type="alpha_divergence", alpha=alpha)
    theirs = trl_loss(batch, ["sigmoid"], f_divergence_type="alpha_divergence", alpha=1 - alpha)
    assert_same(ours, theirs, rtol=1e-5)


def test_label_smoothing_of_the_sigmoid_is_read_here_and_not_there() -> None:
    batch = Batch()
    plain, smoothed = (trl_loss(batch, ["sigmoid"], label_smoothing=epsilon)[0] for epsilon in (0.0, 0.1))
    assert plain == smoothed
    # cDPO mixes the loss with that of the flipped pair, which TRL can be made to compute by exchanging the two halves.
    flipped = Batch()
    with torch.no_grad():
        flipped.logprobs.copy_(batch.logprobs.roll(4, 0))
    flipped.reference, flipped.counted = batch.reference.roll(4, 0), batch.counted.roll(4, 0)
    flipped.completion_mask = batch.completion_mask.roll(4, 0)
    expected = 0.9 * plain + 0.1 * trl_loss(flipped, ["sigmoid"])[0]
    torch.testing.assert_close(our_loss(batch, ["sigmoid"], label_smoothing=0.1)[0], expected)


def test_bco_agrees_where_the_mean_reward_is_zero() -> None:
    # The paper subtracts the mean reward; TRL has dropped it.
    batch = Batch()
    policy, reference = (torch.stack(batch.sums(values, 1.0)) for values in (batch.logprobs, batch.reference))
    with torch.no_grad():
        batch.reference[:, PROMPT - 1] += (policy - reference).mean()
    assert_same(our_loss(batch, ["bco_pair"]), trl_loss(batch, ["bco_pair"]))


def test_bco_ignores_a_common_shift_of_all_rewards() -> None:
    batch, shifted = Batch(), Batch()
    shifted.reference[:, PROMPT - 1] += 5
    assert_same(our_loss(shifted, ["bco_pair"]), our_loss(batch, ["bco_pair"]))
    assert abs(trl_loss(shifted, ["bco_pair"])[0] - trl_loss(batch, ["bco_pair"])[0]) > 0.1


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft", "apo_zero"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.5])
def test_length_desensitization(loss_type: str, ld_alpha: float) -> None:
    batch = Batch()
    assert_same(our_loss(batch, [loss_type], ld_alpha=ld_alpha), trl_loss(batch, [loss_type], ld_alpha=ld_alpha))


def test_wpo_weighting() -> None:
    batch = Batch()
    assert_same(our_loss(batch, ["sigmoid"], use_weighting=True), trl_loss(batch, ["sigmoid"], use_weighting=True))


def test_weighted_list_of_losses() -> None:
    batch, types, weights = Batch(), ["sigmoid", "exo_pair", "sft"], [0.8, 0.2, 1.5]
    ours, theirs = (compute(batch, types, weights=weights, label_smoothing=0.1) for compute in (our_loss, trl_loss))
    # TRL's sigmoid is not smoothed: replace that part of ours.
    plain, smoothed = (our_loss(batch, ["sigmoid"], label_smoothing=epsilon) for epsilon in (0.0, 0.1))
    corrected = tuple(a + 0.8 * (b - c) for a, b, c in zip(ours, plain, smoothed, strict=True))
    assert_same(corrected, theirs, rtol=1e-7)
