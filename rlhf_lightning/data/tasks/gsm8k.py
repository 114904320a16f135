"""GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168): grade-school word problems, read from a folder.

The folder holds ``train.jsonl``, ``test.jsonl`` and ``example_model_solutions.jsonl`` as published by its authors (MIT
licence). The last has four models' solutions of each *test* problem, marked right or wrong. They are the only solutions
with marks, so the contracts made from them (``preference``, ``unpaired``) train on GSM8K test questions: after training
on their ``train`` split, do not report accuracy on the test file, only on that contract's held-out problems.
"""

from __future__ import annotations

import json
import os
import re
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from .query import Query

CONTRACTS = ("demonstrations", "preference", "unpaired", "prompts")
# Shares of the problems for training and for training plus validation, by rank of a hash of the question. Of the 7,473
# training problems 7,000 train and 473 validate; of the 1,319 solved test problems 1,000, 100 and 219.
_OF_TRAIN = (7000 / 7473, 1.0)
_OF_SOLVED = (1000 / 1319, 1100 / 1319)
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def load(contract: str, query: Query) -> list[dict[str, Any]]:
    """Reads the rows of GSM8K for one contract.

    Keys: ``path``, the folder (default: the environment variable ``GSM8K_DIR``); ``split``; ``rows``, the first so many
    (0: all); ``annotations=remove|keep``, the calculator's ``<<48/2=24>>`` (not a key of ``prompts``).

    * ``demonstrations``: ``prompt, completion`` (the steps, then ``#### 24``) and ``prompts``: ``prompt``;
      ``split=train`` (7,000 of the training file), ``validation`` (its other 473) or ``test`` (the test file, 1,319).
    * ``preference``: ``prompt, chosen, rejected``: a right and a wrong model solution of the same problem, where there
      are both; ``pairs=one`` per problem, or ``all`` combinations. ``unpaired``: ``prompt, completion, label``: every
      model solution. ``split=train`` (1,000 of the solved test problems), ``validation`` (100), ``test`` (219), or
      ``heldout`` (both of these: 319). These are GSM8K test questions: see the top of this file.

    All rows have ``answer``, without thousands separators. Model solutions end in ``A: 18`` in the file and in
    ``#### 18`` here, as the reference solutions do; the few that were cut off before their answer stay so. There are no
    labels on steps, so there is no ``stepwise``.

    Args:
        contract: one of the four above.
        query: the keys.

    Raises:
        ValueError: for an unknown contract, key or value, and where the folder or a file in it is missing.

    Example:
        >>> from rlhf_lightning.data.tasks import open_task
        >>> rows = open_task("gsm8k:preference?path=/data/gsm8k&pairs=all")  # doctest: +SKIP
    """
    if contract not in CONTRACTS:
        no_labels = " (GSM8K has no labels on steps: use sums:stepwise)" if contract == "stepwise" else ""
        allowed = ", ".join(CONTRACTS)
        raise ValueError(f"unknown contract {contract!r} in {query.source!r}: allowed are {allowed}{no_labels}")

    # All keys are read before `done`, which refuses any others.
    solved = contract in ("preference", "unpaired")
    folder = query.text("path", os.environ.get("GSM8K_DIR", ""))
    splits = ("train", "validation", "test", "heldout") if solved else ("train", "validation", "test")
    split = query.choice("split", "train", splits)
    limit = query.integer("rows", 0, low=0)
    keep = contract != "prompts" and query.choice("annotations", "remove", ("remove", "keep")) == "keep"
    pairs = query.choice("pairs", "one", ("one", "all")) if contract == "preference" else "one"
    query.done()

    if solved:
        problems = _split(_read(folder, "example_model_solutions.jsonl", query), split, _OF_SOLVED)
    elif split == "test":
        problems = _read(folder, "test.jsonl", query)
    else:
        problems = _split(_read(folder, "train.jsonl", query), split, _OF_TRAIN)

    if contract == "preference":
        rows = [row for problem in problems for row in _preferences(problem, pairs, keep)]
    elif contract == "unpaired":
        rows = [row for problem in problems for row in _unpaired(problem, keep)]
    else:
        write = _demonstration if contract == "demonstrations" else _prompt
        rows = [write(problem, keep) for problem in problems]
    return rows[:limit] if limit else rows


def _read(folder: str, name: str, query: Query) -> list[dict[str, Any]]:
    if not folder:
        raise ValueError(f"{query.source!r} does not say where GSM8K is: add path=<folder>, or set GSM8K_DIR")
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r} for {query.source!r}: path (or GSM8K_DIR) is the folder with {name}")
    # Not str.splitlines: a question holds U+2028, which it takes for the end of a line.
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _hash(question: str) -> int:
    return int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "big")


def _split(problems: list[dict[str, Any]], split: str, shares: tuple[float, float]) -> list[dict[str, Any]]:
    """Selects the problems of a split by a hash of their questions, and keeps the file's order."""
    first, second = (round(share * len(problems)) for share in shares)
    bounds = {
        "train": (0, first),
        "validation": (first, second),
        "test": (second, len(problems)),
        "heldout": (first, len(problems)),
    }
    # A split has a fixed number of problems, whatever their hashes.
    ranked = sorted(range(len(problems)), key=lambda index: _hash(problems[index]["question"]))
    return [problems[index] for index in sorted(ranked[slice(*bounds[split])])]


def _answer(solution: str) -> str:
    return re.split(r"\n(?:####|A:) ", solution)[-1].strip().replace(",", "")


def _tidy(solution: str, keep: bool) -> str:
    """Ends a solution as the reference ones do, and removes the calculator's annotations unless ``keep``."""
    solution = re.sub(r"(^|\n)A: (.*)\Z", r"\1#### \2", solution)
    return solution if keep else _ANNOTATION.sub("", solution)


def _demonstration(problem: dict[str, Any], keep: bool) -> dict[str, Any]:
    row = _prompt(problem, keep)
    return {"prompt": row["prompt"], "completion": _tidy(problem["answer"], keep), "answer": row["answer"]}


def _prompt(problem: dict[str, Any], keep: bool) -> dict[str, Any]:
    return {"prompt": problem["question"], "answer": _answer(problem["answer"])}


def _solutions(problem: dict[str, Any], keep: bool) -> list[tuple[str, bool]]:
    attempts = [value for value in problem.values() if isinstance(value, dict)]
    return [(_tidy(attempt["solution"], keep), attempt["is_correct"]) for attempt in attempts]


def _preferences(problem: dict[str, Any], pairs: str, keep: bool) -> list[dict[str, Any]]:
    solutions = _solutions(problem, keep)
    right = [solution for solution, is_correct in solutions if is_correct]
    wrong = [solution for solution, is_correct in solutions if not is_correct]
    combinations = list(product(right, wrong))
    if pairs == "one" and combinations:
        # By the hash, so that not every pair is of the model that the file names first.
        combinations = [combinations[_hash(problem["question"]) % len(combinations)]]
    answer = _answer(problem["ground_truth"])
    return [
        {"prompt": problem["question"], "chosen": chosen, "rejected": rejected, "answer": answer}
        for chosen, rejected in combinations
    ]


def _unpaired(problem: dict[str, Any], keep: bool) -> list[dict[str, Any]]:
    answer = _answer(problem["ground_truth"])
    return [
        {"prompt": problem["question"], "completion": solution, "label": label, "answer": answer}
        for solution, label in _solutions(problem, keep)
    ]
