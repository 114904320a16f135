"""Findings of checks of a model, which fail where the whole interval is beyond a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any, Protocol

from ..inference import Engine
from ..metrics.intervals import Interval, share_interval

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: name of the check.
        value: what it measured.
        low: lower end of the 95 % interval of the value.
        high: upper end.
        limit: that the value must not be certain to exceed, or to fall short of.
        passed: whether it holds: only a value whose whole interval is beyond the limit fails.
        detail: one sentence with the numbers.
        samples: a few of the model's answers that speak against it.

    Example:
        >>> Finding("consistency", 0.9, 0.85, 0.94, 0.8, True, "90 % of the answers agree").passed
        True
    """

    check: str
    value: float
    low: float
    high: float
    limit: float
    passed: bool
    detail: str
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Validation:
    """The findings of all checks.

    Attributes:
        findings: one per check.

    Example:
        >>> failed = Finding("consistency", 0.5, 0.4, 0.6, 0.8, False, "half of the answers agree")
        >>> Validation((failed,)).passed
        False
    """

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def reason(self) -> str:
        """The first finding that did not pass; else that all did."""
        failed = [finding for finding in self.findings if not finding.passed]
        return f"{failed[0].check}: {failed[0].detail}" if failed else f"all {len(self.findings)} checks passed"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]}


class ModelCheck(Protocol):
    """Interface of checks, which look at a model through its engine."""

    def run(self, engine: Engine, seed: int) -> Finding:
        """Runs the check.

        Args:
            engine: the model's, with a tokenizer.
            seed: of all that is drawn.
        """
        ...


def check_share(name: str, value: float, least: float = 0.0) -> None:
    """Checks a share.

    Raises:
        ValueError: it is not in [least, 1].
    """
    if not least <= value <= 1:
        raise ValueError(f"check.{name} is {value!r}; it must be in [{least:g}, 1]")


def bounded_mean(values: Sequence[float]) -> Interval:
    """Returns the mean of shares with its 95 % interval."""
    return share_interval(len(values), fsum(values), fsum(value * value for value in values))


def at_least(name: str, found: Interval, limit: float, detail: str, samples: Sequence[str]) -> Finding:
    """Makes a finding that fails where the whole interval is below the limit."""
    return Finding(
        name, found.value, found.low, found.high, limit, found.high >= limit, detail, tuple(samples[:_SHOWN])
    )


def at_most(name: str, found: Interval, limit: float, detail: str, samples: Sequence[str]) -> Finding:
    """Makes a finding that fails where the whole interval is above the limit."""
    return Finding(name, found.value, found.low, found.high, limit, found.low <= limit, detail, tuple(samples[:_SHOWN]))
