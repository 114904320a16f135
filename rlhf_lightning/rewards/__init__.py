"""Reward functions: ``fn(prompts, completions, **columns) -> one number or None per completion``."""

from ._called_reward import PartedScore, RewardFunction, StepReward
from .answer_only import AnswerOnlyReward
from .code_tests import CodeTestsReward
from .constitution import ConstitutionReward, Principle
from .exact_answer import exact_answer
from .exact_text import exact_text
from .format import FormatReward
from .instructions import InstructionReward
from .judge_panel import JudgePanel
from .judges import EngineJudge, ModelJudge
from .learned import ProcessModelReward, ProcessModelSteps, RewardModelReward
from .length import LengthReward, SoftOverlongReward
from .math_answer import MathAnswerReward
from .repetition import RepetitionReward
from .reward_set import RewardScores, RewardSet, resolve_reward
from .safety import SAFETY_PATTERNS, SafetyReward
from .static_checks import StaticCodeChecks

__all__ = [
    "SAFETY_PATTERNS",
    "AnswerOnlyReward",
    "CodeTestsReward",
    "ConstitutionReward",
    "EngineJudge",
    "FormatReward",
    "InstructionReward",
    "JudgePanel",
    "LengthReward",
    "MathAnswerReward",
    "ModelJudge",
    "PartedScore",
    "Principle",
    "ProcessModelReward",
    "ProcessModelSteps",
    "RepetitionReward",
    "RewardFunction",
    "RewardModelReward",
    "RewardScores",
    "RewardSet",
    "SafetyReward",
    "SoftOverlongReward",
    "StaticCodeChecks",
    "StepReward",
    "exact_answer",
    "exact_text",
    "resolve_reward",
]
