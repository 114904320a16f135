"""Contexts that trees follow without holding their tokens: what trees see of them are entries of a decoder's cache.

Legend: K key/value heads, T tokens of a forest, C entries of all its contexts, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, eq=False, init=False)
class PriorContext:
    """A context before a tree, compressed to a known number of entries.

    Args:
        tokens: of the context, at least one.
        size: entries that the tree sees in its place, at least 1.
        position: position of the tree's first token.
        query: tokens of the tree that the entries depend on as well; empty where the context alone is read.

    Example:
        >>> context = PriorContext(np.array([5, 6, 7]), size=1, position=3)
        >>> context.key == PriorContext(np.array([5, 6, 7]), size=1, position=3).key
        True
    """

    tokens: npt.NDArray[np.int64]
    size: int
    position: int
    query: npt.NDArray[np.int64]

    def __init__(self, tokens: npt.ArrayLike, size: int, position: int, query: npt.ArrayLike = ()) -> None:
        object.__setattr__(self, "tokens", np.asarray(tokens, np.int64))
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "query", np.asarray(query, np.int64))

    @cached_property
    def key(self) -> bytes:
        """Digest of all that the entries depend on: equal contexts are compressed and laid out once."""
        digest = blake2b(f"{self.size}:{self.position}:{len(self.query)}:".encode(), digest_size=16)
        digest.update(self.query.tobytes() + self.tokens.tobytes())
        return digest.digest()


class PriorStates:
    """Keys and values of a forest's contexts, which replace what layers compute at their places.

    Outputs of a layer at these places reach nothing, and get no gradient.

    Args:
        index: flat positions of the entries in the forest, ``(C,)``.
        layers: keys and values of each layer, ``(K, C, D)``.
    """

    def __init__(self, index: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.index = index
        self._layers = list(layers)

    def placed(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values, ``(1, K, T, D)``, with those of the entries in their places.

        Args:
            layer: number of the layer.
            keys: computed by the layer.
            values: computed by the layer.
        """
        pairs = zip((keys, values), self._layers[layer], strict=True)
        own_keys, own_values = (states.index_copy(2, self.index, own[None].to(states)) for states, own in pairs)
        return own_keys, own_values
