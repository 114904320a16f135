"""The methods of the matrix: how each is built, and on which rows. A new method is one more entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.modules import PostTrainingModule
from rlhf_lightning.sequences import Example, Segment

VOCAB = 60


@dataclass(frozen=True)
class Method:
    """A method with options.

    Args:
        module: its class.
        rows: makes ``n`` examples of its contract.
        options: of the module.
    """

    module: type[PostTrainingModule]
    rows: Callable[[int], list[Example]]
    options: dict[str, Any] = field(default_factory=dict)


def _tokens(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    return rng.integers(3, VOCAB, size=int(rng.integers(low, high)))


def _completion(rng: np.random.Generator, low: int = 1, high: int = 12) -> Segment:
    tokens = _tokens(rng, low, high)
    return Segment(tokens, np.ones(len(tokens)))


def demonstrations(count: int) -> list[Example]:
    """Prompts with one completion; some rows weight only some of their tokens."""
    rng = np.random.default_rng(1)
    rows = []
    for n in range(count):
        completion = _completion(rng, 2, 14)
        if n % 3 == 2:
            completion = Segment(completion.tokens, rng.integers(0, 2, len(completion.tokens)))
        rows.append(Example(f"rows:{n}", Segment(_tokens(rng, 1, 9), children=(completion,))))
    return rows


def pairs(count: int) -> list[Example]:
    """Prompts with a chosen and a rejected completion."""
    rng = np.random.default_rng(2)
    return [
        Example(f"rows:{n}", Segment(_tokens(rng, 1, 9), children=(_completion(rng), _completion(rng))))
        for n in range(count)
    ]


METHODS: dict[str, Method] = {
    "sft": Method(SFTModule, demonstrations),
    "sft-smooth": Method(SFTModule, demonstrations, {"label_smoothing": 0.1}),
    "sft-dft": Method(SFTModule, demonstrations, {"loss_type": "dft"}),
    "dpo": Method(DPOModule, pairs),
    "dpo-rpo": Method(DPOModule, pairs, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo-coupled": Method(DPOModule, pairs, {"loss_type": ["aot", "aot_unpaired", "bco_pair"]}),
    "dpo-ld-wpo": Method(DPOModule, pairs, {"ld_alpha": 0.3, "use_weighting": True, "label_smoothing": 0.1}),
}
