"""Reinforcement learning: on-policy rollouts, their rewards and advantages, and the base class of GRPO and PPO.

The option groups of ``GRPOModule`` and ``PPOModule`` are published here: ``from rlhf_lightning.rl import PolicyLoss``.
"""

from .advantages import RelativeAdvantage
from .policy_loss import EntropyBonus, ImportanceWeights, KLPenalty, OffPolicyCorrection, PolicyLoss, TokenEntropy
from .ppo_loss import GAE, AdaptiveKL, PPOLoss, ValueFunction
from .rollout_options import SearchRollouts, TreeRollouts
from .sampling import Sampling

__all__ = [
    "GAE",
    "AdaptiveKL",
    "EntropyBonus",
    "ImportanceWeights",
    "KLPenalty",
    "OffPolicyCorrection",
    "PPOLoss",
    "PolicyLoss",
    "RelativeAdvantage",
    "Sampling",
    "SearchRollouts",
    "TokenEntropy",
    "TreeRollouts",
    "ValueFunction",
]
