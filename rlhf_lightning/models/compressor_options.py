"""Options of a context compressor, which are stored with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ..sequences import SummaryLayout
from ..utils.validation import check_choice

Pooling = Literal["none", "mean", "attention"]

POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)


@dataclass(frozen=True)
class CompressorOptions(SummaryLayout):
    """Options of a compressor, which are stored with it: those of ``SummaryLayout`` and its encoder's.

    Args:
        encoder_rank: rank of low-rank changes to the decoder's linear layers, which apply to contexts alone (Ge et al.,
            2023, arXiv:2307.06945); 0: the decoder itself reads them.
        pooling: added to a slot's embedding: ``"none"``; ``"mean"``: the mean of the embeddings of the ``ratio`` tokens
            that it stands for; or ``"attention"``: their mean weighted by the slot's attention, whose query is learned.
    """

    encoder_rank: int = 0
    pooling: Pooling = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, POOLINGS)
        if isinstance(self.encoder_rank, bool) or not isinstance(self.encoder_rank, int) or self.encoder_rank < 0:
            raise ValueError(f"encoder_rank is {self.encoder_rank!r}; it must be a whole number of at least 0 (16)")

    def check_stored(self, stored: Mapping[str, Any], folder: str | Path) -> None:
        """Checks that the options are those of a stored compressor.

        Raises:
            ValueError: one differs.
        """
        for name, value in asdict(self).items():
            if value != stored[name]:
                raise ValueError(
                    f"{name} is {value!r}, and the compressor in {str(folder)!r} was trained with {stored[name]!r}: "
                    f"set {name} to that"
                )
