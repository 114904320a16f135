"""The group in which ranks exchange what lies in host memory: counts, rows, votes on passes.

NCCL exchanges memory of GPUs only, and whoever reads a result from there waits for all work that was queued before it.
Host memory goes over gloo, while the devices compute.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

_timeouts: list[timedelta] = []  # the one that a strategy was given, if any
_made: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []  # the default group, and that of host memory


def set_timeout(timeout: timedelta | None) -> None:
    """Sets how long a rank waits for the others, for the group of the run that begins."""
    _timeouts[:] = [] if timeout is None else [timeout]


def host_group() -> dist.ProcessGroup | None:
    """Returns the group of all ranks for tensors in host memory; ``None`` is the default one, where it takes them.

    The first call makes the group, so all ranks make it together.
    """
    if "cpu:" in dist.get_backend_config():
        return None
    default = dist.group.WORLD
    assert default is not None
    if not _made or _made[0][0] is not default:
        _made[:] = [(default, dist.new_group(backend="gloo", timeout=_timeouts[0] if _timeouts else None))]
    return _made[0][1]
