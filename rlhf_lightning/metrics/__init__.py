"""Metrics of answers, preferences, rewards, steps and texts.

The classes are torchmetrics whose states are sums and counts, so that their values do not depend on batches and ranks;
the formulas are functions of ``functional``, ``at_k``, ``intervals``, ``preferences`` and ``texts``.
"""

from .answers import AnswerAccuracy, BestOfNCurve, MajorityAtK, PassAtK, UniqueAnswers
from .model_metrics import CalibrationError, FirstErrorF1, Perplexity, PreferenceAccuracy, TokenDivergence
from .text_metrics import CompletionLengths, DistinctN, RepetitionShare, SelfBLEU, TruncationShare

__all__ = [
    "AnswerAccuracy",
    "BestOfNCurve",
    "CalibrationError",
    "CompletionLengths",
    "DistinctN",
    "FirstErrorF1",
    "MajorityAtK",
    "PassAtK",
    "Perplexity",
    "PreferenceAccuracy",
    "RepetitionShare",
    "SelfBLEU",
    "TokenDivergence",
    "TruncationShare",
    "UniqueAnswers",
]
