"""Sequences: rows as token trees, packed batches of them, micro-batch planning, and the attention that they need."""

from .attention import ATTENTION_NAME, TreeGeometry, gather_rows, register_attention, tree_attention
from .batch import PaddedBatch, SequenceBatch, pack
from .example import Example, ExampleBatch, Segment
from .flex import FLEX_ATTENTION_NAME, register_flex_attention
from .planning import example_cost, plan_micro_batches

__all__ = [
    "ATTENTION_NAME",
    "FLEX_ATTENTION_NAME",
    "Example",
    "ExampleBatch",
    "PaddedBatch",
    "Segment",
    "SequenceBatch",
    "TreeGeometry",
    "example_cost",
    "gather_rows",
    "pack",
    "plan_micro_batches",
    "register_attention",
    "register_flex_attention",
    "tree_attention",
]
