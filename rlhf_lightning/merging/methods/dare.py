"""DARE: drop differences at random and rescale the others (Yu et al., 2023, arXiv:2311.03099)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Block, Method, TensorView
from .election import Preset, elect_and_average, election_conventions
from .task_arithmetic import add_deltas


@dataclass(frozen=True, kw_only=True)
class Dare(Method):
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
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    density: float = 0.5
    seed: int = 0
    preset: Preset = "paper"

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the factors of rescaling."""
        return rescale_factors(view, self.density, self.seed, self.preset)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Adds the differences of one block that are kept."""
        kept_MRC = drop(block, view.name, self.density, self.seed, observed)
        return add_deltas(block, kept_MRC, self.weights, self.scale)


@dataclass(frozen=True, kw_only=True)
class DareTies(Method):
    """Drops differences at random as DARE does, then elects signs and averages what agrees as TIES does.

    Under ``mergekit`` what agrees is summed and not averaged, as its ``dare_ties`` does by default.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        preset: the convention of the election and of rescaling: ``paper``, ``peft`` or ``mergekit``.
        density: fraction of differences that is kept, in (0, 1].
        seed: of the masks.
    """

    name: ClassVar[str] = "dare_ties"
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    preset: Preset = "paper"
    density: float = 0.5
    seed: int = 0

    def conventions(self) -> dict[str, Any]:
        """Adds what the preset decides."""
        found = {**super().conventions(), **election_conventions(self.preset)}
        return {**found, "normalize_by": "nothing"} if self.preset == "mergekit" else found

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the factors of rescaling."""
        return rescale_factors(view, self.density, self.seed, self.preset)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Elects signs among the differences of one block that are kept, and averages what agrees."""
        kept_MRC = drop(block, view.name, self.density, self.seed, observed)
        divide = self.preset != "mergekit"
        return elect_and_average(block, kept_MRC, self.weights, self.scale, self.preset, divide=divide)


def drop(block: Block, name: str, density: float, seed: int, factors: Sequence[float]) -> Tensor:
    """Drops differences of one block at random, with a mask for each model, and rescales the rest.

    Args:
        block: of the tensor ``name``.
        name: of the tensor.
        density: fraction that is kept.
        seed: of the masks.
        factors: of each model.
    """
    if density == 1:
        return block.deltas_MRC
    kept = []
    for model, factor in enumerate(factors):
        delta_RC = block.delta_RC(model)
        mask_RC = random_block(delta_RC.shape, seed, model, name, block.first_row) < density
        kept.append(delta_RC * mask_RC * factor)
    return torch.stack(kept)


def rescale_factors(view: TensorView, density: float, seed: int, preset: Preset) -> list[float]:
    """Returns the factors of kept differences: 1 / density, or under ``mergekit`` the ratio of the L1 norms."""
    if preset != "mergekit" or density == 1:
        return [1 / density] * view.num_models
    return norm_ratios(view, lambda block: drop(block, view.name, density, seed, [1.0] * view.num_models))


def norm_ratios(view: TensorView, kept: Callable[[Block], Tensor]) -> list[float]:
    """Returns, for each model, the ratio of the L1 norms of a tensor's differences and of what is kept of them.

    Args:
        view: the tensor.
        kept: returns what is kept of a block, ``(M, R, C)``.
    """

    def norms(block: Block) -> Tensor:
        return torch.stack([part.flatten(1).abs().double().sum(1) for part in (block.deltas_MRC, kept(block))])

    before_M, after_M = torch.stack(list(view.map(norms))).sum(0)
    return [float(before / after) if after else 0.0 for before, after in zip(before_M, after_M, strict=True)]


def random_block(shape: torch.Size, seed: int, model: int, name: str, first_row: int) -> Tensor:
    """Draws uniform numbers for one block of one model's tensor: a function of the arguments alone.

    Blocks have fixed boundaries, so that a merge that is resumed draws the same.
    """
    text = f"{seed}\0{model}\0{name}\0{first_row}".encode()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
