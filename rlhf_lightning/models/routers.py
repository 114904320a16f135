"""Records the routing of a mixture of experts, for models whose load-balancing loss is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses.router import RouterSums, load_balancing_loss, router_sums
from .backbone import ROUTER_RECORDER, base_model, decoder_of, own_output

_TRIED_TOKENS, _TRIED_ROUTERS = 13, 2
_AGREEMENT = 1e-4  # relative, of a number that models compute in fp32


class Routers(NamedTuple):
    """Describes the routers of a model.

    Args:
        num_experts: experts that each router chooses from.
        top_k: experts that a token is sent to.
    """

    num_experts: int
    top_k: int


def find_routers(model: nn.Module) -> Routers | None:
    """Finds the routers of a model whose decoder can return their logits and whose loss on them is transformers' own.

    The model's own forward is given router logits instead of its decoder's, and its loss is compared with
    :func:`load_balancing_loss`. No layer runs and no weight is read, so that ranks without weights find the same.

    Args:
        model: a causal language model, or one wrapped by PEFT.

    Returns:
        ``None`` where the model has no routers, transformers records none, or the model has another loss for them.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=1, num_local_experts=4)
        >>> find_routers(AutoModelForCausalLM.from_config(config))
        Routers(num_experts=4, top_k=2)
    """
    base, decoder = base_model(model), decoder_of(model)
    if not _records_routers(decoder):
        return None
    config = base.config.get_text_config()
    num_experts, top_k = (getattr(base, n, getattr(config, n, None)) for n in ("num_experts", "num_experts_per_tok"))
    if not isinstance(num_experts, int) or not isinstance(top_k, int) or not 0 < top_k <= num_experts:
        return None

    # Random logits, the same on every rank; all on the CPU, since the model may be on the meta device, or be built in
    # the context of another one, where what transformers creates would go.
    routers = Routers(num_experts, top_k)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (_TRIED_ROUTERS, _TRIED_TOKENS, routers.num_experts)
    with torch.no_grad(), torch.device("cpu"):
        logits = tuple(torch.randn(shape, generator=generator, dtype=torch.float32))
        try:
            expected = load_balancing_loss(router_sums(logits, torch.ones(_TRIED_TOKENS), top_k=routers.top_k))
            found = own_output(base, torch.zeros(_TRIED_TOKENS, 1), router_logits=logits).aux_loss
        except (TypeError, LookupError, AttributeError, RuntimeError, ValueError):
            return None

    # Classes exist that weigh or mask the loss otherwise: only one that agrees is known.
    agrees = isinstance(found, Tensor) and bool((found - expected).abs() <= _AGREEMENT * expected.abs())
    return routers if agrees else None


def has_routers(model: nn.Module) -> bool:
    """Tells whether a model has routers that transformers records."""
    return _records_routers(decoder_of(model))


def _records_routers(decoder: nn.Module) -> bool:
    """Tells whether a decoder has routers that transformers records; a class may record them but have none."""
    found = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
    kinds = [getattr(entry, "target_class", entry) for entry in (found if isinstance(found, list) else [found])]
    return any(isinstance(module, kind) for kind in kinds if isinstance(kind, type) for module in decoder.modules())


class RouterRecorder:
    """Adds up the routing of all passes of a decoder.

    Args:
        routers: of the decoder.
    """

    def __init__(self, routers: Routers) -> None:
        self.routers = routers
        self._sums: list[RouterSums] = []

    def add(self, logits: Sequence[Tensor] | None, weights_T: Tensor) -> None:
        """Adds a pass.

        Args:
            logits: of every router, one row for each token of the pass.
            weights_T: how often each token counts.

        Raises:
            ValueError: the shapes of the logits do not fit the tokens and experts.
        """
        # One matrix of logits per layer; a model that drops or adds tokens has other shapes.
        rows = [part.reshape(-1, part.shape[-1]) for part in logits or ()]
        shape = (len(weights_T), self.routers.num_experts)
        if not rows or any(part.shape != shape for part in rows):
            found = ", ".join(str(tuple(part.shape)) for part in rows) or "none"
            raise ValueError(
                f"the routers gave logits of the shapes {found} for {shape[0]} tokens and {shape[1]} experts, so that "
                "their load-balancing loss is not known: set router_aux_loss_coef=0"
            )
        self._sums.append(router_sums(rows, weights_T, top_k=self.routers.top_k))

    @property
    def sums(self) -> RouterSums:
        """The sums over all passes.

        Raises:
            ValueError: no pass was recorded.
        """
        if not self._sums:
            raise ValueError(
                "no pass of the decoder was recorded: scores() must run it by token_stats or hidden_states, or set "
                "router_aux_loss_coef=0"
            )
        return sum(self._sums[1:], start=self._sums[0])


@contextmanager
def recording(model: nn.Module, routers: Routers) -> Iterator[RouterRecorder]:
    """Records the routing of this model in every ``hidden_states`` call within the context.

    Args:
        model: a causal language model, or one wrapped by PEFT.
        routers: the result of ``find_routers``.
    """
    decoder, recorder = decoder_of(model), RouterRecorder(routers)
    setattr(decoder, ROUTER_RECORDER, recorder)
    try:
        yield recorder
    finally:
        delattr(decoder, ROUTER_RECORDER)
