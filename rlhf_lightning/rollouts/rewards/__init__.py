"""Reward functions: ``fn(prompts, completions, **columns) -> one number or None per completion``."""

from .code_tests import CodeTestsReward
from .constitution import ConstitutionReward, Principle
from .judges import EngineJudge, ModelJudge
from .length import LengthReward, SoftOverlongReward
from .math_answer import MathAnswerReward
from .repetition import RepetitionReward
from .reward_set import RewardFunction, RewardScores, RewardSet, StepReward, resolve_reward
from .text_format import FormatReward

__all__ = [
    "CodeTestsReward",
    "ConstitutionReward",
    "EngineJudge",
    "FormatReward",
    "LengthReward",
    "MathAnswerReward",
    "ModelJudge",
    "Principle",
    "RepetitionReward",
    "RewardFunction",
    "RewardScores",
    "RewardSet",
    "SoftOverlongReward",
    "StepReward",
    "resolve_reward",
]
