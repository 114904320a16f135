"""Models: loading and export, running a decoder over packed batches, the fused log-prob head, reference policies."""

from .backbone import (
    HiddenStates,
    base_model,
    decoder_of,
    evaluating,
    hidden_states,
    num_positions,
    token_stats,
)
from .fused_head import OutputHead, TokenStats, fused_logprobs, output_head
from .layout import resolve_layout
from .loading import load_causal_lm, load_tokenizer
from .reference import AdapterReference, FrozenReference, Reference, folder_fingerprint
from .saving import save_pretrained

__all__ = [
    "AdapterReference",
    "FrozenReference",
    "HiddenStates",
    "OutputHead",
    "Reference",
    "TokenStats",
    "base_model",
    "decoder_of",
    "evaluating",
    "folder_fingerprint",
    "fused_logprobs",
    "hidden_states",
    "load_causal_lm",
    "load_tokenizer",
    "num_positions",
    "output_head",
    "resolve_layout",
    "save_pretrained",
    "token_stats",
]
