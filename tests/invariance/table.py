"""Prints the tests of invariance as a table of methods and guarantees: ``pytest -p tests.invariance.table ...``.

A cell counts the comparisons that held; where one did not, it says how many of how many.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from .methods import METHODS as MATRIX
from .methods import PACKED

# An entry's first word: `dpo-coupled` is a row of `dpo`.
METHODS = tuple(dict.fromkeys(name.partition("-")[0] for name in MATRIX | PACKED))
# From what a test is called, its first parameters included, to what it guarantees.
GUARANTEES = (
    (r"test_layout_and_budget\[padded-(?!budget)", "packed = padded"),
    (r"test_layout_and_budget\[(padded-)?budget", "micro-batches"),
    (r"test_layout_and_budget\[repeated-prompts", "prompts shared"),
    (r"test_layout_and_budget\[checkpointed", "recomputed"),
    (r"test_padding\[", "padding"),
    (r"test_full_logits\[", "full logits"),
    (r"test_order_of_examples\[", "row order"),
    (r"test_evaluation_batch_size\[", "eval batch"),
    (r"test_single_precision\[", "fp32"),
    (r"test_two_ranks\[", "DDP x2"),
    (r"test_two_ranks_that_share_the_weights\[|test_three_steps_on_two_ranks", "FSDP2 x2"),
    (r"test_a_resumed_run", "resume"),
)


def place(nodeid: str) -> tuple[str, str] | None:
    """The cell that a test belongs to, if it belongs to any."""
    guarantee = next((name for pattern, name in GUARANTEES if re.search(pattern, nodeid)), None)
    parameters = nodeid.partition("[")[2].rstrip("]").split("-")
    method = next((name for name in parameters if name in METHODS), None)
    return None if guarantee is None or method is None else (method, guarantee)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table after pytest's own lines."""
    held: dict[tuple[str, str], int] = defaultdict(int)
    made: dict[tuple[str, str], int] = defaultdict(int)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            cell = place(report.nodeid)
            if cell is not None:
                made[cell] += 1
                held[cell] += outcome == "passed"
    names = [name for name in dict.fromkeys(name for _, name in GUARANTEES) if any(cell[1] == name for cell in made)]
    if not names:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(f"| method | {' | '.join(names)} |")
    terminalreporter.write_line(f"|---|{'---:|' * len(names)}")
    for method in [method for method in METHODS if any(cell[0] == method for cell in made)]:
        cells = [(method, name) for name in names]
        shown = [f"{held[c]} of {made[c]}" if held[c] < made[c] else str(made[c] or "") for c in cells]
        terminalreporter.write_line(f"| {method} | {' | '.join(shown)} |")
