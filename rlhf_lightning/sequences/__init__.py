"""Sequences: rows as token trees, packed batches of them, micro-batch planning, and attention over packed trees."""

from .batch import PaddedBatch, SequenceBatch, pack
from .branching import grow_tree, shared_length, split_answer, unfold_tree, with_answer
from .cached_rows import CachedRows
from .example import Example, ExampleBatch, Segment, distinct_segments
from .geometry import TreeGeometry
from .micro_batch_plan import example_cost, plan_micro_batches
from .prior_context import PriorContext, PriorStates
from .summaries import Placement, Recurrence, SummaryLayout
from .tree_attention import (
    ATTENTION_KERNELS,
    ATTENTION_NAME,
    ATTENTION_NAMES,
    AttentionKernel,
    gather_rows,
    register_attention,
    tree_attention,
)

__all__ = [
    "ATTENTION_KERNELS",
    "ATTENTION_NAME",
    "ATTENTION_NAMES",
    "AttentionKernel",
    "CachedRows",
    "Example",
    "ExampleBatch",
    "PaddedBatch",
    "Placement",
    "PriorContext",
    "PriorStates",
    "Recurrence",
    "Segment",
    "SequenceBatch",
    "SummaryLayout",
    "TreeGeometry",
    "distinct_segments",
    "example_cost",
    "gather_rows",
    "grow_tree",
    "pack",
    "plan_micro_batches",
    "register_attention",
    "shared_length",
    "split_answer",
    "tree_attention",
    "unfold_tree",
    "with_answer",
]
