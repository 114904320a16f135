"""Offline preference losses against a reference policy: DPO and its family, one value per pair.

Shapes: P pairs.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..utils.imports import dotted_path
from ..utils.validation import check_finite, check_same_shape
from . import _stable
from .preference_losses import LOSSES, PreferenceLossSpec, PreferenceLossType, PreferencePairs, loss_spec
from .preference_options import (
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCE_TYPES,
    LOSS_TYPES,
    SMOOTHED,
    FDivergenceType,
    PreferenceLoss,
    PreferenceLossFunction,
    check_arguments,
    load_loss,
    validate_preference_loss,
)
from .preference_weights import ld_alpha_logps, wpo_weights

__all__ = [
    "F_DIVERGENCE_LOSSES",
    "F_DIVERGENCE_TYPES",
    "LOSSES",
    "LOSS_TYPES",
    "SMOOTHED",
    "FDivergenceType",
    "PreferenceLoss",
    "PreferenceLossFunction",
    "PreferenceLossSpec",
    "PreferenceLossType",
    "PreferencePairs",
    "f_divergence_score",
    "ld_alpha_logps",
    "load_loss",
    "loss_spec",
    "preference_loss",
    "validate_preference_loss",
    "wpo_weights",
]


def f_divergence_score(logratios: Tensor, f_divergence_type: FDivergenceType, alpha: float = 0.5) -> Tensor:
    """Computes the implicit reward of f-DPO divided by beta: f'(u) of the ratio u = policy / reference.

    Paper: Beyond Reverse KL (Wang et al., 2023, arXiv:2309.16240), table 1. With u = exp(``logratios``)::

        reverse_kl        log u
        forward_kl        1 - 1/u
        js_divergence     log(2u / (1 + u))
        alpha_divergence  (1 - u^-alpha) / alpha

    Departures: each f' is shifted so that f'(1) = 0, which adds c(u - 1) to f and changes no divergence (the shift
    would otherwise matter where a score is divided by a length). Powers of 1/u above e^30 are continued by their
    tangent instead of overflowing. TRL's coefficient of the alpha-divergence is 1 - alpha.

    Args:
        logratios: log of policy over reference probability, any shape.
        f_divergence_type: one of ``F_DIVERGENCE_TYPES``.
        alpha: of the alpha-divergence, in [0, 1]; 0 is the reverse KL and 1 the forward KL.

    Returns:
        Scores of the shape of ``logratios``.

    Example:
        >>> f_divergence_score(torch.zeros(2), "js_divergence")
        tensor([0., 0.])
    """
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if f_divergence_type == "forward_kl":
        return -_stable.bounded_expm1(-logratios)
    if f_divergence_type == "alpha_divergence" and alpha > 0:
        return -_stable.bounded_expm1(-alpha * logratios) / alpha
    return logratios


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    loss_type: PreferenceLossType | PreferenceLossFunction = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: FDivergenceType = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    sft_logps: Tensor | None = None,
) -> Tensor:
    """Computes a loss of the DPO family, one value per pair.

    With r = beta * (log p - log p_ref) of the chosen (c) and rejected (r) completion, their margin m = r_c - r_r, S the
    logistic function, e = ``label_smoothing`` and |y| a length in tokens::

        sigmoid       -(1-e) log S(m) - e log S(-m)            DPO 2305.18290; cDPO with e > 0
        sigmoid_norm  the same, with m = r_c/|y_c| - r_r/|y_r|
        hinge         max(0, 1 - m)                            SLiC 2305.10425, RSO 2309.06657
        ipo           (m/beta - 1/(2 beta))^2, m as in sigmoid_norm    IPO 2310.12036, eq. 17
        exo_pair      KL( (S(m), S(-m)) || (1-e, e) )          EXO 2402.00856, eq. 16
        nca_pair      -log S(r_c) - log S(-r_c)/2 - log S(-r_r)/2      NCA 2402.05369
        robust        (-(1-e) log S(m) + e log S(-m)) / (1-2e)         rDPO 2403.00409
        bco_pair      -log S(r_c - d) - log S(d - r_r), d = batch mean of all r      BCO 2404.04656
        sppo_hard     (r_c/beta - 1/(2 beta))^2 + (r_r/beta + 1/(2 beta))^2    SPPO 2405.00675
        aot           sigmoid with m = beta * (log p_c/p_r - log p_ref,c/p_ref,r), both sorted over the batch
                                                               AOT 2406.05882
        aot_unpaired  sigmoid with m = r_c - r_r, both sorted over the batch
        apo_zero      S(-r_c) + S(r_r)                         APO 2408.06266, eq. 7 plus 1
        apo_down      S(r_c) + S(r_r - r_c)                    APO, eq. 8 plus 1
        discopop      (1-g) (-log S(m)) + g exp(-m), g = S(m/tau)      DiscoPOP 2406.08414, eq. 5
        sft           -log p_c, a sum over tokens

    Departures: ``ipo`` divides log-ratios by lengths (the paper writes sequence log-ratios; its results use averages);
    ``bco_pair`` takes d from this batch, where the paper keeps a running mean. The sorted losses return the value of
    the pair whose policy log-ratio (``aot_unpaired``: chosen log-ratio) has the rank. TRL's ``sigmoid`` reads no label
    smoothing and its ``bco_pair`` has d = 0.

    Args:
        chosen_logps: sum of the policy's log-probs over the chosen completion, (P,); likewise the next three.
        rejected_logps: (P,).
        ref_chosen_logps: (P,).
        ref_rejected_logps: (P,).
        chosen_lengths: tokens of the chosen completion, (P,), at least 1.
        rejected_lengths: (P,).
        loss_type: one of ``LOSS_TYPES``, or a function of ``PreferencePairs``. For losses that couple pairs
            (``loss_spec``) the P pairs must be the global batch, in an order that does not depend on sharding: ties in
            a sort break by position.
        beta: above 0; larger keeps the policy nearer to the reference (``ipo``: the paper's tau).
        label_smoothing: in [0, 0.5), the probability that a label is flipped; read by ``SMOOTHED`` only. ``exo_pair``
            needs more than 0 (paper: 1e-3).
        f_divergence_type: as for ``f_divergence_score``; others than ``reverse_kl`` for ``F_DIVERGENCE_LOSSES`` only.
        f_alpha_divergence_coef: alpha of ``alpha_divergence``, in [0, 1].
        discopop_tau: above 0.
        sft_logps: log-probs that ``sft`` negates; by default ``chosen_logps``. Pass the plain sums where those are
            reweighted (``ld_alpha_logps``).

    Returns:
        Losses (P,), unreduced; ``loss_spec`` knows the divisor of their sum over the global batch.

    Raises:
        ValueError: a shape that differs, or an argument out of range.

    Example:
        >>> logps, reference, lengths = torch.tensor([-4.0]), torch.tensor([-5.0]), torch.tensor([3])
        >>> preference_loss(logps, reference, reference, reference, chosen_lengths=lengths, rejected_lengths=lengths)
        tensor([0.6444])
    """
    check_arguments(
        [loss_type],
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
    )
    check_same_shape(
        "P",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        sft_logps=sft_logps,
    )

    # The f-divergence changes only the scores: losses on single rewards are defined for the reverse KL.
    chosen_scores = f_divergence_score(chosen_logps - ref_chosen_logps, f_divergence_type, f_alpha_divergence_coef)
    rejected_logratios = rejected_logps - ref_rejected_logps
    pairs = PreferencePairs(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_scores,
        f_divergence_score(rejected_logratios, f_divergence_type, f_alpha_divergence_coef),
        chosen_lengths,
        rejected_lengths,
        chosen_logps if sft_logps is None else sft_logps,
        beta,
        label_smoothing,
        discopop_tau,
    )
    losses = loss_spec(loss_type).function(pairs)
    if not isinstance(loss_type, str):
        check_finite(f"loss_type {dotted_path(loss_type)}", losses, like=chosen_logps, each="pair")
    return losses
