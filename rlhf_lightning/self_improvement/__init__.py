"""Self-improvement: candidates are accepted by a paired test, or rejected; adversarial validation."""

from .corruption import PerturbedPrompt, corrupted_twin
from .findings import Finding, ModelCheck, Validation
from .gate import CapabilityCriteria, Decision, decide
from .pair_classifier import LabelledPair, PairClassifierOptions, train_pair_classifier
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
    "Robustness",
    "Validation",
    "Verdicts",
    "corrupted_twin",
    "decide",
    "train_pair_classifier",
]
