"""DARE: drop differences at random and rescale the others (Yu et al., 2023, arXiv:2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...utils.validation import check_choice
from .base import Block, TensorView
from .task_arithmetic import TaskArithmetic
from .ties import PRESETS, Preset, SignElection, check_density


def random_block(shape: torch.Size, seed: int, model: int, name: str, first_row: int) -> Tensor:
    """Draws uniform numbers for one block of one model's tensor: a function of the arguments alone.

    Blocks have fixed boundaries, so that a merge that is resumed draws the same.
    """
    text = f"{seed}\0{model}\0{name}\0{first_row}".encode()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def dropped(self: Dare | DareTies, block: Block, view: TensorView, observed: Any) -> Tensor:
    """Drops differences at random, with a mask for each model, and rescales those that are kept."""
    deltas_MRC = block.deltas_MRC
    if self.density == 1:
        return deltas_MRC
    kept = [
        delta * (random_block(delta.shape, self.seed, model, view.name, block.first_row) < self.density)
        for model, delta in enumerate(deltas_MRC)
    ]
    factors = [1 / self.density] * len(kept) if observed is None else observed
    return torch.stack([delta * factor for delta, factor in zip(kept, factors, strict=True)])


def norm_ratios(self: Dare | DareTies, view: TensorView) -> list[float] | None:
    """Returns, for mergekit's convention, the ratio of the L1 norms before and after dropping, for each model."""
    if self.preset != "mergekit" or self.density == 1:
        return None
    sums: Tensor | None = None
    for block in view.blocks():
        deltas_MRC = block.deltas_MRC
        masks = [
            random_block(delta.shape, self.seed, model, view.name, block.first_row) < self.density
            for model, delta in enumerate(deltas_MRC)
        ]
        magnitudes = deltas_MRC.abs().double()
        part = torch.stack((magnitudes.flatten(1).sum(1), (magnitudes * torch.stack(masks)).flatten(1).sum(1)))
        sums = part if sums is None else sums + part
    assert sums is not None
    return [float(before / after) if after else 0.0 for before, after in sums.T]


@dataclass(frozen=True, kw_only=True)
class Dare(TaskArithmetic):
    r"""Keeps each difference with probability p and divides it by p, then adds them to the base.

    Every model has a mask of its own. The expectation is that of task arithmetic. Under ``mergekit`` the differences
    that are kept are rescaled to the tensor's L1 norm instead, which is not unbiased for small tensors.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        density: p, in (0, 1].
        seed: of the masks.
        preset: the convention of rescaling: ``paper`` and ``peft`` (by 1 / p), or ``mergekit``.
    """

    name: ClassVar[str] = "dare"
    density: float = 0.5
    seed: int = 0
    preset: Preset = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        check_choice("preset", self.preset, PRESETS)

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Measures the norms that mergekit's rescaling needs."""
        return norm_ratios(self, view)

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Drops differences at random."""
        return dropped(self, block, view, observed)


@dataclass(frozen=True, kw_only=True)
class DareTies(SignElection):
    """Drops differences at random as DARE does, then elects signs and averages what agrees as TIES does.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        density: fraction of differences that is kept, in (0, 1].
        seed: of the masks.
        preset: the convention of the election and of rescaling: ``paper``, ``peft`` or ``mergekit``.
    """

    name: ClassVar[str] = "dare_ties"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Measures the norms that mergekit's rescaling needs."""
        return norm_ratios(self, view)

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Drops differences at random."""
        return dropped(self, block, view, observed)
