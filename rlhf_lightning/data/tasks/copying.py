"""Copying: texts of random characters or words, generated from a seed, that are to be repeated exactly."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase, digits
from typing import Any

from .query import Query
from .sums import SPLITS, split_of

CONTRACTS = ("demonstrations", "prompts")
_MAX_DRAWS = 1000
_WORDS = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "lotus"),
    *("maple", "north", "ocean", "pearl", "quartz", "ridge", "stone", "thorn", "umber", "vapor", "wheat", "yarrow"),
)
_SYMBOLS = {"letters": tuple(ascii_lowercase), "digits": tuple(digits), "words": _WORDS}


def load(contract: str, query: Query) -> list[dict[str, Any]]:
    """Makes rows whose prompt asks to copy a text.

    Row ``i`` is a function of the keys and ``i`` alone. Keys: ``split=train|validation|test``, by a hash of the
    prompt; ``rows=1000``; ``seed=0``; ``length=8`` (1 to 256) symbols; ``symbols=letters|digits|words``. All rows have
    ``answer``, the text; ``demonstrations`` have it as ``completion`` too.

    Args:
        contract: ``demonstrations`` or ``prompts``.
        query: the keys.

    Raises:
        ValueError: for an unknown contract, key or value, and for a split that is empty at such a length.

    Example:
        >>> from rlhf_lightning.data.tasks import open_task
        >>> row = open_task("copying:prompts?rows=1&length=5&symbols=digits")[0]
        >>> row["prompt"] == f"Copy: {row['answer']}=", len(row["answer"])
        (True, 5)
    """
    if contract not in CONTRACTS:
        raise ValueError(f"unknown contract {contract!r} in {query.source!r}: allowed are {', '.join(CONTRACTS)}")
    split = query.choice("split", "train", SPLITS)
    rows = query.integer("rows", 1000, low=1)
    seed = query.integer("seed", 0, low=0)
    length = query.integer("length", 8, low=1, high=256)
    symbols = query.choice("symbols", "letters", tuple(_SYMBOLS))
    query.done()
    shown = contract == "demonstrations"
    return [
        {"prompt": f"Copy: {text}=", **({"completion": text} if shown else {}), "answer": text}
        for text in _texts(split, rows, seed, length, symbols, query)
    ]


def _texts(split: str, rows: int, seed: int, length: int, symbols: str, query: Query) -> Iterator[str]:
    separator = " " if symbols == "words" else ""
    for row in range(rows):
        draw = Random(f"copying/{seed}/{split}/{row}")
        for _ in range(_MAX_DRAWS):
            text = separator.join(draw.choice(_SYMBOLS[symbols]) for _ in range(length))
            if split_of(f"Copy: {text}=") == split:
                break
        else:
            raise query.refusal("split", split, f"empty for length={length} and symbols={symbols}; raise length")
        yield text
