"""The sizes of a decoder, and how it is trained, as far as memory depends on them.

Legend: L layers, D hidden size, H heads, K key/value heads, S head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

# Properties of layers that a config does not say: biases of queries, keys and values; norms of queries and keys; a norm
# after attention and MLP as well; norms that are scaled before they are rounded.
BIASED, NORMED, SANDWICHED, WIDE = "biased", "normed", "sandwiched", "wide"
_TYPES: Final[dict[str, frozenset[str]]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "qwen2": frozenset({BIASED}),
    "qwen3": frozenset({NORMED}),
    "gemma3_text": frozenset({NORMED, SANDWICHED, WIDE}),
}


class Precision(NamedTuple):
    """Bytes of numbers.

    Args:
        weights: of a weight, and of the states between layers.
        products: of what products read and write.
    """

    weights: int
    products: int

    @property
    def mixed(self) -> bool:
        """Whether weights and states are cast for products."""
        return self.weights != self.products


PRECISIONS: Final[dict[str, Precision]] = {
    "32-true": Precision(4, 4),
    "16-mixed": Precision(4, 2),
    "bf16-mixed": Precision(4, 2),
    "16-true": Precision(2, 2),
    "bf16-true": Precision(2, 2),
}


class Linear(NamedTuple):
    """A linear layer: its name, the sizes of its input and output, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def matrix(self) -> int:
        """Number of weights in its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that memory depends on.

    Args:
        layers: L.
        hidden: D.
        heads: H.
        kv_heads: K.
        head_size: S.
        vocabulary: V.
        tied: whether the output projection is the embedding.
        linears: the linear layers of a decoder layer.
        rotary_sets: sets of rotary frequencies.
        traits: what else its layers have.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]
    rotary_sets: int = 1
    traits: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """Reads the config of a causal language model.

        Raises:
            ValueError: the model is of a type whose layers are not known here.
        """
        text = config.get_text_config()
        kind = str(text.model_type)
        if kind not in _TYPES:
            raise ValueError(f"the memory of model type {kind!r} is not known: it is for {', '.join(_TYPES)}")
        traits, size = _TYPES[kind], text.hidden_size
        head_size = getattr(text, "head_dim", None) or size // text.num_attention_heads
        queries, keys = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
        bias = bool(getattr(text, "attention_bias", False))
        mlp_bias, wide = bool(getattr(text, "mlp_bias", False)), text.intermediate_size
        return cls(
            layers=text.num_hidden_layers,
            hidden=size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_size=head_size,
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
            linears=(
                Linear("q_proj", size, queries, bias or BIASED in traits),
                Linear("k_proj", size, keys, bias or BIASED in traits),
                Linear("v_proj", size, keys, bias or BIASED in traits),
                Linear("o_proj", queries, size, bias),
                Linear("gate_proj", size, wide, mlp_bias),
                Linear("up_proj", size, wide, mlp_bias),
                Linear("down_proj", wide, size, mlp_bias),
            ),
            rotary_sets=len(set(text.layer_types)) if SANDWICHED in traits else 1,
            traits=traits,
        )

    @property
    def queries(self) -> int:
        """H S."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K S."""
        return self.kv_heads * self.head_size

    @property
    def matrices(self) -> int:
        """Weights in the matrices of all layers."""
        return self.layers * sum(linear.matrix for linear in self.linears)

    @property
    def vectors(self) -> int:
        """Weights of norms and biases."""
        norms = (4 if SANDWICHED in self.traits else 2) * self.hidden
        norms += 2 * self.head_size if NORMED in self.traits else 0
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.layers * (norms + biases) + self.hidden

    @property
    def embeddings(self) -> int:
        """Weights of the embedding, and of an output projection of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def projection(self) -> int:
        """Weights of an output projection of its own."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """All weights."""
        return self.matrices + self.vectors + self.embeddings


class Adapter(NamedTuple):
    """A LoRA adapter: its rank, and the names of the linear layers that it is on."""

    rank: int
    targets: tuple[str, ...]

    def weights(self, decoder: Decoder) -> int:
        """Number of its weights."""
        adapted = [linear for linear in decoder.linears if linear.name in self.targets]
        return decoder.layers * sum(self.rank * (linear.inputs + linear.outputs) for linear in adapted)


class Blocks(NamedTuple):
    """The blocks of attention of a micro-batch: padded queries, padded keys, and pairs of them under a mask."""

    queries: float
    keys: float
    masked: float = 0.0


@dataclass(frozen=True)
class Training:
    """How a decoder is trained.

    Args:
        precision: of the trainer.
        attention: ``cascade`` keeps keys and values once; ``blocks`` keeps them padded and for every head.
        checkpointing: layers keep their inputs alone.
        adapter: what is trained; all weights without one.
        four_bits: whether the matrices of layers are in 4 bits; not with mixed precision.
        headless: whether another head replaces the output projection, which is frozen unless it is the embedding.
        stored: whether the model was stored in the precision of products, in which frozen matrices are then kept.
    """

    precision: Precision
    attention: Literal["cascade", "blocks"] = "cascade"
    checkpointing: bool = False
    adapter: Adapter | None = None
    four_bits: bool = False
    headless: bool = False
    stored: bool = False

    @property
    def adapter_bytes(self) -> int:
        """Bytes of an adapter's weight: at least single precision."""
        return max(4, self.precision.weights)
