"""Memories of texts that tell whether a row repeats an earlier one, exactly or nearly."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

Repeats = Callable[[dict[str, Any]], bool]
Texts = Sequence[tuple[str, str]]
_Numbers = npt.NDArray[np.uint64]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_HASHES = 64
_RECALL = 0.999  # at the threshold
_BLOCK = 4096  # n-grams that are hashed at once, which bounds memory
_SEEDS = np.arange(1, _HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def equal_texts() -> Callable[[Texts], bool]:
    """Returns a function that tells whether it has been called with equal texts before.

    Example:
        >>> seen = equal_texts()
        >>> seen([("prompt", "a")]), seen([("prompt", "b")]), seen([("prompt", "a")])
        (False, False, True)
    """
    known: set[bytes] = set()

    def is_known(texts: Texts) -> bool:
        digest = blake2b(repr(list(texts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        found = digest in known
        known.add(digest)
        return found

    return is_known


def similar_texts(similarity: float, n: int) -> Callable[[Texts], bool]:
    """Returns a function that tells whether it has been called with similar texts that were not similar to any before.

    Args:
        similarity: the Jaccard similarity of n-grams from which texts are similar, in (0, 1].
        n: tokens of an n-gram, at least 1.

    Example:
        >>> seen = similar_texts(0.5, n=1)
        >>> seen([("prompt", "a b c")]), seen([("prompt", "a b d")]), seen([("prompt", "a x y")])
        (False, True, False)
    """
    rows = _rows_of_bands(similarity)
    bands: list[dict[int, list[int]]] = [{} for _ in range(_HASHES // rows)]
    kept: list[_Numbers] = []

    def is_similar(texts: Texts) -> bool:
        grams = _gram_numbers(texts, n)
        keys = _band_keys(_signature(grams), rows)
        candidates = {number for band, key in zip(bands, keys, strict=True) for number in band.get(key, ())}
        if any(_jaccard(grams, kept[number]) >= similarity for number in candidates):
            return True
        for band, key in zip(bands, keys, strict=True):
            band.setdefault(key, []).append(len(kept))
        kept.append(grams)
        return False

    return is_similar


def _rows_of_bands(similarity: float) -> int:
    """Hashes in a band: the most with which two texts at the threshold share a band as often as wanted.

    Two texts of similarity s agree in a hash with probability s, and in a band of r hashes with s^r.
    """
    wanted = [r for r in range(1, _HASHES + 1) if 1 - (1 - similarity**r) ** (_HASHES // r) >= _RECALL]
    return max(wanted, default=1)


def _gram_numbers(texts: Texts, n: int) -> _Numbers:
    """Returns the sorted, distinct numbers of the n-grams of texts; equal texts of other columns have others."""
    found = [np.zeros(0, np.uint64)]
    for column, text in texts:
        tokens = np.array([_number(token) for token in _TOKEN.findall(text.casefold())], np.uint64)
        size = min(n, len(tokens))
        if not size:
            continue
        # A polynomial of the tokens, begun with the column, so that their order and place count.
        grams = np.full(len(tokens) - size + 1, _number(f"\0{column}"), np.uint64)
        for place in range(size):
            grams = _mixed(grams + tokens[place : place + len(grams)])
        found.append(grams)
    return np.unique(np.concatenate(found))


@lru_cache(1 << 16)
def _number(token: str) -> int:
    return int.from_bytes(blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(values: _Numbers) -> _Numbers:
    """Mixes the bits of each number (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signature(grams: _Numbers) -> _Numbers:
    """Returns the least number of the n-grams under each hash, ``(_HASHES,)``."""
    least = np.full(_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(grams), _BLOCK):
        hashed = _mixed(grams[start : start + _BLOCK, None] ^ _SEEDS)
        least = np.minimum(least, hashed.min(axis=0))
    return least


def _band_keys(signature: _Numbers, rows: int) -> list[int]:
    bands = signature[: len(signature) // rows * rows].reshape(-1, rows)
    keys = np.zeros(len(bands), np.uint64)
    for place in range(rows):
        keys = _mixed(keys + bands[:, place])
    return [int(key) for key in keys]


def _jaccard(one: _Numbers, two: _Numbers) -> float:
    if not len(one) and not len(two):
        return 1.0
    both = len(np.intersect1d(one, two, assume_unique=True))
    return both / (len(one) + len(two) - both)
