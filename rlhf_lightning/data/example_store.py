"""Stores tokenised examples in a few flat arrays instead of one object per segment."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from ..sequences.example import Example, Segment

_UNSCORED, _BINARY, _FRACTIONAL = 0, 1, 2
# The arrays of a store, by their types.
_ARRAYS = {
    "first_segment": "i8",
    "first_token": "i8",
    "first_binary": "i8",
    "first_fractional": "i8",
    "kind": "u1",
    "num_children": "l",
    "tokens": "i4",
    "binary": "u1",
    "fractional": "f4",
}
_CONTINUED = -1  # instead of the number of children, for a leaf segment whose sequence continues


class ExampleStore(Sequence[Example]):
    """A list of examples that takes four to five bytes a token; examples are rebuilt on access.

    Args:
        examples: the initial examples.

    Example:
        >>> store = ExampleStore([Example("rows:1", Segment([1, 2], children=(Segment([3], [1]),)))])
        >>> len(store), store[0].root.children[0].tokens.tolist()
        (1, [3])
    """

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        self._row_ids: list[str] = []
        self._fields: list[Mapping[str, Any]] = []
        # Per example, where its segments begin; per segment (depth first), where its tokens and weights begin.
        self._first_segment = array("q")
        self._first_token = array("q", [0])
        self._first_binary = array("q")
        self._first_fractional = array("q")
        self._kind = array("B")
        self._num_children = array("l")
        self._tokens = array("i")
        self._binary = array("B")
        self._fractional = array("f")
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Adds an example at the end."""
        self._row_ids.append(example.row_id)
        self._fields.append(example.fields)
        self._first_segment.append(len(self._kind))
        self._add(example.root)

    def __len__(self) -> int:
        return len(self._row_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Example(
            self._row_ids[index],
            self._build(iter(range(self._first_segment[index], len(self._kind)))),
            self._fields[index],
        )

    def num_tokens(self, index: int) -> int:
        """Counts the tokens of one example, each shared token once."""
        index = range(len(self))[index]
        last = self._first_segment[index + 1] if index + 1 < len(self) else len(self._kind)
        return int(self._first_token[last] - self._first_token[self._first_segment[index]])

    def fingerprint(self) -> str:
        """Digests everything that a loss can see (not the row ids, which hold the file's name)."""
        digest = blake2b(digest_size=16)
        arrays = (
            self._first_segment,
            self._first_token,
            self._kind,
            self._num_children,
            self._tokens,
            self._binary,
            self._fractional,
        )
        # Lengths keep apart arrays whose joined bytes would be equal.
        for part in arrays:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(memoryview(part).cast("B") if len(part) else b"")
        for fields in self._fields:
            digest.update(repr(sorted(fields.items(), key=lambda item: item[0])).encode())
        return digest.hexdigest()

    def to_arrays(self) -> tuple[dict[str, np.ndarray[Any, Any]], list[str], list[dict[str, Any]]]:
        """Returns all that the store holds: arrays by name, row ids, fields."""
        arrays = {name: np.frombuffer(getattr(self, f"_{name}"), dtype) for name, dtype in _ARRAYS.items()}
        return arrays, list(self._row_ids), [dict(fields) for fields in self._fields]

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray[Any, Any]], row_ids: list[str], fields: list[dict[str, Any]]
    ) -> ExampleStore:
        """Builds a store from what :meth:`to_arrays` returns."""
        store = cls()
        for name, dtype in _ARRAYS.items():
            part = getattr(store, f"_{name}")
            del part[:]
            part.frombytes(arrays[name].astype(dtype, casting="equiv").tobytes())
        store._row_ids, store._fields = row_ids, list(fields)
        return store

    def _add(self, segment: Segment) -> None:
        self._tokens.frombytes(segment.tokens.astype(np.int32).tobytes())
        self._first_token.append(len(self._tokens))
        self._first_binary.append(len(self._binary))
        self._first_fractional.append(len(self._fractional))
        self._num_children.append(_CONTINUED if segment.continued else len(segment.children))

        # Most weights are 0 and 1, which take one byte instead of four.
        weights = segment.weights
        if weights is None:
            self._kind.append(_UNSCORED)
        elif ((weights == 0.0) | (weights == 1.0)).all():
            self._kind.append(_BINARY)
            self._binary.frombytes(weights.astype(np.uint8).tobytes())
        else:
            self._kind.append(_FRACTIONAL)
            self._fractional.frombytes(weights.tobytes())
        for child in segment.children:
            self._add(child)

    def _build(self, segments: Iterator[int]) -> Segment:
        here = next(segments)
        start, stop = self._first_token[here], self._first_token[here + 1]
        tokens = np.frombuffer(self._tokens[start:stop], np.int32).astype(np.int64)

        # Copies, since the arrays may still grow and be moved in memory.
        weights = None
        if self._kind[here] == _BINARY:
            at = self._first_binary[here]
            weights = np.frombuffer(self._binary[at : at + stop - start], np.uint8).astype(np.float32)
        elif self._kind[here] == _FRACTIONAL:
            at = self._first_fractional[here]
            weights = np.frombuffer(self._fractional[at : at + stop - start], np.float32).copy()
        continued = self._num_children[here] == _CONTINUED
        children = () if continued else tuple(self._build(segments) for _ in range(self._num_children[here]))
        return Segment(tokens, weights, children, continued=continued)
