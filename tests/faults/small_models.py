"""Every type of causal language model that transformers has, as small as its config lets it be."""

from __future__ import annotations

import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
# More than the probe's sequences have, fewer than the compared ones: a window that only the latter show.
REACH = 20
_MOST_PARAMETERS = 3_000_000

# Sizes by what their names look like; the first rule that fits counts.
_RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size$|^vocab_size", VOCAB),
    (r"pad_token_id|bos_token_id|eos_token_id|token_id", 1),
    (r"(sliding_window|window_size|attention_window|keep_window_size|attention_chunk_size|index_topk)$", REACH),
    (r"max_position|n_positions|max_seq_len|max_sequence_length|seq_length|n_ctx", 128),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups|multi_query_group_num)$", 2),
    (r"(num_.*attention_heads|n_head|num_heads|n_heads|attention_heads)$", 4),
    (r"(num_.*layers|n_layer|n_layers|decoder_layers|encoder_layers|num_blocks|depth)$", 2),
    (r"(num_experts_per_tok|moe_topk|top_k|moe_k|num_experts_per_token|num_selected_experts)$", 2),
    (r"(n_group|topk_group|num_expert_group)$", 1),
    (r"(num_.*experts|n_routed_experts|moe_num_experts|num_local_experts|n_shared_experts)$", 4),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|head_dim|d_head|index_head_dim|rotary_dim|d_kv)$", 8),
    (r"(q_lora_rank|kv_lora_rank|lora_rank|latent_size|.*_rank)$", 8),
    (r"(state_size|ssm_state_size|mamba_d_state|d_state)$", 4),
    (r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|model_dim|hidden_dim|word_embed_proj_dim)$", 32),
    (r"(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|decoder_ffn_dim|encoder_ffn_dim|ffn_size|d_inner)$", 48),
)

# Sizes that no rule gives: numbers that have to fit one another, or that a config leaves open.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}

# Types that cannot be made small enough, or whose class the library itself cannot build from a small config.
UNBUILT = frozenset(
    {
        "blt",  # 96 million parameters at the least
        "cohere_compass_text",
        "dbrx",
        "dots3_note",
        "gemma3n",  # needs timm
        "gemma4_assistant",  # drafts for another model
        "gemma4_unified_assistant",
        "musicgen",  # continue sound
        "musicgen_melody",
        "reformer",  # reads rows of one length
    }
)


class TooLong(BaseException):
    """A model took longer than it may."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what takes too long; a timer that runs already (a test's own limit) continues afterwards."""

    def stop(*_: Any) -> None:
        raise TooLong

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 0.01))


def all_types() -> list[str]:
    """Types of causal language models, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _small(values: dict[str, Any], nested: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if nested and isinstance(value, dict) and name.endswith("_config"):
            found[name] = _small(value, nested=False)
        elif ("dropout" in name and isinstance(value, float)) or re.search(r"(pdrop|drop_rate|layerdrop)$", name):
            found[name] = type(value)(0)
        elif name in ("initializer_range", "init_std"):
            found[name] = 0.2
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for rule, size in _RULES if re.search(rule, name)), None)
            if size is not None and (value > size or size in (1, VOCAB)):
                found[name] = size
    return found


def small_config(kind: str, **further: Any) -> PreTrainedConfig:
    """A config of small sizes, with windows that the sequences of a comparison pass."""
    default = AutoConfig.for_model(kind).to_dict()
    sizes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1} | _small(default)
    config = AutoConfig.for_model(
        kind, **{**sizes, **_OWN.get(kind, {}), **{k: v for k, v in further.items() if k in default}}
    )
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


# Candidates, tried one after the other until a model's sizes fit.
_FURTHER: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 8},
    {"num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 16},
)


def small_model(kind: str) -> PreTrainedModel:
    """A small random model of a type, with the attention that it has by default: eager.

    Raises:
        ValueError: it cannot be made small.
    """
    reason: Exception = ValueError(kind)
    for further in _FURTHER:
        try:
            return _built(small_config(kind, **further))
        except Exception as error:
            reason = error
    raise ValueError(f"{kind} cannot be made small: {reason}")


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"it has {size} parameters")
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        model(input_ids=torch.arange(2, 30)[None], use_cache=False)  # the sizes fit one another
    return model
