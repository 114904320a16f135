"""A model's config as the metadata of a GGUF file, and back.

Legend of the table: key without the architecture, attribute of the config, kind of the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig

# Families by the model_type of transformers, with the architecture's name in the format. Mistral's layers are Llama's.
ARCHITECTURES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
_COMMON: Final = (
    ("embedding_length", "hidden_size", int),
    ("block_count", "num_hidden_layers", int),
    ("feed_forward_length", "intermediate_size", int),
    ("attention.head_count", "num_attention_heads", int),
    ("attention.head_count_kv", "num_key_value_heads", int),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    ("vocab_size", "vocab_size", int),
)
_GEMMA2: Final = (
    ("attn_logit_softcapping", "attn_logit_softcapping", float),
    ("final_logit_softcapping", "final_logit_softcapping", float),
    ("attention.sliding_window", "sliding_window", int),
)
# The frequencies of rotary positions, as divisors of the default ones.
ROPE_FACTORS: Final = "rope_freqs.weight"
_WITH_FACTORS: Final = ("llama3",)
# Layers of the one Gemma 2 whose scores are scaled by another size than its heads'.
_GEMMA2_27B: Final = 46


def rope_of(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Returns the options of rotary positions."""
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return given


def check_config(config: PreTrainedConfig) -> str:
    """Returns the architecture's name in the format.

    Raises:
        ValueError: the format has no place for the model.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type is {kind!r}; GGUF files are written of {', '.join(ARCHITECTURES)}")
    if getattr(config, "quantization_config", None):
        raise ValueError("the weights are quantised: export the model that they were made from")
    rope = rope_of(config)
    allowed = ("default", *_WITH_FACTORS)
    if rope.get("rope_type", "default") not in allowed:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; GGUF files are written of models with {', '.join(allowed)} positions"
        )
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; it must be 1")
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"use_sliding_window is true, which {kind} cannot have in a GGUF file: its window would be lost"
        )
    return ARCHITECTURES[kind]


def head_size(config: PreTrainedConfig) -> int:
    """Returns the size of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def needs_factors(config: PreTrainedConfig) -> bool:
    """Tells whether rotary frequencies are written as a tensor."""
    return rope_of(config).get("rope_type", "default") in _WITH_FACTORS


def write_config(writer: Any, config: PreTrainedConfig, architecture: str) -> None:
    """Writes a config as metadata.

    Args:
        writer: a ``gguf.GGUFWriter``.
        config: of the model.
        architecture: its name in the format.
    """

    def add(key: str, value: Any, kind: type) -> None:
        name = f"{architecture}.{key}"
        writer.add_uint32(name, int(value)) if kind is int else writer.add_float32(name, float(value))

    for key, attribute, kind in (*_COMMON, *(_GEMMA2 if architecture == "gemma2" else ())):
        value = getattr(config, attribute, None)
        if value is not None:
            add(key, value, kind)
    add("context_length", context_length(config), int)
    size = head_size(config)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        add(key, size, int)
    add("rope.freq_base", rope_of(config).get("rope_theta", 10000.0), float)


def context_length(config: PreTrainedConfig) -> int:
    """Returns the positions that a file can promise: within a window of all layers, where the model has one."""
    window = getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))


def read_config(metadata: Mapping[str, Any], tensors: Sequence[str]) -> PreTrainedConfig:
    """Builds the config that a file describes, from nothing but the file.

    Args:
        metadata: all keys with their values.
        tensors: names of the tensors.
    """
    architecture = str(metadata["general.architecture"])

    def value(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    given: dict[str, Any] = {attribute: value(key) for key, attribute, _ in _COMMON}
    given |= {
        "max_position_embeddings": value("context_length"),
        "head_dim": value("attention.key_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("rope.freq_base")},
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
    }
    if architecture == "gemma2":
        # Absent means none, whatever a config's default is.
        given |= {attribute: value(key) for key, attribute, _ in _GEMMA2}
        large = given["num_hidden_layers"] == _GEMMA2_27B
        scale = given["hidden_size"] // given["num_attention_heads"] if large else given["head_dim"]
        given["query_pre_attn_scalar"] = scale
    if architecture == "phi3":
        # Within the context that the file promises there is no window; other frequencies are refused when writing.
        given |= {"sliding_window": None, "original_max_position_embeddings": value("context_length")}
        del given["head_dim"]
    return AutoConfig.for_model(architecture, **given)
