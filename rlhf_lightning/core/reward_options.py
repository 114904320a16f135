"""Options of reward models: checks, attributes, and ratings and bootstrap weights of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from ..data.cell_checks import describe_columns
from ..sequences import Example
from ..utils.validation import check_choice, check_not_negative, check_positive

RewardLossType = Literal["bradley_terry", "mse", "huber"]

LOSS_TYPES: Final[tuple[RewardLossType, ...]] = get_args(RewardLossType)


def check_reward_options(
    *,
    loss_type: str,
    label_smoothing: float,
    margin: float,
    center_rewards_coefficient: float,
    l2_coefficient: float,
    tie_threshold: float | None,
    huber_delta: float,
    attributes: Sequence[str] | None,
) -> None:
    """Checks the options of the loss, and that every option that is set has an effect.

    Raises:
        ValueError: a value out of range, or one without effect.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if isinstance(label_smoothing, bool) or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be in [0, 0.5) (0 is none, 0.1 is usual)")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"margin is {margin!r}; it must be a finite number (0 is none, 1 is usual)")
    check_not_negative("center_rewards_coefficient", center_rewards_coefficient, "0 is none, 0.01 is usual")
    check_not_negative("l2_coefficient", l2_coefficient, "0 is none, 0.001 is usual")
    check_positive("huber_delta", huber_delta, "1 is usual")

    # Options of the pair losses would silently do nothing elsewhere.
    pair_options = {
        "label_smoothing": label_smoothing,
        "margin": margin,
        "center_rewards_coefficient": center_rewards_coefficient,
        "l2_coefficient": l2_coefficient,
        "tie_threshold": tie_threshold,
    }
    if loss_type != "bradley_terry":
        for name, value in pair_options.items():
            if value:
                raise ValueError(f"{name}={value} changes nothing in loss_type {loss_type!r}: use 'bradley_terry'")
        if not attributes:
            raise ValueError(
                f"loss_type is {loss_type!r} without attributes: name the columns of ratings, such as ['helpfulness']"
            )

    # The model of ties (Rao and Kupper) defines neither margins nor flipped labels.
    if tie_threshold is not None:
        check_positive("tie_threshold", tie_threshold, "0.5 is usual; null is a model without ties")
        for name in ("label_smoothing", "margin"):
            if pair_options[name]:
                raise ValueError(
                    f"{name}={pair_options[name]} changes nothing with tie_threshold: leave one of them out"
                )


def attribute_options(
    num_attributes: int, attributes: Sequence[str] | None, attribute_weights: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    """Returns the names and weights of the head's outputs.

    Args:
        num_attributes: K; may be left at 1 if ``attributes`` is given.
        attributes: names, or ``None`` for default names.
        attribute_weights: one per attribute, or ``None`` for 1 / K each.

    Raises:
        ValueError: lists of other lengths than K, equal names, or weights that are not finite or all 0.

    Example:
        >>> attribute_options(2, None, None)
        (['attribute_0', 'attribute_1'], [0.5, 0.5])
    """
    if attributes is None:
        names = ["reward"] if num_attributes == 1 else [f"attribute_{k}" for k in range(num_attributes)]
    else:
        names = list(attributes)
        if num_attributes not in (1, len(names)) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"attributes is {names} with num_attributes={num_attributes}; give as many different names, or leave "
                "num_attributes out"
            )
    weights = [1 / len(names)] * len(names) if attribute_weights is None else [float(w) for w in attribute_weights]
    if len(weights) != len(names) or not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(
            f"attribute_weights is {weights} for the attributes {names}; give one finite number for each, not all 0"
        )
    return names, weights


def ratings_of(example: Example, attributes: Sequence[str]) -> list[float]:
    """Returns the ratings of a row, NaN for a missing one.

    Raises:
        ValueError: with the row and the value, if a rating is not a finite number.

    Example:
        >>> from rlhf_lightning.sequences import Segment
        >>> ratings_of(Example("rows:0", Segment([1]), {"helpfulness": 4}), ["helpfulness", "correctness"])
        [4.0, nan]
    """
    return [_rating(example.row_id, name, example.fields.get(name)) for name in attributes]


def check_rated(examples: Sequence[Example], attributes: Sequence[str]) -> None:
    """Checks that every attribute is rated in at least one row.

    Args:
        examples: rows, read until every attribute is found.
        attributes: names of ratings.

    Raises:
        ValueError: with the attribute, the rows, and the numeric columns of the first row.
    """
    missing = set(attributes)
    for example in examples:
        ratings = ratings_of(example, attributes)
        missing -= {name for name, rating in zip(attributes, ratings, strict=True) if not math.isnan(rating)}
        if not missing:
            return
    if not len(examples):
        return
    name = next(name for name in attributes if name in missing)
    first, last = examples[0], examples[-1]
    numbers = {key: value for key, value in first.fields.items() if isinstance(value, int | float)}
    raise ValueError(
        f"none of the {len(examples)} training rows ({first.row_id} to {last.row_id}) has a number {name!r}"
        f"{describe_columns(numbers, name)}: name attributes after columns of ratings"
    )


def _rating(row_id: str, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(
            f"row {row_id} has the {name} {value!r}; it must be a finite number, or null where it was not rated"
        )
    return float(value)


def bootstrap_weights(row_ids: Sequence[str], num_models: int, seed: int) -> Tensor:
    """Draws each ensemble member's weights of rows: Poisson variables of mean 1, ``(rows, members)`` in fp32.

    Paper: Oza and Russell, 2001, "Online bagging and boosting": the limit of drawing n of n rows with replacement. A
    draw is a function of (seed, member, row id) alone, so a member sees the same sample in every epoch and with any
    number of ranks.

    Args:
        row_ids: stable ids of rows.
        num_models: members, at least 1.
        seed: seed of the draws.

    Example:
        >>> bootstrap_weights(["rows:0"], 4, seed=0).shape
        torch.Size([1, 4])
    """
    return torch.tensor(
        [[_poisson(_uniform(f"{seed}/{member}/{row_id}")) for member in range(num_models)] for row_id in row_ids]
    )


def _uniform(text: str) -> float:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


def _poisson(uniform: float) -> float:
    """Inverts the distribution function of a Poisson variable of mean 1."""
    count, term = 0, math.exp(-1.0)
    below = term
    while uniform >= below and count < 20:
        count += 1
        term /= count
        below += term
    return float(count)
