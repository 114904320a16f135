"""Compares answers; run as a script by ``MathAnswerReward``."""

from __future__ import annotations

import importlib
import json
import logging
import re
import resource
import sys
from typing import Any

# A word of two letters or more that is not a LaTeX command: prose, not a formula.
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def parse_gold(math_verify: Any, gold: str) -> list[Any]:
    """Parses the reference answer into expressions; empty if it is not mathematics."""
    gold = gold.rpartition("####")[2].strip()
    is_formula = bool(gold) and not WORD.search(gold)
    # math-verify reads a formula without marks as prose: of `2\sqrt{2}` it would take the first number.
    as_formula: list[Any] = math_verify.parse(f"${gold}$", parsing_timeout=None) if is_formula else []
    if "\\" in gold and "$" not in gold and as_formula:
        return as_formula
    parsed: list[Any] = math_verify.parse(gold, parsing_timeout=None)
    return parsed or as_formula


def is_right(math_verify: Any, gold: list[Any], completion: str, boxed_only: bool) -> bool:
    """Whether the completion's answer equals the reference."""
    options: dict[str, Any] = {}
    if boxed_only:
        if r"\boxed" not in completion:
            return False
        boxed = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
        options = {"extraction_config": [boxed], "extraction_mode": "first_match"}
    answer = math_verify.parse(completion, parsing_timeout=None, **options)
    return bool(math_verify.verify(gold, answer, timeout_seconds=None))


def main() -> None:
    """Answers questions until the input ends."""
    # Expressions such as 9^(9^9) would fill the memory of the machine.
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    math_verify = importlib.import_module("math_verify")
    # It warns that its own time limits are off; the parent process enforces one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    print("ready", flush=True)

    # Completions of one prompt follow one another, so that the reference is parsed once for all.
    cached: tuple[str, list[Any]] = ("", [])
    for line in sys.stdin:
        question = json.loads(line)
        if cached[0] != question["gold"]:
            cached = (question["gold"], parse_gold(math_verify, question["gold"]))
        gold = cached[1]
        try:
            answer = is_right(math_verify, gold, question["completion"], question["boxed_only"]) if gold else None
        except (MemoryError, RecursionError):
            answer = False
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
