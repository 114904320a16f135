"""Particle filtering over steps: samples of the policy, weighted by the scorer, from their exact posterior.

Legend: N particles.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..utils.validation import check_choice, check_count, check_fraction, check_positive
from .engine import Engine
from .sampling import derive_seed, uniforms
from .step_environment import StepEnvironment
from .step_search import StepSearch
from .strategy import Ask
from .trees import Node

Vector = npt.NDArray[np.float64]


class ParticleFilter(StepSearch):
    r"""Samples solutions in proportion to ``p(x) * potential(x)``, with the policy's probability ``p``.

    Sequential Monte Carlo (Doucet, de Freitas and Gordon, 2001; for reward models, Puri et al., 2025). Each of
    ``particles`` partial solutions is continued by a step of the policy, and its weight multiplied by the ratio of its
    potential after and before the step. When the effective sample size ``1 / sum(w**2)`` falls below ``threshold *
    particles``, particles are drawn anew in proportion to their weights by systematic resampling: one uniform number,
    and each survives as often as its weight says, up to one. Ended solutions keep their place and take part.

    - ``potential="probability"``: the score itself, in [0, 1], to the power of ``1 / temperature``.
    - ``potential="exponential"``: ``exp(score / temperature)``; for reward models, this is the optimal policy at a KL
      penalty of ``temperature``.

    ``entropic`` above 0 keeps particles diverse while scores are still unsure: if the effective size of a resampling
    would be below ``entropic * particles``, it takes weights to the largest power in [0, 1] that reaches it, and each
    particle keeps the rest of its weight. Weights are exact for any of these settings: the weighted mean over particles
    estimates the posterior's, and ``tree.statistics["log_evidence"]`` the logarithm of the mean potential under the
    policy, whose estimate (not its logarithm) is unbiased.

    The tree's values are posterior weights: of all particles at or below a node. The chosen solution is the one with
    the highest score.

    Args:
        engine: samples from the policy.
        particles: their number, at least 1.
        potential: ``probability`` or ``exponential``.
        temperature: above 0; higher values trust the scorer less.
        threshold: share of particles that the effective sample size must reach, in [0, 1]; 0 never draws anew.
        entropic: share of particles that the effective size of a resampling must reach, in [0, 1).
        options: ``scorer`` and the other options of :class:`StepSearch`.

    Raises:
        ValueError: an option out of range, or a score that is no probability.

    Example:
        >>> strategy = ParticleFilter(engine, scorer=ProcessScorer("runs/process_reward/model"))  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"], seeds=[0])[0].text  # doctest: +SKIP
        '3+14=17\n17+9=26\n#26'
    """

    def __init__(
        self,
        engine: Engine,
        *,
        particles: int = 8,
        potential: Literal["probability", "exponential"] = "probability",
        temperature: float = 1.0,
        threshold: float = 0.5,
        entropic: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(engine, **options)
        check_count("particles", particles, "8 is usual")
        check_choice("potential", potential, ("probability", "exponential"))
        check_positive("temperature", temperature, "1 takes scores as they are")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}; it must be in [0, 1] (0.5 is usual)")
        check_fraction("entropic", entropic, "0 resamples by the weights themselves")
        self.particles, self.potential, self.temperature = particles, potential, float(temperature)
        self.threshold, self.entropic = float(threshold), float(entropic)

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Searches for one prompt."""
        particles = [steps.root] * self.particles
        log_weights_N = np.zeros(self.particles)
        rounds = 0
        while not steps.stopped_by and any(node.finish_reason is None for node in particles):
            moved = yield from self._move(steps, particles)
            yield from steps.score([new for old, new in zip(particles, moved, strict=True) if new is not old])
            # A step that the budget left without a score is not taken.
            for number, (old, new) in enumerate(zip(particles, moved, strict=True)):
                if new is not old and new.score is not None:
                    if np.isfinite(log_weights_N[number]):  # otherwise its weight is 0 for good
                        log_weights_N[number] += self._log_potential(new) - self._log_potential(old)
                    particles[number] = new
            rounds += 1
            if not np.isfinite(log_weights_N).any():
                break
            # Resampling adds noise, so the last step is not resampled.
            last = all(node.finish_reason is not None for node in particles)
            if not last and effective_size(log_weights_N) < self.threshold * self.particles:
                uniform = float(uniforms([derive_seed(steps.query.seed, "resample")], [rounds])[0])
                chosen, log_weights_N = resample(log_weights_N, uniform, self.entropic)
                particles = [particles[number] for number in chosen]
        self._weigh(steps, particles, log_weights_N)

    def _move(self, steps: StepEnvironment, particles: list[Node]) -> Generator[Ask, Any, list[Node]]:
        """Continues every particle that has not ended by a step; where the budget ends, the rest stay as they are."""
        counts: dict[Node, int] = {}
        for node in particles:
            if node.finish_reason is None:
                counts[node] = counts.get(node, 0) + 1
        drawn = yield from steps.expand(list(counts), list(counts.values()))
        children = {node: iter(found) for node, found in zip(counts, drawn, strict=True)}
        return [next(children[node], node) if node in children else node for node in particles]

    def _log_potential(self, node: Node) -> float:
        """The logarithm of a node's potential; 0 at the root, which is not scored."""
        if node.parent is None:
            return 0.0
        score = 0.0 if node.score is None else node.score
        if self.potential == "exponential":
            return score / self.temperature
        if not 0 <= score <= 1:
            raise ValueError(
                f"the scorer gave {score!r}; potential='probability' needs scores in [0, 1]: use "
                "potential='exponential' for rewards"
            )
        return math.log(score) / self.temperature if score > 0 else -math.inf

    def _weigh(self, steps: StepEnvironment, particles: list[Node], log_weights_N: Vector) -> None:
        """Writes posterior weights to the tree."""
        for node in steps.root.subtree():
            node.value = 0.0
        total = float(np.logaddexp.reduce(log_weights_N))
        steps.statistics["log_evidence"] = total - math.log(len(particles))
        if total == -math.inf:
            return
        for particle, weight in zip(particles, np.exp(log_weights_N - total).tolist(), strict=True):
            for node in particle.line:
                node.value = (node.value or 0.0) + weight


def effective_size(log_weights_N: Vector) -> float:
    """Returns ``1 / sum(w**2)`` of normalised weights.

    Example:
        >>> round(effective_size(np.log([0.5, 0.5, 1e-30])), 6)
        2.0
    """
    log_shares_N = log_weights_N - np.logaddexp.reduce(log_weights_N)
    return float(np.exp(-np.logaddexp.reduce(2 * log_shares_N)))


def resample(log_weights_N: Vector, uniform: float, entropic: float = 0.0) -> tuple[list[int], Vector]:
    """Draws particles anew, each as often as its weight to some power says, up to one.

    A particle drawn in proportion to ``w**b`` keeps ``w**(1 - b)``, times the mean of ``w**b``, so that no expectation
    changes; ``b`` is 1 unless ``entropic`` asks for more diversity.

    Args:
        log_weights_N: logarithms of the weights, at least one of them finite.
        uniform: a number in (0, 1).
        entropic: share of particles that the effective size of ``w**b`` reaches.

    Returns:
        The numbers of the drawn particles, and their log-weights.

    Example:
        >>> chosen, weights = resample(np.log([0.75, 0.25, 1e-30, 1e-30]), 0.5)
        >>> chosen, np.round(np.exp(weights), 6).tolist()
        ([0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25])
    """
    size = len(log_weights_N)
    power = _power(log_weights_N, entropic * size)
    powers_N = np.where(np.isfinite(log_weights_N), power * log_weights_N, -np.inf)
    total = np.logaddexp.reduce(powers_N)

    # Systematic resampling: a comb of N teeth over the cumulative weights.
    teeth_N = (np.arange(size) + uniform) / size
    cumulative_N = np.cumsum(np.exp(powers_N - total))
    chosen_N = np.searchsorted(cumulative_N / cumulative_N[-1], teeth_N, side="right")
    rest_N = (1 - power) * log_weights_N[chosen_N] + total - math.log(size)
    return chosen_N.tolist(), rest_N


def _power(log_weights_N: Vector, least: float) -> float:
    """The largest power in [0, 1] of weights whose effective size is at least ``least``; 0 if no power reaches it."""
    alive_N = log_weights_N[np.isfinite(log_weights_N)]
    if effective_size(alive_N) >= least:
        return 1.0
    # The effective size falls as the power rises.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_size(middle * alive_N) >= least else (low, middle)
    return low
