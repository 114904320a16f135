"""Generation: engines that sample completions, strategies that search, and scorers that they search by."""

from __future__ import annotations

from .astar import AStar
from .beam import BeamSearch
from .budget import Budget
from .completion import Completion, Thought
from .dvts import DVTS
from .engine import Engine, LocalEngine
from .ensemble import EnsemblePolicy
from .generation import generate
from .hidden_reasoning import HiddenReasoning
from .kept_contexts import AttentionEviction, SinkWindow, TextSummary, Truncation
from .mcts import MCTS
from .particles import ParticleFilter
from .reasoning_rows import reasoning_rows
from .remote_engine import RemoteEngine
from .sampling import SamplingParams, derive_seed
from .scorers import ProcessScorer, RewardScorer
from .selection import BestOfN, MajorityVote, SelfConsistency
from .specs import build_scorer, build_strategy
from .strategy import Candidate, Scorer, Scores, SearchResult, Strategy
from .text_terms import JudgeScorer, LikelihoodScorer, TextScorer, VerifierScorer, WeightedScorer
from .token_beam import TokenBeamSearch
from .tree_rows import collect_demonstrations, collect_pairs, collect_steps, node_values
from .trees import Node, SearchTree
from .value_scorers import SelfCertaintyScorer, ValueScorer

__all__ = [
    "DVTS",
    "MCTS",
    "AStar",
    "AttentionEviction",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "Candidate",
    "Completion",
    "Engine",
    "EnsemblePolicy",
    "HiddenReasoning",
    "JudgeScorer",
    "LikelihoodScorer",
    "LocalEngine",
    "MajorityVote",
    "Node",
    "ParticleFilter",
    "ProcessScorer",
    "RemoteEngine",
    "RewardScorer",
    "SamplingParams",
    "Scorer",
    "Scores",
    "SearchResult",
    "SearchTree",
    "SelfCertaintyScorer",
    "SelfConsistency",
    "SinkWindow",
    "Strategy",
    "TextScorer",
    "TextSummary",
    "Thought",
    "TokenBeamSearch",
    "Truncation",
    "ValueScorer",
    "VerifierScorer",
    "WeightedScorer",
    "build_scorer",
    "build_strategy",
    "collect_demonstrations",
    "collect_pairs",
    "collect_steps",
    "derive_seed",
    "generate",
    "node_values",
    "reasoning_rows",
]
