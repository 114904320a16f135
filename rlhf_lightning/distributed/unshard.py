"""Temporarily gathering the weights of a model that FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from .fsdp2 import sharded_units
from .lockstep import barrier, lockstep

# Models whose weights are gathered now.
_held: list[nn.Module] = []


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers the sharded weights of a model once, and keeps them until the context ends.

    Forwards inside need no communication, so ranks may run different numbers of them: each generates until its own rows
    have ended. All ranks must enter and leave together. Does nothing without sharded modules, nor within itself: around
    several calls that gather, ranks may make different numbers of them.

    Args:
        model: any module; its submodules sharded by ``fully_shard`` are gathered.
    """
    sharded: list[Any] = list(sharded_units(model))
    if not sharded or any(model is held for held in _held):
        yield
        return
    agreement = lockstep()
    barrier()

    # torch has a public setter of this switch but no getter, so the attribute is read to restore it afterwards.
    switches: list[tuple[Any, Any]] = []
    for module in sharded:
        state: Any = module._get_fsdp_state()
        # Before its first forward a root does not know that it is one; afterwards it never reshards after a forward.
        is_new_root = module is model and getattr(state, "_auto_reshard_after_forward", True)
        # Up to torch 2.12 there is one group per module; a group may be None.
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in filter(None, groups):
            switches.append((group, None if is_new_root else group.post_forward_mesh_info))

    _held.append(model)
    try:
        for module in sharded:
            module.unshard()
        for group, _ in switches:
            group.post_forward_mesh_info = None
        with nullcontext() if agreement is None else agreement.suspended():
            yield
    finally:
        _held.remove(model)
        for group, info in switches:
            group.post_forward_mesh_info = info
        for module in sharded:
            module.reshard()
