"""Tokenised rows: trees of token segments, and the batches of them that loaders yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from .prior_context import PriorContext

Shows = Literal["all", "slots", "only slots"]

SHOWS: Final[tuple[Shows, ...]] = get_args(Shows)


@dataclass(frozen=True, eq=False, init=False)
class Segment:
    """A run of tokens that continues its parent and is continued by its children.

    Args:
        tokens: token ids, at least one.
        weights: one loss weight per token (0 = the token is context, 1 = it counts); ``None`` = all are context. The
            first token of a root has no token before it to be predicted from: its weight must be 0.
        children: the segments that continue this one. A segment without children ends a *path*; the paths of a tree
            are taken in depth-first order.
        continued: for a segment without children: the next path belongs to the same sequence. A *sequence* is the unit
            that a loss compares or counts (a completion, a conversation). It is one path, or several where its turns
            are generated in contexts that do not extend one another; the last path is its last turn. Each token is
            scored once, on the first path of the sequence through it.
        slots: one number per token: below 0 for a token, from 0 on for a *slot*, whose embedding is the learned one of
            that number and not its token's. A slot has the position of the token before it. ``None`` = no slots.
        shows: tokens that the segments below see: ``"all"``; or ``"slots"``: of this segment its slots alone, which
            sum it up; or ``"only slots"``: these, and nothing above this segment.
        hides: number of the last tokens that this segment sees above it and the segments below do not see; 0 unless it
            shows ``"slots"``, which then replace them.
        after: of a root: the context that the tree follows. Its entries have no tokens here, and are laid out before
            the tree.

    Example:
        >>> prompt = Segment([5, 6, 7], children=(Segment([8, 9], [1, 1]), Segment([4], [1])))
        >>> [[token for segment in path for token in segment.tokens.tolist()] for path in prompt.paths()]
        [[5, 6, 7, 8, 9], [5, 6, 7, 4]]
    """

    tokens: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None
    children: tuple[Segment, ...]
    continued: bool
    slots: npt.NDArray[np.int64] | None
    shows: Shows
    hides: int
    after: PriorContext | None

    def __init__(
        self,
        tokens: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        children: Sequence[Segment] = (),
        *,
        continued: bool = False,
        slots: npt.ArrayLike | None = None,
        shows: Shows = "all",
        hides: int = 0,
        after: PriorContext | None = None,
    ) -> None:
        # Arrays of one dtype each, since content hashes and packing read their bytes.
        flat = np.asarray(tokens, dtype=np.int64)
        if flat.ndim != 1 or len(flat) == 0:
            raise ValueError(f"a segment needs a flat, non-empty list of tokens, got shape {flat.shape}")
        counts = None if weights is None else np.asarray(weights, dtype=np.float32)
        if counts is not None and counts.shape != flat.shape:
            raise ValueError(f"{len(flat)} tokens but {len(counts)} weights")
        numbers = None if slots is None else np.asarray(slots, dtype=np.int64)
        if numbers is not None and numbers.shape != flat.shape:
            raise ValueError(f"{len(flat)} tokens but {len(numbers)} slots: give -1 for each token that is no slot")
        if shows not in SHOWS:
            raise ValueError(f"shows is {shows!r}: use one of {', '.join(map(repr, SHOWS))}")
        if hides < 0 or (hides and shows != "slots"):
            raise ValueError(f"hides is {hides!r} and shows {shows!r}: with 'slots' it is 0 or more, else 0")

        # The dataclass is frozen, so its own __init__ is the only place that sets fields, past __setattr__.
        object.__setattr__(self, "tokens", flat)
        object.__setattr__(self, "weights", counts)
        object.__setattr__(self, "children", tuple(children))
        object.__setattr__(self, "continued", continued)
        object.__setattr__(self, "slots", numbers)
        object.__setattr__(self, "shows", shows)
        object.__setattr__(self, "hides", hides)
        object.__setattr__(self, "after", after)

    def paths(self) -> Iterator[tuple[Segment, ...]]:
        """Yields each root-to-leaf path, depth first."""
        if not self.children:
            yield (self,)
        for child in self.children:
            for rest in child.paths():
                yield (self, *rest)

    def sequences(self) -> Iterator[tuple[Path, ...]]:
        """Yields the paths of each sequence, depth first.

        Example:
            >>> turns = Segment([1], children=(Segment([2], [1], continued=True), Segment([3], [1]), Segment([4], [1])))
            >>> [len(sequence) for sequence in turns.sequences()]
            [2, 1]
        """
        group: list[Path] = []
        for path in self.paths():
            group.append(path)
            if not path[-1].continued:
                yield tuple(group)
                group = []
        if group:
            yield tuple(group)

    @property
    def num_own(self) -> int:
        """Tokens in this segment, and entries of the context that it follows."""
        return len(self.tokens) + (0 if self.after is None else self.after.size)

    @property
    def num_tokens(self) -> int:
        """Tokens in this segment and its descendants, each counted once, with the entries of a context before them."""
        return self.num_own + sum(child.num_tokens for child in self.children)

    @property
    def first_position(self) -> int:
        """Position of the first token of a root."""
        return 0 if self.after is None else self.after.position

    @property
    def hidden(self) -> int | None:
        """The number of the last tokens above this segment that those below do not see; ``None`` = all."""
        return None if self.shows == "only slots" else self.hides

    @property
    def content(self) -> bytes:
        """Digests what a path computes of the segment: segments of equal content and ancestors are laid out once."""
        before = b"" if self.after is None else self.after.key
        if self.slots is None and self.shows == "all":
            return before + self.tokens.tobytes()
        slots = b"" if self.slots is None else self.slots.tobytes()
        return before + f"{self.shows}:{self.hides}:".encode() + slots + b":" + self.tokens.tobytes()


Path = tuple[Segment, ...]


def distinct_segments(sequence: Sequence[Path]) -> list[Segment]:
    """Lists the segments of a sequence's paths, each once.

    Args:
        sequence: the paths of one sequence.
    """
    return list(dict.fromkeys(segment for path in sequence for segment in path))


def path_weights(path: Path, scored: set[Segment]) -> np.ndarray:
    """Concatenates weights along a path, 0 on segments already in ``scored``, and adds its segments to ``scored``."""
    parts = [
        np.zeros(len(segment.tokens), np.float32) if segment.weights is None or segment in scored else segment.weights
        for segment in path
    ]
    scored.update(path)
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Example:
    """One row, tokenised.

    Args:
        row_id: ``"<source>:<ordinal>"``, stable over epochs, order, sharding and restarts.
        root: the tree; for the usual contracts the prompt, its children the completions in the contract's order
            (preference: chosen, rejected).
        fields: the row's other columns (``margin``, ``label``, ...), untouched.

    Example:
        >>> pair = Example("rows:0", Segment([5, 6], children=(Segment([7], [1]), Segment([8], [1]))), {"margin": 0.5})
        >>> len(pair.sequences), pair.fields["margin"]
        (2, 0.5)
    """

    row_id: str
    root: Segment
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> list[tuple[Path, ...]]:
        """The paths of each sequence, depth first."""
        return list(self.root.sequences())

    def weights_per_sequence(self) -> list[npt.NDArray[np.float32]]:
        """Collects the weights above 0 of each sequence's tokens."""
        found = []
        for sequence in self.root.sequences():
            parts = [s.weights[s.weights > 0] for s in distinct_segments(sequence) if s.weights is not None]
            found.append(np.concatenate(parts) if parts else np.empty(0, np.float32))
        return found

    def content_hash(self) -> str:
        """Digests tokens, weights and tree shape: equal for equal content, whatever the row's id."""
        digest = blake2b(digest_size=16)

        def feed(segment: Segment) -> None:
            digest.update(b"(")
            digest.update(segment.content)
            if segment.weights is not None:
                digest.update(b"w" + segment.weights.tobytes())
            for child in segment.children:
                feed(child)
            digest.update(b"+)" if segment.continued else b")")

        feed(self.root)
        return digest.hexdigest()


class ExampleBatch:
    """One rank's share of a global batch: the examples of one optimizer step.

    It is deliberately not a ``collections.abc.Sequence``: Lightning would traverse it row by row, looking for tensors
    to convert. A share may be empty (the last batch of an epoch over several ranks); it is still yielded, so that
    every rank sees the same number of batches.

    Args:
        examples: this rank's examples.
        on_consumed: called once when the batch has been used; a loader counts its rows as consumed then, and not when
            the batch was fetched.
        contract: the datamodule whose kind of rows these are, such as ``"PreferenceDataModule"``; ``None`` for a
            user's own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        on_consumed: Callable[[], None] | None = None,
        contract: str | None = None,
    ) -> None:
        self.examples = list(examples)
        self.contract = contract
        self._on_consumed = on_consumed

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def mark_consumed(self) -> None:
        """Tells the loader that the step of this batch is done; further calls do nothing."""
        if self._on_consumed is not None:
            callback, self._on_consumed = self._on_consumed, None
            callback()


def check_contract(module: object, contract: str | None) -> None:
    """Refuses rows of a contract that a module does not learn from, whatever the shape of their trees.

    Args:
        module: its ``contracts`` are the names of the datamodules whose rows it takes; if missing or empty, all.
        contract: the datamodule's name; ``None`` for a user's own rows.

    Raises:
        ValueError: with the datamodule to use instead.
    """
    allowed = getattr(module, "contracts", ())
    if contract is not None and allowed and contract not in allowed:
        raise ValueError(
            f"{type(module).__name__} does not take the rows of {contract}: use {' or '.join(allowed)}, or the module "
            "whose rows these are"
        )
