"""Auxiliary losses that a model's config asks for in addition to a method's loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedConfig

# Names of the coefficients of router losses, in transformers and in configs of remote code: those of load balancing,
# and that of the size of the logits.
OF_BALANCE = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight")
_OF_ROUTERS = (*OF_BALANCE, "router_z_loss_coef")
# Coefficient of the mean squared log-normaliser of the logits (Bamba).
_OF_LOGITS = ("z_loss_coefficient",)


def router_losses(config: PreTrainedConfig) -> dict[str, float]:
    """Returns the router losses that a config asks for, as transformers reads it: coefficients above 0, by name.

    Args:
        config: of a model; configs inside it (``text_config``, ``ffn_config``) are read too.

    Returns:
        Empty where ``output_router_logits`` is not true, since transformers then adds no such loss either.

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
    """Returns the losses on the size of logits that a config asks for: coefficients above 0, by name.

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
