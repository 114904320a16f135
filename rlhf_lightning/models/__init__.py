"""Models: loading and export, decoders over packed batches, the fused head, reward models, reference policies."""

from .backbone import (
    HiddenStates,
    base_model,
    decoder_of,
    evaluating,
    hidden_states,
    num_positions,
    token_stats,
)
from .compressed_context import CompressedContext, Compressor, context_states
from .compressor_options import CompressorOptions
from .context_compressor import ContextCompressor
from .fused_head import OutputHead, TokenStats, fused_logprobs, output_head
from .layout import resolve_layout
from .loading import load_adapted_lm, load_adapted_tokenizer, load_causal_lm, load_tokenizer
from .process_reward_model import ProcessRewardModel
from .process_reward_options import ProcessRewardModelOptions
from .reference import AdapterReference, FrozenReference, Reference, folder_fingerprint
from .reward_model import RewardModel, RewardModelOptions
from .saving import save_pretrained

__all__ = [
    "AdapterReference",
    "CompressedContext",
    "Compressor",
    "CompressorOptions",
    "ContextCompressor",
    "FrozenReference",
    "HiddenStates",
    "OutputHead",
    "ProcessRewardModel",
    "ProcessRewardModelOptions",
    "Reference",
    "RewardModel",
    "RewardModelOptions",
    "TokenStats",
    "base_model",
    "context_states",
    "decoder_of",
    "evaluating",
    "folder_fingerprint",
    "fused_logprobs",
    "hidden_states",
    "load_adapted_lm",
    "load_adapted_tokenizer",
    "load_causal_lm",
    "load_tokenizer",
    "num_positions",
    "output_head",
    "resolve_layout",
    "save_pretrained",
    "token_stats",
]
