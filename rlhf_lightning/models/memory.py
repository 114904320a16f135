"""How many bytes a decoder takes on a device: weights, what training keeps of them, activations, head, and caches.

Everything is a function of a config, a precision and a few options: no model is built. ``METHODS.md`` has the formulas;
``tests/planning`` compares them with the allocations of small models.

Legend: T tokens, N scored tokens, L layers, D hidden size, F intermediate size, H heads, K key/value heads, S head
size, V vocabulary, R rank of an adapter.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from . import gpu_logprob_chunks
from .decoder_sizes import NORMED, SANDWICHED, WIDE, Blocks, Decoder, Training

# Bytes of a weight in blocks of 64 with 8-bit scales, which are in blocks of 256 with scales in single precision.
_FOUR_BITS: Final = 0.5 + 1 / 64 + 4 / (64 * 256)


def weight_bytes(decoder: Decoder, training: Training, *, frozen: bool = False) -> float:
    """Bytes of the weights, adapters included.

    Args:
        decoder: its sizes.
        training: how it is trained.
        frozen: whether nothing trains it, as a reference: its linear layers are kept in the precision of products.
    """
    size, products = training.precision
    matrix = products if frozen or _kept_in_half(training) else size
    projection = products if frozen or (training.stored and training.headless) or _kept_in_half(training) else size
    held = (_FOUR_BITS if training.four_bits else matrix) * decoder.matrices + projection * decoder.projection
    adapter = 0 if training.adapter is None else training.adapter.weights(decoder) * training.adapter_bytes
    return float(held + size * (decoder.vectors + decoder.embeddings - decoder.projection) + adapter)


def _kept_in_half(training: Training) -> bool:
    """Whether the matrices under an adapter are kept as they are multiplied."""
    return training.stored and training.adapter is not None


def trained_weights(decoder: Decoder, training: Training) -> int:
    """Number of weights that are trained."""
    if training.adapter is not None:
        return training.adapter.weights(decoder)
    return decoder.weights - (decoder.projection if training.headless else 0)


def trained_bytes(training: Training) -> int:
    """Bytes of a trained weight."""
    return training.precision.weights if training.adapter is None else training.adapter_bytes


def gradient_bytes(decoder: Decoder, training: Training, *, passes: int) -> float:
    """Bytes of the gradients while micro-batches add to them: in single precision from the second on."""
    size = trained_bytes(training)
    return float(trained_weights(decoder, training) * (max(4, size) if passes > 1 else size))


def cast_bytes(decoder: Decoder, training: Training) -> float:
    """Bytes of the copies in which autocast reads weights, made once per step and held until it ends.

    Layers that are recomputed keep none; ``activation_bytes`` has those of the layer that is. The head's copy is then
    kept from its forward to its backward.
    """
    layers = 0 if training.checkpointing else decoder.layers
    return _head_cast_bytes(decoder, training) + layers * _layer_cast_bytes(decoder, training)


def sampling_cast_bytes(decoder: Decoder, training: Training) -> float:
    """Bytes of the same copies while completions are sampled, whether or not training recomputes layers."""
    return _head_cast_bytes(decoder, training) + decoder.layers * _layer_cast_bytes(decoder, training)


def _head_cast_bytes(decoder: Decoder, training: Training) -> float:
    kept = _kept_in_half(training) and not decoder.tied
    if not training.precision.mixed or training.headless or kept:
        return 0.0
    return float(training.precision.products * decoder.vocabulary * decoder.hidden)


def _layer_cast_bytes(decoder: Decoder, training: Training) -> float:
    if not training.precision.mixed:
        return 0.0
    matrices = 0 if _kept_in_half(training) else decoder.matrices
    adapter = 0 if training.adapter is None else training.adapter.weights(decoder)
    return float(training.precision.products * (matrices + adapter) / decoder.layers)


def layer_bytes(decoder: Decoder, training: Training, tokens: float, blocks: Blocks | None = None) -> float:
    """Bytes that a decoder layer keeps of a micro-batch, from its forward to its backward.

    Args:
        decoder: its sizes.
        training: how it is trained.
        tokens: T.
        blocks: the blocks of ``attention: blocks``; without padding and masks by default.
    """
    norms = _norm_bytes(decoder, training)
    heads = _head_norm_bytes(decoder, training)
    per_token = norms + heads + _linear_bytes(decoder, training)
    return per_token * tokens + _attention_bytes(decoder, training, tokens, blocks)


def _norm_bytes(decoder: Decoder, training: Training) -> float:
    """Bytes of a token in a layer's norms.

    The input in single precision and the root of its mean square, and the normalised input where a weight is trained
    that multiplies it.
    """
    count = 4 if SANDWICHED in decoder.traits else 2
    wide = 4 if WIDE in decoder.traits else training.precision.weights
    scaled = wide if training.adapter is None else 0
    return count * (decoder.hidden * (4 + scaled) + 4)


def _head_norm_bytes(decoder: Decoder, training: Training) -> float:
    """The same of norms of queries and keys."""
    if NORMED not in decoder.traits:
        return 0.0
    wide = 4 if WIDE in decoder.traits else training.precision.products
    scaled = wide if training.adapter is None else 0
    return (decoder.queries + decoder.keys) * (4 + scaled) + 4.0 * (decoder.heads + decoder.kv_heads)


def _linear_bytes(decoder: Decoder, training: Training) -> float:
    """Bytes of a token in a layer's linear layers: their inputs, and three results in the MLP.

    The output of attention, an input as well, belongs to attention.
    """
    precision, adapter = training.precision, training.adapter
    wide = {linear.name: linear for linear in decoder.linears}["down_proj"].inputs
    kept = 3.0 * wide * precision.products  # the gate, its activation, and the other factor
    shared: dict[str, float] = {}
    for linear in decoder.linears:
        if adapter is not None and linear.name not in adapter.targets:
            continue  # a frozen matrix needs no input
        source = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(linear.name, linear.name)
        if adapter is not None and precision.weights == 2:
            kept += 4 * linear.inputs  # each adapter reads a copy in single precision
        elif linear.name == "o_proj":
            pass
        elif precision.mixed and linear.name != "down_proj":
            kept += precision.products * linear.inputs  # each casts its own
        else:
            shared[source] = precision.products * linear.inputs
    if adapter is not None:
        size = precision.products if precision.mixed else training.adapter_bytes
        kept += size * adapter.rank * sum(linear.name in adapter.targets for linear in decoder.linears)
    return kept + sum(shared.values())


def _attention_bytes(decoder: Decoder, training: Training, tokens: float, blocks: Blocks | None) -> float:
    size = training.precision.products
    if training.attention == "cascade":
        return tokens * (size * (2 * decoder.queries + 2 * decoder.keys) + 4 * decoder.heads)
    blocks = Blocks(tokens, tokens) if blocks is None else blocks
    # Queries, results and their log-sum-exp; keys and values for every head; results in the order of tokens, if a
    # product keeps them.
    read = training.adapter is None or "o_proj" in training.adapter.targets
    kept = blocks.queries * (2 * size * decoder.queries + 4 * decoder.heads)
    kept += blocks.keys * 2 * size * decoder.queries + (tokens * size * decoder.queries if read else 0)
    return kept + blocks.masked * size


class Activations(NamedTuple):
    """Bytes of a micro-batch's activations.

    Args:
        layers: kept from forward to backward by all layers.
        ends: kept besides them: rotary angles, the last norm, and what the head reads.
        recomputed: of one layer, in a backward that recomputes it, with its rounded weights.
    """

    layers: float
    ends: float
    recomputed: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.ends + self.recomputed


def activation_bytes(
    decoder: Decoder, training: Training, tokens: float, *, scored: float | None = None, blocks: Blocks | None = None
) -> Activations:
    """Bytes that a forward keeps for its backward, without weights.

    Args:
        decoder: its sizes.
        training: how it is trained.
        tokens: T.
        scored: N, the rows that the head reads; all tokens by default.
        blocks: see ``layer_bytes``.
    """
    precision, scored = training.precision, tokens if scored is None else scored
    layer = layer_bytes(decoder, training, tokens, blocks)
    wide = 4 if WIDE in decoder.traits else precision.weights
    scaled = wide if training.adapter is None else 0
    ends = tokens * (
        2 * decoder.rotary_sets * decoder.head_size * precision.weights + decoder.hidden * (4 + scaled) + 4
    )
    ends += scored * decoder.hidden * precision.products
    if training.checkpointing:
        inputs = decoder.layers * tokens * decoder.hidden * precision.weights
        # The input of the first norm is that of the layer, where both are in single precision.
        again = layer - (tokens * 4 * decoder.hidden if precision.weights == 4 else 0)
        return Activations(inputs, ends, again + _layer_cast_bytes(decoder, training))
    layers = decoder.layers * layer
    if training.adapter is not None:
        layers -= tokens * (4 * decoder.hidden + 4)  # the first norm's input does not depend on what is trained
    return Activations(layers, ends, 0.0)


def head_bytes(decoder: Decoder, training: Training, scored: float, *, entropy: bool = False) -> float:
    """Bytes that the fused head takes on a GPU while it runs: a chunk of logits, and sums of gradients.

    Args:
        decoder: its sizes.
        training: how it is trained.
        scored: N.
        entropy: whether the entropy is computed.
    """
    size = training.precision.products
    rows = min(scored, max(1, gpu_logprob_chunks.CHUNK_BYTES // (4 * decoder.vocabulary)))
    # Logits, or their exponentials; the same again for the entropy, or rounded for products.
    chunk = 4 + max(4 if entropy else 0, size if size < 4 else 0)
    rounded = size if size < 4 else 0  # gradients are returned in the precision of the products
    sums = scored * decoder.hidden
    sums += decoder.vocabulary * decoder.hidden if training.adapter is None else 0
    return float(rows * decoder.vocabulary * chunk + sums * (4 + rounded))


def backward_bytes(decoder: Decoder, training: Training, tokens: float) -> float:
    """Bytes of gradients in flight in the backward of a layer: of its states and of the MLP's, and of one matrix."""
    precision = training.precision
    wide = max(linear.outputs for linear in decoder.linears)
    states = tokens * (2 * decoder.hidden * precision.weights + 3 * wide * precision.products)
    largest = max(linear.matrix for linear in decoder.linears) if training.adapter is None else 0
    return float(states + largest * (precision.products + (precision.weights if precision.mixed else 0)))


def cache_bytes(decoder: Decoder, tokens: float, *, size: int, kind: str = "dynamic") -> float:
    """Bytes of keys and values in rollouts.

    Args:
        decoder: its sizes.
        tokens: places for tokens, such as ``generation_batch_tokens``.
        size: bytes of a number.
        kind: the engine's cache; ``int8`` takes a byte and a scale of two bytes for every 32 numbers.
    """
    numbers = 2.0 * decoder.layers * decoder.keys * tokens
    if kind != "int8":
        return numbers * size
    group = 32 if decoder.head_size % 32 == 0 else decoder.head_size
    return numbers * (1 + 2 / group)
