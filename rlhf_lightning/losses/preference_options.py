"""Options of the preference losses, and checks of configured values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from ..utils.imports import DottedPath, dotted_path, load_attribute
from ..utils.validation import check_choice, check_label_smoothing, check_positive
from .preference_losses import LOSSES, PreferenceLossType, loss_spec

# A loss of one's own: from ``PreferencePairs`` to one loss per pair, (P,). In a config it is named by its dotted path.
PreferenceLossFunction = Callable[..., Any]
if TYPE_CHECKING:
    PreferenceLoss = PreferenceLossType | str | PreferenceLossFunction
else:
    PreferenceLoss = PreferenceLossType | DottedPath
FDivergenceType = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LOSS_TYPES: Final[tuple[PreferenceLossType, ...]] = get_args(PreferenceLossType)
F_DIVERGENCE_TYPES: Final[tuple[FDivergenceType, ...]] = get_args(FDivergenceType)
# Losses that label_smoothing changes, and losses for which an f-divergence other than the reverse KL is defined.
SMOOTHED: Final = frozenset(name for name, spec in LOSSES.items() if spec.smoothed)
F_DIVERGENCE_LOSSES: Final = frozenset(name for name, spec in LOSSES.items() if spec.f_divergence)


def load_loss(loss_type: str | PreferenceLossFunction) -> Any:
    """Imports a loss of one's own that is named by its dotted path; returns any other name or function as it is.

    Raises:
        ValueError: there is nothing at the path, or no function.
    """
    if not isinstance(loss_type, str) or "." not in loss_type:
        return loss_type
    found = load_attribute(loss_type)
    if not callable(found):
        raise ValueError(f"loss_type is {loss_type!r}, a {type(found).__name__}; it must name a function of one's own")
    return found


def _check_names(loss_types: Sequence[str | PreferenceLossFunction], f_divergence_type: str) -> None:
    if not loss_types:
        raise ValueError("loss_type is an empty list: name at least one loss, such as 'sigmoid'")
    for loss_type in loss_types:
        loss_spec(loss_type)
    check_choice("f_divergence_type", f_divergence_type, F_DIVERGENCE_TYPES)
    for loss_type in loss_types:
        if f_divergence_type != "reverse_kl" and loss_type not in F_DIVERGENCE_LOSSES:
            allowed = ", ".join(sorted(F_DIVERGENCE_LOSSES))
            loss_type = loss_type if isinstance(loss_type, str) else dotted_path(loss_type)
            raise ValueError(
                f"f_divergence_type {f_divergence_type!r} is not defined for loss_type {loss_type!r}: "
                f"use 'reverse_kl', or one of {allowed}"
            )


def _check_weights(loss_types: Sequence[object], weights: Sequence[float] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(loss_types):
        raise ValueError(f"{len(weights)} loss_weights for {len(loss_types)} loss types: give one weight for each")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"loss_weights={list(weights)}: give finite numbers of at least 0, one of them above 0")


def check_arguments(
    loss_types: Sequence[str | PreferenceLossFunction],
    *,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
) -> None:
    """Runs the checks of ``validate_preference_loss`` that apply to each loss of a list individually."""
    _check_names(loss_types, f_divergence_type)
    check_positive("beta", beta, "0.1 is usual")
    check_positive("discopop_tau", discopop_tau, "0.05 is usual")
    check_label_smoothing(label_smoothing)
    if "exo_pair" in loss_types and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing above 0, got 0: use 0.001, as its paper does")
    if not 0 <= f_alpha_divergence_coef <= 1:
        raise ValueError(
            f"f_alpha_divergence_coef={f_alpha_divergence_coef} is outside [0, 1]: "
            "0 is the reverse KL, 1 the forward KL; 0.5 is usual"
        )


def validate_preference_loss(
    loss_type: str | PreferenceLossFunction | Sequence[str | PreferenceLossFunction],
    weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> None:
    """Checks the arguments that a config sets, for one loss or a weighted list of losses.

    Args:
        loss_type: one of ``LOSS_TYPES``, a function of one's own, or several of these.
        weights: one per loss, finite, at least 0, not all 0; ``None`` is 1 for each.
        beta: above 0.
        label_smoothing: in [0, 0.5); above 0 for ``exo_pair``; 0 if no listed loss reads it.
        f_divergence_type: one of ``F_DIVERGENCE_TYPES``.
        f_alpha_divergence_coef: in [0, 1].
        discopop_tau: above 0.
        ld_alpha: in [0, 1], or ``None``.
        use_weighting: whether pairs are weighted as in WPO, which is undefined for the sorted losses.

    Raises:
        ValueError: what is wrong, what is allowed, and what to write.

    Example:
        >>> validate_preference_loss(["sigmoid", "sft"], [1.0, 0.2], beta=0.1)
    """
    loss_types = [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)
    check_arguments(
        loss_types,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
    )
    _check_weights(loss_types, weights)

    # An option without effect is an error: it would otherwise be silently ignored.
    named = [name for name in loss_types if isinstance(name, str)]
    if label_smoothing > 0 and len(named) == len(loss_types) and not SMOOTHED & set(named):
        raise ValueError(
            f"label_smoothing={label_smoothing} changes nothing in loss_type {', '.join(named)}: "
            f"set it to 0, or use one of {', '.join(sorted(SMOOTHED))}"
        )
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha} is outside [0, 1]: null or 1 keeps every token, 0 drops the longer tail")

    sorted_losses = [name for name in named if LOSSES[name].sorts_pairs]
    if use_weighting and sorted_losses:
        raise ValueError(
            f"use_weighting=True weights pairs, which loss_type {sorted_losses[0]!r} takes apart: "
            "set it to false, or use another loss"
        )
