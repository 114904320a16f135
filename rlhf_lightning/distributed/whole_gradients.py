"""Lightning's DDP strategies without ``DistributedDataParallel``, which would hold every gradient twice."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy


def without_buckets(strategy: Any) -> None:
    """Lets a DDP strategy take the weights of rank 0 when training begins, and leave gradients alone.

    Lightning would wrap the module in ``DistributedDataParallel``, which allocates buckets of the size of all
    gradients, although ranks run different numbers of micro-batches, so that their gradients are summed by
    ``core.gradients`` once per step.

    Args:
        strategy: of a trainer, before it is set up; others than DDP's are left as they are.
    """
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp = lambda: _sync_module_states(strategy.model)  # type: ignore[method-assign,arg-type]
