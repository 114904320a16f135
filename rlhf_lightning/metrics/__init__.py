"""Metrics whose states are sums and counts, so that means are never averaged; ``functional`` has the formulas."""

from .functional import NO_ERROR
from .preference import ExpectedCalibrationError, PreferenceAccuracy, PreferenceMargin
from .rewards import AttributeCorrelation, RewardStatistics
from .steps import FirstErrorF1

__all__ = [
    "NO_ERROR",
    "AttributeCorrelation",
    "ExpectedCalibrationError",
    "FirstErrorF1",
    "PreferenceAccuracy",
    "PreferenceMargin",
    "RewardStatistics",
]
