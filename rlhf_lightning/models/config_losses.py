"""Losses that a model's config asks for beside the loss of a method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedConfig

# What coefficients of losses on routers are called, in transformers and in configs that models bring along: of what
# balances their loads, and of the size of their logits.
OF_BALANCE = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight")
_OF_ROUTERS = (*OF_BALANCE, "router_z_loss_coef")
# Of the mean squared log-normaliser of the logits: Bamba.
_OF_LOGITS = ("z_loss_coefficient",)


def router_losses(config: PreTrainedConfig) -> dict[str, float]:
    """Losses on routers that a config asks for, as transformers reads it: coefficients above 0, by their names.

    Args:
        config: of a model. What it asks for may stand in a config within (``text_config``, ``ffn_config``).

    Returns:
        Nothing where ``output_router_logits`` is not true, since transformers then adds no such loss either.

    Example:
        >>> from transformers import MixtralConfig
        >>> router_losses(MixtralConfig(output_router_logits=True))
        {'router_aux_loss_coef': 0.001}
        >>> router_losses(MixtralConfig())
        {}
    """
    levels = list(_levels(config))
    if not any(getattr(level, "output_router_logits", None) is True for level in levels):
        return {}
    return _positive(levels, _OF_ROUTERS)


def logit_losses(config: PreTrainedConfig) -> dict[str, float]:
    """Losses on the size of logits that a config asks for: coefficients above 0, by their names.

    Args:
        config: of a model.

    Example:
        >>> from transformers import BambaConfig
        >>> logit_losses(BambaConfig(z_loss_coefficient=0.5))
        {'z_loss_coefficient': 0.5}
    """
    return _positive(_levels(config), _OF_LOGITS)


def _positive(levels: Iterable[PreTrainedConfig], names: tuple[str, ...]) -> dict[str, float]:
    found = [(name, getattr(level, name, None)) for level in levels for name in names]
    return {name: value for name, value in found if isinstance(value, int | float) and value > 0}


def _levels(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _levels(value)
