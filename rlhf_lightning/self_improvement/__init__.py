"""Self-improvement: rows of a model's own scored samples, refinement, self-play, a gate and validators."""

from __future__ import annotations

from .challenger import agreement, challenge_rows, challenges, frontier, new_prompts
from .corruption import PerturbedPrompt, corrupted_twin
from .findings import Finding, ModelCheck, Validation
from .gate import CapabilityCriteria, Decision, decide, overruled
from .mixing import mix_rows
from .pair_classifier import LabelledPair, PairClassifierOptions, train_pair_classifier
from .refine import Refine, Refinement, refine
from .replay import RowReplay
from .row_makers import (
    demonstrations,
    hinted_rows,
    preference_pairs,
    scored_rows,
    spin_pairs,
    unpaired_rows,
    without_hints,
)
from .samples import Sample, ScoredPrompt, model_hash, sample_prompts
from .scorers import load_scorer
from .self_play import elo_ratings, expected_score, games_of, league_weights, win_rates
from .task_checks import Consistency, Robustness, Verdicts
from .trained_checks import Discriminator, FlawDetector
from .validators import AdversarialValidator

__all__ = [
    "AdversarialValidator",
    "CapabilityCriteria",
    "Consistency",
    "Decision",
    "Discriminator",
    "Finding",
    "FlawDetector",
    "LabelledPair",
    "ModelCheck",
    "PairClassifierOptions",
    "PerturbedPrompt",
    "Refine",
    "Refinement",
    "Robustness",
    "RowReplay",
    "Sample",
    "ScoredPrompt",
    "Validation",
    "Verdicts",
    "agreement",
    "challenge_rows",
    "challenges",
    "corrupted_twin",
    "decide",
    "demonstrations",
    "elo_ratings",
    "expected_score",
    "frontier",
    "games_of",
    "hinted_rows",
    "league_weights",
    "load_scorer",
    "mix_rows",
    "model_hash",
    "new_prompts",
    "overruled",
    "preference_pairs",
    "refine",
    "sample_prompts",
    "scored_rows",
    "spin_pairs",
    "train_pair_classifier",
    "unpaired_rows",
    "win_rates",
    "without_hints",
]
