"""Tasks that need no download: rows for every data contract from a string like ``"sums:demonstrations?rows=4000"``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from . import copying, gsm8k, instructions, recall, sums
from .query import Query

__all__ = ["is_task", "open_task"]

_LOADERS: dict[str, Callable[[str, Query], list[dict[str, Any]]]] = {
    "sums": sums.load,
    "gsm8k": gsm8k.load,
    "recall": recall.load,
    "copying": copying.load,
    "instructions": instructions.load,
}
# `name:contract`, and neither a URL (`hf://...`), nor a path, nor a Windows drive (`C:rows.jsonl`).
_SCHEME = re.compile(r"[A-Za-z]\w+:[^/\\?]*(\?.*)?", re.DOTALL)


def is_task(source: str) -> bool:
    """Tells whether a data source is written as a task, ``"<task>:<contract>?key=value&..."``.

    A misspelt task counts, so that :func:`open_task` can list the known ones; paths, URLs and hub ids do not.

    Args:
        source: a datamodule's source of rows.

    Example:
        >>> is_task("sums:preference?rows=8"), is_task("data/pairs.jsonl"), is_task("s3://bucket/pairs.jsonl")
        (True, False, False)
    """
    return source.startswith(tuple(f"{task}:" for task in _LOADERS)) or _SCHEME.fullmatch(source) is not None


def open_task(source: str) -> list[dict[str, Any]]:
    """Makes the rows of a task.

    Args:
        source: ``"<task>:<contract>?key=value&..."``. Tasks: ``sums``, ``recall``, ``copying`` and ``instructions``
            (generated) and ``gsm8k`` (read from a folder). Contracts: ``demonstrations``, ``preference``, ``unpaired``,
            ``stepwise``, ``prompts``. The keys are those of the task's ``load``; values are percent-encoded as in a
            URL, but ``+`` is itself.

    Returns:
        One dictionary per row, with the columns of the contract and what a verifier reads: ``answer``, the right final
        answer, or ``constraints``.

    Raises:
        ValueError: for an unknown task, contract, key or value.

    Example:
        >>> open_task("sums:prompts?rows=1&seed=3&terms=3")
        [{'prompt': '19+15+20=?', 'answer': '54'}]
    """
    task, _, rest = source.partition(":")
    if task not in _LOADERS:
        raise ValueError(f"unknown task {task!r} in {source!r}: allowed are {', '.join(_LOADERS)}")
    contract, _, keys = rest.partition("?")
    query = Query(source, keys)
    return _LOADERS[task](contract, query)
