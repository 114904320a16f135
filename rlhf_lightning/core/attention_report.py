"""Reports the attention that a policy is trained with, once, after the first step in which it has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info

from ..models import base_model
from ..models.own_attention import attention_of
from ..sequences.tree_attention import ATTENTION_NAMES, watched_kernels

_KERNELS = {
    "blocks": "scaled-dot-product attention in blocks",
    "cascade": "flash attention along the tree (cascade)",
    "flex": "FlexAttention (flex)",
}


@contextmanager
def reported_attention(module: Any) -> Iterator[None]:
    """Notes the kernels that run within the context; the first that do are reported, and logged as ``attention``.

    Args:
        module: a ``PostTrainingModule``.
    """
    if module.attention_in_use is not None:
        yield
        return
    module.decide_layout()  # whose probes are not part of a step
    with watched_kernels() as used:
        yield
    if module.layout == "padded":
        name = attention_of(base_model(module.model))
        own = f"the model's own attention ({name})"
        module.attention_in_use = (
            f"padded rows, {'scaled-dot-product attention' if name in ATTENTION_NAMES.values() else own}"
        )
    elif used:
        module.attention_in_use = f"packed rows, {' and '.join(_KERNELS[kernel] for kernel in sorted(used))}"
    else:  # no rows on this rank
        return
    rank_zero_info(f"attention: {module.attention_in_use}")
    for logger in module.trainer.loggers:
        logger.log_hyperparams({"attention_in_use": module.attention_in_use})
