"""Runs a decoder over a SequenceBatch and reads hidden states at chosen positions, in either layout.

``packed`` runs the forest as one row through the registered attention; ``padded`` runs the same sequences as rows of a
padded matrix. ``layout.py`` decides in which of them a model can run.

Legend: T tokens in the forest, S sequences, L padded length, R positions read, N scored tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..sequences import Example, SequenceBatch, gather_rows
from ..utils.transfer import count_index
from .fused_head import TokenStats, fused_logprobs, output_head
from .rotary import rotary_limit, steady_rotary

Layout = Literal["packed", "padded"]

# The attribute of a decoder that holds the recorder of its routers while it records; see ``routers.py``.
ROUTER_RECORDER = "_router_recorder"

# Relative disagreement above which two computations count as different, per dtype.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}

# Rows that the check of the output projection reads, and the standard deviation of their logits.
_CHECKED_ROWS, _CHECKED_LOGITS = 4, 20.0


class HiddenStates(NamedTuple):
    """Holds hidden states of a batch in the layout in which they were computed.

    Args:
        states: ``(T, D)`` packed or ``(P, L, D)`` padded, after the final norm.
        start: ``(P,)`` column of each path's first token; ``None`` if packed.
    """

    states: Tensor
    start: Tensor | None

    def read(self, flat_index: Tensor, path_number: Tensor, depth: Tensor) -> Tensor:
        """Reads ``(R, D)`` states.

        Args:
            flat_index: ``(R,)`` positions in the forest.
            path_number: ``(R,)`` the paths that the positions belong to.
            depth: ``(R,)`` the positions along these paths.
        """
        if self.start is None:
            return gather_rows(self.states, flat_index)
        # Padded: skip the padding on the left of the row.
        columns = depth + self.start[path_number]
        flat = self.states.flatten(0, 1)
        return gather_rows(flat, path_number * self.states.shape[1] + columns)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside a PEFT model (its adapters stay in place), or the model itself."""
    wrapped: Any = model
    base: PreTrainedModel = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    return base


def decoder_of(model: nn.Module) -> nn.Module:
    """Returns the decoder that yields hidden states, without its output projection."""
    base: Any = base_model(model)
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
    inner: nn.Module = base.base_model
    # transformers returns any attribute called decoder, which is the output projection in ModernBERT.
    named_so = decoder is None or decoder is base or decoder is base.get_output_embeddings()
    found: nn.Module = inner if named_so else decoder
    if found is base:  # a class that names no decoder (Llama 4): take the first model that it holds
        found = next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)
    return found


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a decoder: its ``ModuleList`` with the most parameters."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    # Decoders may have other lists, such as those of a vision tower.
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def hidden_states(
    model: nn.Module, batch: SequenceBatch, layout: Layout, *, embeds_slots: bool = False
) -> HiddenStates:
    """Runs the decoder over a batch.

    Args:
        model: a causal language model, or one wrapped by PEFT.
        batch: the sequences.
        layout: ``packed`` or ``padded``.
        embeds_slots: whether the model embeds the slots of a packed batch, as a ``ContextCompressor`` lets it.

    Raises:
        ValueError: the batch has slots, and the layout is padded or the model does not embed them; or its trees follow
            contexts, and the layout is padded or there are no states of these.
    """
    if batch.slots is not None and (layout == "padded" or not embeds_slots):
        raise ValueError("the batch has slots, whose embeddings a ContextCompressor has: run its token_stats, packed")
    if batch.contexts and (layout == "padded" or batch.geometry.prior is None):
        raise ValueError("the batch follows compressed contexts: run token_stats of a module with compressor, packed")
    decoder = decoder_of(model)
    recorder = getattr(decoder, ROUTER_RECORDER, None)
    options: dict[str, Any] = {} if recorder is None else {"output_router_logits": True}
    if layout == "padded":
        padded = batch.padded()
        # Some decoders compute positions themselves and take none.
        if "position_ids" in decoder.forward.__code__.co_varnames or hasattr(decoder.forward, "__wrapped__"):
            options["position_ids"] = padded.position_ids
        output = decoder(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False, **options)
        hidden = HiddenStates(output.last_hidden_state, padded.start)
    else:
        output = decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # A mask with four dimensions passes through mask creation untouched; the registered attention does not
            # read it.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device),
            tree=batch.geometry,
            use_cache=False,
            **options,
        )
        hidden = HiddenStates(output.last_hidden_state[0], None)
    if recorder is not None:
        # A token counts as often as paths run through it, padding not at all.
        paths = count_index(batch.path_index, batch.num_tokens)
        if batch.geometry.prior is not None:
            paths = paths.index_fill(0, batch.geometry.prior.index, 0)
        recorder.add(output.router_logits, padded.attention_mask.flatten() if layout == "padded" else paths)
    return hidden


def token_stats(
    model: nn.Module,
    batch: SequenceBatch,
    layout: Layout,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    mean: bool = False,
    power: bool = False,
    embeds_slots: bool = False,
) -> TokenStats:
    """Computes log-probabilities of every scored token of a batch; projects only positions that a loss reads.

    Args:
        model: a causal language model, or one wrapped by PEFT.
        batch: the sequences.
        layout: how to run them.
        temperature: see ``fused_logprobs``.
        entropy: see ``fused_logprobs``.
        mean: see ``fused_logprobs``.
        power: see ``fused_logprobs``.
        embeds_slots: see ``hidden_states``.

    Returns:
        TokenStats of ``(N,)`` tensors, in the order of ``batch.target_ids``.
    """
    hidden = hidden_states(model, batch, layout, embeds_slots=embeds_slots)
    return scored_stats(model, batch, hidden, temperature=temperature, entropy=entropy, mean=mean, power=power)


def scored_stats(model: nn.Module, batch: SequenceBatch, hidden: HiddenStates, **options: Any) -> TokenStats:
    """Computes log-probabilities of every scored token from the hidden states of a batch.

    Args:
        model: the model that computed them.
        batch: the sequences.
        hidden: their states.
        options: see ``fused_logprobs``.
    """
    read, target_ids, which = [batch.source_index, batch.source_path, batch.source_depth], batch.target_ids, None
    if batch.distinct is not None and hidden.start is None:
        # Tokens that several sequences share are projected once.
        chosen, which = batch.distinct
        read, target_ids = [index[chosen] for index in read], target_ids[chosen]
    stats = fused_logprobs(hidden.read(*read), output_head(model), target_ids, **options)
    return stats if which is None else TokenStats(*(values[which] for values in stats))


def num_positions(model: nn.Module) -> int | None:
    """Returns the number of positions of a model, or of the rotary frequencies it runs with; ``None`` if unknown."""
    base = base_model(model)
    limit = rotary_limit(base)
    return positions_of(base.config) if limit is None else limit


def positions_of(config: Any) -> int | None:
    """Returns the number of positions that a model's config states; ``None`` if it states none."""
    config = config.get_text_config()
    if getattr(config, "model_type", "") in {"gpt2", "opt", "gpt_neo", "gptj", "codegen", "biogpt", "xglm"}:
        return int(getattr(config, "n_positions", None) or config.max_position_embeddings)
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def check_lengths(positions: int | None, sequences: Mapping[int, Sequence[int]]) -> None:
    """Refuses rows with more tokens than a model has positions.

    Args:
        positions: of the model; ``None`` for any number.
        sequences: tokens by number.

    Raises:
        ValueError: naming the first.

    Example:
        >>> check_lengths(4, {0: [5, 6], 1: [5, 6, 7, 8, 9]})
        Traceback (most recent call last):
        ValueError: sequence 1 of rows has 5 tokens, and the model 4 positions: shorten or remove it
    """
    for number, tokens in sequences.items():
        if positions is not None and len(tokens) > positions:
            raise ValueError(
                f"sequence {number} of rows has {len(tokens)} tokens, and the model {positions} positions: shorten or "
                "remove it"
            )


def check_fits(model: nn.Module, examples: Sequence[Example]) -> None:
    """Checks that examples fit a model's positions and vocabulary.

    Raises:
        ValueError: with the row, what is wrong with it, and what to do.
    """
    positions = num_positions(model)
    embeddings: Any = base_model(model).get_input_embeddings()
    vocab_size = int(embeddings.weight.shape[0])
    for example in examples:
        before, after = example.root.first_position, example.root.after
        for path in example.root.paths():
            length = sum(len(segment.tokens) for segment in path) + before
            if positions is not None and length > positions:
                advice = f"set the datamodule's max_length to {positions} or less" if not before else "cut its context"
                raise ValueError(
                    f"row {example.row_id} has {length} tokens, the model has {positions} positions: {advice}"
                )
            runs = [segment.tokens for segment in path] + ([] if after is None else [after.tokens])
            ends = [int(end) for tokens in runs for end in (tokens.min(), tokens.max())]
            if min(ends) < 0 or max(ends) >= vocab_size:
                wrong = min(ends) if min(ends) < 0 else max(ends)
                raise ValueError(
                    f"row {example.row_id} has token {wrong}, the model's vocabulary has {vocab_size}: the "
                    "tokenizer is not this model's"
                )


def fix_rotary_frequencies(model: nn.Module, *, longest: int | None = None, head: bool = True) -> None:
    """Prepares a model for its first forward: fixes its rotary frequencies and checks its output projection.

    Args:
        model: the model, before it is sharded or copied.
        longest: maximum length of a sequence, as for ``steady_rotary``.
        head: whether its logits are used, so that ``check_output_head`` must pass.

    Raises:
        ValueError: the fused head does not compute the model's logits.
    """
    steady_rotary(base_model(model), longest)
    if head:
        check_output_head(model)


def check_output_head(model: nn.Module) -> None:
    """Checks that the fused head computes the same logits from hidden states as the model's own forward.

    The model's forward is given hidden states instead of its decoder's; no layer runs.

    Args:
        model: a causal language model, or one wrapped by PEFT; meta or sharded weights are not checked.

    Raises:
        ValueError: its logits differ from the fused head's.
    """
    base, head = base_model(model), output_head(model)
    # Without values, or in shards, nothing can be computed here.
    if head.weight.is_meta or isinstance(head.weight, DTensor):
        return

    # Drawn on the CPU, whatever the default device is: a generator works on its own device only.
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn((_CHECKED_ROWS, head.weight.shape[1]), generator=generator, device="cpu", dtype=torch.float32)
    hidden = drawn.to(device=head.weight.device, dtype=head.weight.dtype)
    with evaluating(model), torch.no_grad():
        # Logits large enough that a soft cap would change them.
        hidden = hidden * (_CHECKED_LOGITS / (head.weight[:4096].float() @ hidden.float().T).std().clamp_min(1e-3))
        name = type(base).__name__
        try:
            found = head.logits(hidden.to(head.weight.dtype)).float()
            expected, between = _own_logits(base, hidden)
        except (TypeError, LookupError, AttributeError, RuntimeError) as error:
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{name} cannot be trained here: what it does with its decoder's hidden states is not known ({said})"
            ) from error

    # Another number of logits, another layer in between, or another scale: each is told apart for the message.
    if found.shape != expected.shape:
        raise ValueError(
            f"{name} gives {expected.shape[-1]} logits and has an output projection of {found.shape[-1]} rows: it is "
            "none of the models that can be trained here"
        )
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if difference <= TOLERANCE.get(head.weight.dtype, 6e-2):
        return
    if between:
        raise ValueError(
            f"{name} passes its decoder's hidden states through {between[0]!r} before its output projection, and the "
            "fused head reads them as they are: use another model"
        )
    raise ValueError(
        f"the logits of {name} are not its output projection with the scale {head.scale:g} and the soft cap "
        f"{head.softcap} (they differ by {difference:.1e}): the fused head does not know what this model does "
        "with its hidden states; use another model"
    )


class _Given(BaseModelOutputWithPast):
    """Stands in for a decoder's output when the output projection is run; absent fields are None."""

    def __getattr__(self, name: str) -> None:
        """Returns None for fields that were not given, such as router logits."""
        if name.startswith("__"):
            raise AttributeError(name)


def _own_logits(base: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, list[str]]:
    """Returns the logits of a model's own forward from hidden states ``(R, D)``, and the layers that they pass.

    Layers are modules with weights, without the decoder and the output projection.
    """
    decoder, projection = decoder_of(base), base.get_output_embeddings()
    known = {*decoder.modules(), *(projection.modules() if projection is not None else ())}
    passed: list[str] = []
    with ExitStack() as stack:
        for name, module in base.named_modules():
            # Layers with weights outside of decoder and projection: the fused head would skip them.
            if next(module.parameters(), None) is not None and not known & set(module.modules()):
                stack.callback(module.register_forward_pre_hook(lambda *_, name=name: passed.append(name)).remove)
        logits: Tensor = own_output(base, hidden).logits
    return logits[0].float(), passed


def own_output(base: PreTrainedModel, hidden: Tensor, **given: Any) -> Any:
    """Runs a model's own forward on given hidden states ``(R, D)`` and other outputs of a decoder.

    Args:
        base: the model; no layer of it runs.
        hidden: replaces the decoder's output. With ``given``, they are also the logits, and no weight is read.
        given: other outputs of the decoder, requested by ``output_<name>=True``.
    """
    # The decoder is replaced by one that returns the given states, so that the rest of the forward is the model's own.
    output = _Given(last_hidden_state=hidden[None])
    replaced: list[tuple[nn.Module, Any]] = [(decoder_of(base), lambda *args, **kwargs: output)]
    # Logits are not asked for: skip the projection.
    if given:
        replaced.append((base.get_output_embeddings(), lambda states: states))
    for name, value in given.items():
        output[name] = value
    ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    before = [module.__dict__.get("forward") for module, _ in replaced]
    for module, forward in replaced:
        module.forward = forward
    try:
        return base(input_ids=ids, use_cache=False, **{f"output_{name}": True for name in given})
    finally:
        for (module, _), forward in zip(replaced, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Puts a model in evaluation mode within the context and then restores every module's own mode."""
    return _Evaluating(model)


class _Evaluating(AbstractContextManager[None]):
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        for module, mode in self.modes:
            module.training = mode
