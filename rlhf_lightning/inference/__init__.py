"""Generation: engines that sample completions, strategies that search, and scorers that they search by."""

from __future__ import annotations

from .budget import Budget
from .completion import Completion
from .engine import Engine, LocalEngine
from .generation import generate
from .remote_engine import RemoteEngine
from .sampling import SamplingParams, derive_seed
from .scorers import ProcessScorer, RewardScorer
from .selection import BestOfN, MajorityVote, SelfConsistency
from .specs import build_scorer, build_strategy
from .strategy import Candidate, Scorer, Scores, SearchResult, Strategy
from .text_terms import LikelihoodScorer, TextScorer, VerifierScorer, WeightedScorer

__all__ = [
    "BestOfN",
    "Budget",
    "Candidate",
    "Completion",
    "Engine",
    "LikelihoodScorer",
    "LocalEngine",
    "MajorityVote",
    "ProcessScorer",
    "RemoteEngine",
    "RewardScorer",
    "SamplingParams",
    "Scorer",
    "Scores",
    "SearchResult",
    "SelfConsistency",
    "Strategy",
    "TextScorer",
    "VerifierScorer",
    "WeightedScorer",
    "build_scorer",
    "build_strategy",
    "derive_seed",
    "generate",
]
