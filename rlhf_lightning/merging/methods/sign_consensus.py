"""Sign consensus: keep the entries on whose direction the models agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView, shares_of


@dataclass(frozen=True, kw_only=True)
class SignConsensus(Method):
    r"""Averages differences where the models agree on the sign, and keeps the base elsewhere.

    The agreement of an entry is :math:`|\sum_i w_i \operatorname{sign} \tau_i| / \sum_i w_i`: 1 where all signs are
    equal, 0 where they cancel. Entries of at least ``confidence_threshold`` become
    :math:`\theta_0 + \lambda \sum_i w_i \tau_i / \sum_i w_i`.

    Args:
        weights: one positive number per model; all equal by default.
        scale: lambda.
        confidence_threshold: in [0, 1]; 0 keeps every entry, 1 only those of one sign.
    """

    name: ClassVar[str] = "sign_consensus"
    needs_base: ClassVar[bool] = True
    needs_positive: ClassVar[str] = "a count of votes"
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    confidence_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}; it must be in [0, 1]")

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Averages the entries of one block that agree."""
        assert block.base_RC is not None
        deltas_MRC = block.deltas_MRC
        shares_M11 = shares_of(self.weights, deltas_MRC)[:, None, None]
        agreement_RC = (deltas_MRC.sign() * shares_M11).sum(0).abs()
        # Sums of shares are exact to rounding only.
        agrees_RC = agreement_RC >= self.confidence_threshold - 1e-6
        return block.base_RC + self.scale * (deltas_MRC * shares_M11).sum(0) * agrees_RC
