"""Decides how a model runs: packed or padded, and with which attention.

The reference is the model's own eager attention on a small forest, one sequence at a time without padding. The packed
layout is used where it agrees; else the padded one, with the registered attention where that agrees, and with the
model's own where not. A model that agrees in no layout (one that looks ahead, say) is refused. Windows are also tried
shorter than the probe's sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from ..sequences import ATTENTION_NAME, ATTENTION_NAMES, Example, Segment, SequenceBatch, pack
from .backbone import TOLERANCE, Layout, base_model, decoder_of, evaluating, hidden_states
from .compiled_layers import is_compiled, uncompiled
from .own_attention import (
    EAGER,
    attention_of,
    distance,
    is_switchable,
    reaches,
    set_attention,
    short_reach,
    single_precision,
    using_attention,
)
from .rotary import steady_rotary

log = logging.getLogger(__name__)

# Errors of models that cannot run a layout.
_UNSUPPORTED = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


_SINGLE = 1e-5  # agreement that fp64 models can reach with their own forward


def resolve_layout(model: nn.Module, layout: Literal["auto", "packed", "padded"], *others: nn.Module) -> Layout:
    """Decides how a model runs, and sets the attention that this needs.

    Args:
        model: the model, on its device.
        layout: ``auto`` takes the first that agrees with the model's own forward, with one warning where that is not
            ``packed``; ``packed`` raises where it does not agree.
        others: models of the same kind that run in the same layout; they get the same attention.

    Raises:
        ValueError: ``packed`` was requested and does not agree, or no layout agrees with the model's own forward.
    """
    base = base_model(model)
    steady_rotary(base)
    name = type(base).__name__

    # Fastest first. Each candidate is probed against the model's own forward, since no config says whether it agrees.
    reasons: list[str] = []
    for kind, attention in _candidates(base, layout):
        reason = _why_not(model, kind, attention)
        if reason is None:
            for other in (model, *others):
                set_attention(base_model(other), attention or EAGER)

            # Padded layers are the model's own, which are not compiled: an option without effect is an error.
            if kind == "padded" and is_compiled(model):
                raise ValueError(
                    f"compile is true, and {name} runs in the padded layout ({reasons[0] if reasons else 'layout'}), "
                    "whose layers are not compiled: set compile to false"
                )
            if kind == "padded" and layout == "auto":
                log.warning("%s runs in the padded layout: %s", name, reasons[0])
            return kind

        reasons.append(reason)
        if layout == "packed":
            raise ValueError(
                f"layout is 'packed', but {name} cannot run packed: {reason}; use layout='auto' or 'padded'"
            )
    raise ValueError(f"{name} cannot be used here: {reasons[-1]}; use another model")


def _candidates(base: nn.Module, layout: str) -> list[tuple[Layout, str | None]]:
    """Lists layouts and attentions in the order in which they are tried; ``None`` is the model's own attention."""
    # The fast layout first; within a layout the attention that the user asked for, then the model's eager one.
    own = attention_of(base)
    if not is_switchable(base):
        return [("packed", own), ("padded", own)] if layout != "padded" else [("padded", own)]
    found: list[tuple[Layout, str | None]] = [("packed", own)] if layout != "padded" else []
    return [*found, *dict.fromkeys((("padded", own), ("padded", EAGER)))]  # type: ignore[list-item]


def _why_not(model: nn.Module, layout: Layout, attention: str | None) -> str | None:
    """Returns the reason why a model cannot run in a layout with an attention, or None."""
    base = base_model(model)
    if layout == "packed":
        if attention not in ATTENTION_NAMES.values():
            return f"its attention implementation is {attention!r}, not {ATTENTION_NAME!r}"
        kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
        if others := kinds - {"full_attention", "sliding_attention"}:
            return f"it has layers of type {sorted(others)}"

    # Sparse attention: ties between keys depend on the layout, so results would.
    chosen = vars(base.config.get_text_config()).get("index_topk")
    if isinstance(chosen, int) and chosen > 0:
        return f"it chooses the {chosen} keys that it reads (index_topk), and equal ones by where they lie in a batch"

    # Half precision is too coarse to tell a wrong mask from rounding: compare in fp32 where the weights can be widened.
    batch = probe_batch(model)
    device = next(model.parameters()).device
    # Eager attention computes its softmax, and RMS norms their squares, in fp32 whatever the precision of the weights.
    tolerance = max(TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE[torch.bfloat16]), _SINGLE)
    half = tolerance > TOLERANCE[torch.float32]
    with evaluating(model), uncompiled(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        widened: AbstractContextManager[None] = single_precision(model)
        if half:
            try:
                with widened:
                    _alone(model, batch)
                widened, tolerance = single_precision(model), TOLERANCE[torch.float32]
            except _UNSUPPORTED:  # weights used outside of their own module, or quantised ones
                widened = nullcontext()
        with widened:
            reason = _disagreement(model, batch, layout, attention, tolerance)
        if reason is None and half and layout == "packed":
            # Half precision may have a kernel of its own.
            reason = _failure(model, batch, attention)
    return reason


def _failure(model: nn.Module, batch: SequenceBatch, attention: str | None) -> str | None:
    """Returns why the packed layout does not run in the precision of the weights, or None."""
    try:
        with using_attention(base_model(model), attention or EAGER):
            hidden_states(model, batch, "packed")
    except _UNSUPPORTED as error:
        return f"the packed probe failed in {next(model.parameters()).dtype} ({_said(error)})"
    return None


def _disagreement(
    model: nn.Module, batch: SequenceBatch, layout: Layout, attention: str | None, tolerance: float
) -> str | None:
    """Describes the first disagreement with the model's own forward, at full and shortened reach, or None."""
    base = base_model(model)
    # Windows longer than the probe would not show: try them shortened as well.
    hidden = reaches(base, int(batch.lengths.max()))
    seen: list[Tensor] = []
    settings: list[Callable[[], AbstractContextManager[None]]] = [nullcontext]
    if hidden:
        settings.append(lambda: short_reach(base))
    for setting in settings:
        with setting():
            try:
                expected = _alone(model, batch)
            except _UNSUPPORTED as error:
                return f"its own forward failed ({_said(error)})"
            if not _looks_back(model, batch, expected, tolerance):
                return "an earlier token sees later ones: with its config it is not a causal language model"
            seen.append(expected)
            try:
                with using_attention(base, attention or EAGER):
                    found = hidden_states(model, batch, layout).read(batch.path_index, *_path_positions(batch))
            except _UNSUPPORTED as error:
                return f"the {layout} probe failed ({_said(error)})"
        # A nan (an untrained quantised model, say) must not pass for agreement.
        if not (difference := distance(found, expected)) <= tolerance:
            return f"{layout} hidden states differ from its own eager forward by {difference:.1e}"
    # Shortening that changes nothing has not reached the code that applies the window.
    if layout == "packed" and hidden and distance(seen[1], seen[0]) <= tolerance:
        return f"its {hidden[0]} is longer than what can be tried"
    return None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _alone(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Computes hidden states of each sequence alone by the model's own eager attention: rows as in ``path_index``."""
    base, decoder = base_model(model), decoder_of(model)
    with using_attention(base, EAGER):
        rows = [
            decoder(input_ids=batch.input_ids[path][None], use_cache=False).last_hidden_state[0]
            for path in batch.path_index.split(batch.lengths.tolist())
        ]
    return torch.cat(rows)


def _looks_back(model: nn.Module, batch: SequenceBatch, states: Tensor, tolerance: float) -> bool:
    """Tells whether the first half of a sequence gives the same states without the second."""
    length = int(batch.lengths[0])
    half = batch.path_index[: length // 2]
    with using_attention(base_model(model), EAGER):
        found = decoder_of(model)(input_ids=batch.input_ids[half][None], use_cache=False).last_hidden_state[0]
    return distance(found, states[: len(half)]) <= tolerance


def _path_positions(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Returns path number and depth of every entry of ``batch.path_index``."""
    path = torch.repeat_interleave(torch.arange(batch.num_paths, device=batch.lengths.device), batch.lengths)
    first = batch.lengths.cumsum(0) - batch.lengths
    return path, torch.arange(len(path), device=path.device) - first[path]


def probe_batch(model: nn.Module) -> SequenceBatch:
    """Makes a small forest with a shared prompt, a deeper branch and a lone sequence, for comparing layouts."""
    vocab = base_model(model).config.get_text_config().vocab_size
    device = next(model.parameters()).device
    tokens = [(7 * n * n + 3 * n + 1) % vocab for n in range(24)]
    deep = Segment(tokens[9:12], children=(Segment(tokens[12:15]), Segment(tokens[15:16])))
    tree = Segment(tokens[:5], children=(Segment(tokens[5:9]), deep))
    return pack([Example("probe:0", tree), Example("probe:1", Segment(tokens[16:24]))], device=device)
