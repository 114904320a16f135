"""References of stages to the outputs of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..utils.messages import UsageError


def check_order(written: Mapping[str, Any]) -> None:
    """Refuses a stage that reads what a later one, or it itself, will write.

    Args:
        written: the stages by name, in order, with their references; bodies of rounds included.

    Raises:
        UsageError: naming both stages.
    """
    for name, stage in written.items():
        body = stage.get("body") if isinstance(stage, dict) else None
        if isinstance(body, dict):
            check_order(body)
        for read in re.findall(r"\$\{outputs\.([\w-]+)", str(stage)):
            if read in written and [*written].index(read) >= [*written].index(name):
                raise UsageError(f"stage {name!r} reads an output of {read!r}, which is not before it: write it above")
