"""Prints the budgets: ``python -m tests.budgets [GROUP ...]``."""

from __future__ import annotations

import sys

from transformers.utils.logging import disable_progress_bar

from .table import GROUPS


def main(groups: list[str]) -> int:
    """Prints one line per budget; 1 if one is exceeded."""
    disable_progress_bar()
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        sys.exit(f"unknown group {unknown[0]!r}: allowed are {', '.join(GROUPS)}")
    exceeded = 0
    print(f"{'':60s}{'before':>10s}{'now':>10s}{'limit':>10s}")
    for group in groups or GROUPS:
        for budget in GROUPS[group]():
            found = budget.count()
            exceeded += found > budget.limit
            mark = "  exceeded" if found > budget.limit else ""
            print(f"{budget.what:60s}{budget.before:10.4g}{found:10.4g}{budget.limit:10.4g}{mark}", flush=True)
    return int(exceeded > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
