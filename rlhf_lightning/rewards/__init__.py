"""Reward functions: ``fn(prompts, completions, **columns) -> one number or None per completion``."""

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
from .reward_set import RewardFunction, RewardScores, RewardSet, StepReward, resolve_reward
from .static_checks import StaticCodeChecks

__all__ = [
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
    "Principle",
    "ProcessModelReward",
    "ProcessModelSteps",
    "RepetitionReward",
    "RewardFunction",
    "RewardModelReward",
    "RewardScores",
    "RewardSet",
    "SoftOverlongReward",
    "StaticCodeChecks",
    "StepReward",
    "exact_answer",
    "exact_text",
    "resolve_reward",
]
