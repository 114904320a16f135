"""The memory that a run of a method takes on one device, part by part, from its options.

Legend: T tokens of a micro-batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..core import PostTrainingModule
from ..models.decoder_sizes import PRECISIONS, Adapter, Decoder, Precision, Training
from ..models.loading import locate, read_config
from ..models.memory import (
    activation_bytes,
    backward_bytes,
    cache_bytes,
    cast_bytes,
    gradient_bytes,
    head_bytes,
    sampling_cast_bytes,
    trained_bytes,
    trained_weights,
    weight_bytes,
)
from ..modules import DPOModule, GRPOModule, KTOModule, PPOModule, ProcessRewardModule, RewardModule

_DTYPES = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a token in a batch's indices and in the losses, measured; in GRPO and PPO with their fields and statistics.
_ROW, _ROW_ON_POLICY = 200, 1000
# Options of LoRA that change neither the number of an adapter's weights nor what its layers keep.
_ALIKE = ("r", "target_modules", "lora_alpha", "lora_dropout", "task_type", "use_rslora", "init_lora_weights")


class Part(NamedTuple):
    """One line of a plan: what takes the memory, how many bytes, and the numbers that these follow from."""

    what: str
    size: float
    why: str


@dataclass(frozen=True)
class Plan:
    """Bytes on a device while a micro-batch runs, and while completions are sampled.

    Args:
        tokens: T.
        training: of the policy.
        parts: what takes memory in training.
        sampling: the same while a method samples; empty where it does not.
    """

    tokens: int
    training: Training
    parts: tuple[Part, ...]
    sampling: tuple[Part, ...] = ()

    @property
    def total(self) -> float:
        """Bytes of the larger of both."""
        return max(sum(part.size for part in parts) for parts in (self.parts, self.sampling))


def plan(
    method: type[PostTrainingModule],
    options: Mapping[str, Any],
    precision: str,
    *,
    tokens: int | None = None,
    states: int = 2,
) -> Plan:
    """Plans the memory of a method.

    Args:
        method: the class of its module.
        options: of the module, by name; missing ones have the defaults that matter here.
        precision: the trainer's, such as ``bf16-mixed``.
        tokens: T; the option ``micro_batch_tokens`` by default.
        states: numbers that the optimizer keeps for each trained weight: 2 for AdamW.

    Raises:
        ValueError: the memory of a model or an option is not known.

    Example:
        >>> from rlhf_lightning import SFTModule
        >>> found = plan(SFTModule, {"model": "configs/models/small"}, "bf16-mixed", tokens=1000)
        >>> [part.what for part in found.parts][:3]
        ['weights', 'gradients', 'optimizer']
    """
    tokens = int(options.get("micro_batch_tokens", 8192)) if tokens is None else tokens
    precision = _precision(precision)
    decoder = decoder_of(options["model"])
    training = replace(
        _training(method, options, PRECISIONS[precision]), stored=_is_stored_in(precision, options["model"])
    )
    parts = [*_trained("", decoder, training, states), *_reference(method, options, decoder, training)]
    parts += _critic(method, options, training, tokens, states, precision)
    parts += _reward_models(options, precision)
    parts += _compressor(options, decoder, training)
    sampling: tuple[Part, ...] = ()
    if issubclass(method, GRPOModule | PPOModule):
        kept = [part for part in parts if part.what != "gradients"]
        cast = Part("cast weights", sampling_cast_bytes(decoder, training), "rounded once per call of the sampler")
        sampling = (*kept, cast, _caches(options, decoder, training))
    parts += _micro_batch("", decoder, training, tokens)
    each = _ROW_ON_POLICY if issubclass(method, GRPOModule | PPOModule) else _ROW
    parts.append(Part("rows", float(each * tokens), f"{each} bytes a token: indices, and what the loss keeps"))
    # GRPO and PPO compute the entropy of every sampled token.
    parts.append(_working(decoder, training, tokens, entropy=issubclass(method, GRPOModule | PPOModule)))
    return Plan(tokens, training, tuple(parts), sampling)


def _precision(name: str) -> str:
    found = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(str(name), str(name))
    if found not in PRECISIONS:
        raise ValueError(f"the memory of precision {name!r} is not known: it is for {', '.join(PRECISIONS)}")
    return found


def _is_stored_in(precision: str, source: str) -> bool:
    """Whether the weights of a model were stored in the half precision that autocast multiplies in."""
    stored = str(read_config(locate(source, what="model")).dtype).removeprefix("torch.")
    return {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(precision) == stored


def decoder_of(source: str) -> Decoder:
    """Reads the sizes of a model.

    Args:
        source: a folder or hub id.

    Raises:
        ValueError: there is no config, or the memory of such a model is not known.
    """
    return Decoder.of(read_config(locate(source, what="model")))


def _training(method: type[PostTrainingModule], options: Mapping[str, Any], precision: Precision) -> Training:
    if options.get("layout") == "padded":
        raise ValueError("the memory of layout 'padded' depends on every batch: it is known for 'packed'")
    kernel = options.get("attention", "auto")
    if kernel == "flex":
        raise ValueError("the memory of attention 'flex' is not known: it is for auto, blocks and cascade")
    lora, quantization = options.get("lora"), options.get("quantization")
    if quantization is not None and (quantization == "int8" or precision.mixed):
        raise ValueError(
            f"the memory of quantization {quantization!r} is not known here: it is for 'nf4' and 'fp4', with precision "
            "32-true, bf16-true or 16-true"
        )
    return Training(
        precision,
        # Flash attention is for half precision.
        "cascade" if kernel != "blocks" and precision.products == 2 else "blocks",
        bool(options.get("gradient_checkpointing")),
        None if lora is None else _adapter(lora),
        quantization is not None,
        headless=issubclass(method, RewardModule | ProcessRewardModule) and options.get("head") != "tokens",
    )


def _adapter(lora: Mapping[str, Any]) -> Adapter:
    unknown = [name for name, value in lora.items() if name not in _ALIKE and value not in (None, False, "none", {})]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = lora.get("target_modules") or "all-linear"
    targets = names if targets == "all-linear" else targets
    if unknown or isinstance(targets, str) or not set(targets) <= set(names):
        wrong = f"lora's {unknown[0]!r}" if unknown else f"lora's target_modules {targets!r}"
        raise ValueError(f"the memory of {wrong} is not known: it is for r and target_modules, all-linear or {names}")
    return Adapter(int(lora.get("r", 8)), tuple(name for name in names if name in targets))


def _trained(owner: str, decoder: Decoder, training: Training, states: int) -> Iterator[Part]:
    """A model that is trained."""
    size, each = trained_weights(decoder, training), trained_bytes(training)
    held = weight_bytes(decoder, training)
    yield Part(f"{owner}weights", held, f"{decoder.weights:,} weights")
    adding = "in single precision, as micro-batches add up" if each < 4 else f"{each} bytes each"
    yield Part(f"{owner}gradients", gradient_bytes(decoder, training, passes=2), f"{size:,} trained weights, {adding}")
    yield Part(f"{owner}optimizer", float(states * size * each), f"{states} x {each} bytes for each of them")


def _micro_batch(owner: str, decoder: Decoder, training: Training, tokens: int) -> Iterator[Part]:
    """Bytes that a forward keeps for its backward."""
    found = activation_bytes(decoder, training, tokens)
    if training.precision.mixed:
        often = "rounded in each forward" if training.checkpointing else "rounded once per step"
        yield Part(f"{owner}cast weights", cast_bytes(decoder, training), often)
    if training.checkpointing:
        yield Part(f"{owner}inputs of layers", found.layers, f"{found.layers / tokens:,.0f} bytes a token")
        yield Part(f"{owner}a recomputed layer", found.recomputed, f"{found.recomputed / tokens:,.0f} bytes a token")
    else:
        yield Part(f"{owner}activations", found.layers, f"{found.layers / tokens:,.0f} bytes a token")
    yield Part(f"{owner}ends", found.ends, f"{found.ends / tokens:,.0f} bytes a token: last norm, input of the head")


def _working(decoder: Decoder, training: Training, tokens: int, *, entropy: bool) -> Part:
    """Bytes that are needed only for a while: by the head, or by a layer's backward after it."""
    head = 0.0 if training.headless else head_bytes(decoder, training, tokens, entropy=entropy)
    layer = backward_bytes(decoder, training, tokens)
    why = "logits of a chunk, gradients of the head" if head > layer else "gradients in flight in a layer"
    return Part("working memory", max(head, layer), why)


def _reference(
    method: type[PostTrainingModule], options: Mapping[str, Any], decoder: Decoder, training: Training
) -> Iterator[Part]:
    weight = {GRPOModule: options.get("beta", 0.0), PPOModule: options.get("kl_coef", 0.05)}
    always = issubclass(method, DPOModule | KTOModule)
    used = always or any(issubclass(method, kind) and value > 0 for kind, value in weight.items())
    kind = options.get("reference", "auto")
    kind = ("frozen" if training.adapter is None else "adapter") if kind == "auto" and used else kind
    if kind == "frozen" and (always or issubclass(method, GRPOModule | PPOModule)):
        held = weight_bytes(decoder, training, frozen=True)
        yield Part("reference", held, "a frozen copy of the policy, matrices as they are multiplied")
        # DPO and KTO score in the step, which holds all copies that it makes; a projection of its own needs none.
        if always and training.precision.mixed and decoder.tied and not training.checkpointing:
            projection = float(training.precision.products * decoder.vocabulary * decoder.hidden)
            yield Part("reference's projection", projection, "its embedding, rounded once per step")


def _critic(
    method: type[PostTrainingModule],
    options: Mapping[str, Any],
    training: Training,
    tokens: int,
    states: int,
    precision: str,
) -> Iterator[Part]:
    source = (options.get("value") or {}).get("model") if issubclass(method, PPOModule) else None
    if source is not None:
        critic_training = replace(training, headless=True, stored=_is_stored_in(precision, source))
        decoder = decoder_of(source)
        yield from _trained("critic's ", decoder, critic_training, states)
        yield from _micro_batch("critic's ", decoder, critic_training, tokens)


def _reward_models(options: Mapping[str, Any], precision: str) -> Iterator[Part]:
    """Learned rewards, which name a model."""
    # With dtype: auto, matrices are in bf16 where the policy is trained so.
    auto = Precision(4, 2 if precision.startswith("bf16") else 4)
    specs = [*(options.get("rewards") or ()), options.get("process_reward")]
    for spec in specs:
        given = spec.get("init_args") or {} if isinstance(spec, Mapping) else {}
        if isinstance(given.get("model"), str):
            size = _DTYPES[given.get("dtype", "auto")]
            stored = auto if size is None else Precision(size, size)
            held = weight_bytes(decoder_of(given["model"]), Training(stored), frozen=True)
            yield Part("reward model", held, f"{given['model']}, {stored.products} bytes a weight of its matrices")


def _compressor(options: Mapping[str, Any], decoder: Decoder, training: Training) -> Iterator[Part]:
    """The front of a policy, which has a model of its own."""
    if options.get("compressor") is not None:
        size = training.precision.weights
        held = weight_bytes(decoder, Training(Precision(size, size)), frozen=True)
        yield Part("compressor", held, "the frozen model whose summaries the policy sees")


def _caches(options: Mapping[str, Any], decoder: Decoder, training: Training) -> Part:
    tokens = int((options.get("sampling") or {}).get("generation_batch_tokens", 65536))
    size = training.precision.weights  # rotated keys are in the precision of the angles, and values as keys
    return Part("caches", cache_bytes(decoder, tokens, size=size), f"keys and values of {tokens:,} tokens")


def largest(make: Callable[[int], Plan], limit: float) -> int:
    """The largest number of tokens of a micro-batch whose plan takes at most some bytes; 0 if no plan fits."""
    least, most = 0, 1
    while make(most).total <= limit and most < 1 << 30:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if make(middle).total <= limit else (least, middle)
    return least
