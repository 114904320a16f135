"""Lays the trees of examples out flat, depth first, each token after its ancestors, equal prefixes once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .example import Example, Path, Segment, path_weights
from .geometry import Shown
from .prior_context import PriorContext


class _Node:
    """A run of tokens that every path through it shares."""

    def __init__(self, segment: Segment, context: PriorContext | None = None) -> None:
        self.segment = segment
        self.context = context  # that the segment's places are for
        self.start = 0  # in the layout
        self.children: dict[bytes, _Node] = {}

    def child(self, segment: Segment) -> _Node:
        """Returns the child that holds a segment's tokens, and creates it if needed."""
        return self.children.setdefault(segment.content, _Node(segment))

    def entries(self, context: PriorContext) -> _Node:
        """Returns the child that holds a context's entries, and creates it if needed."""
        places = Segment(np.zeros(context.size, np.int64))
        return self.children.setdefault(b"after:" + context.key, _Node(places, context))

    @property
    def num_entries(self) -> int:
        """Places of a context's entries."""
        return 0 if self.context is None else self.context.size


class Layout:
    """Collects the flat arrays of a forest in which equal prefixes are laid out once."""

    def __init__(self) -> None:
        # The forest, token by token.
        self.roots: list[_Node] = []
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int]] = []  # (start, length, parent segment or -1)
        self.shown: dict[int, Shown] = {}  # of segments that do not show everything
        self.contexts: list[tuple[int, PriorContext]] = []
        self.size = 0

        # Scored tokens, one array per path: where they are predicted from, their depth and path, and what they are.
        self.source: list[np.ndarray] = []
        self.depth: list[np.ndarray] = []
        self.path: list[np.ndarray] = []
        self.target: list[np.ndarray] = []
        self.weight: list[np.ndarray] = []
        self.sequence: list[np.ndarray] = []

        # Paths and sequences.
        self.paths: list[np.ndarray] = []
        self.path_sequence: list[int] = []
        self.last_path: list[int] = []  # per sequence
        self.example: list[int] = []  # per sequence

    def place(self, node: _Node, parent: int = -1, depth: int = 0) -> None:
        """Lays out a node after its ancestors, then its children."""
        node.start, length, number = self.size, len(node.segment.tokens), len(self.segments)
        slots = np.full(length, -1) if node.segment.slots is None else node.segment.slots
        # A slot has the position of the token before it. Entries need none of their own.
        positions = depth - 1 + np.cumsum(slots < 0)
        below = int(positions[-1]) + 1
        if node.context is not None:
            self.contexts.append((node.start, node.context))
            positions, below = np.zeros_like(slots), node.context.position
        self.tokens.append(node.segment.tokens)
        self.slots.append(slots)
        self.positions.append(np.maximum(positions, 0))
        self.segments.append((node.start, length, parent))
        if node.segment.shows != "all":
            self.shown[number] = Shown(np.flatnonzero(slots >= 0), node.segment.hidden)
        self.size += length
        for child in node.children.values():
            self.place(child, number, below)

    def close(self, turns: list[_Turn], example: int) -> None:
        """Records a sequence: its paths, and the tokens that it scores on them."""
        number = len(self.example)
        for tokens, weights, nodes in turns:
            flat = np.concatenate([np.arange(node.start, node.start + len(node.segment.tokens)) for node in nodes])
            # A token is predicted from the one before it on its path.
            scored = np.flatnonzero(weights)
            if len(scored) and scored[0] == nodes[0].num_entries:
                raise ValueError(
                    "the first token of a tree has weight above 0, but no token before it: give it weight 0"
                )
            self.source.append(flat[scored - 1])
            self.depth.append(scored - 1)
            self.path.append(np.full(len(scored), len(self.paths)))
            self.target.append(tokens[scored])
            self.weight.append(weights[scored])
            self.sequence.append(np.full(len(scored), number))
            self.paths.append(flat)
            self.path_sequence.append(number)
        self.last_path.append(len(self.paths) - 1)
        self.example.append(example)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of a ``SequenceBatch``, by name."""
        sequence, slots = np.concatenate(self.sequence), np.concatenate(self.slots)
        return {
            **({"slots": slots, "encoded": self._encoded()} if (slots >= 0).any() else {}),
            "input_ids": np.concatenate(self.tokens),
            "position_ids": np.concatenate(self.positions),
            "source_index": np.concatenate(self.source),
            "source_depth": np.concatenate(self.depth),
            "source_path": np.concatenate(self.path),
            "target_ids": np.concatenate(self.target),
            "sequence_index": sequence,
            "weights": np.concatenate(self.weight).astype(np.float32, copy=False),
            "last_index": np.array([self.paths[number][-1] for number in self.last_path]),
            "last_path": np.array(self.last_path),
            "scored_lengths": np.bincount(sequence, minlength=len(self.last_path)),
            "lengths": np.array([len(path) for path in self.paths]),
            "path_sequence": np.array(self.path_sequence),
            "example_index": np.array(self.example),
            "path_index": np.concatenate(self.paths),
        }

    def _encoded(self) -> np.ndarray:
        return np.repeat([n in self.shown for n in range(len(self.segments))], [size for _, size, _ in self.segments])


_Turn = tuple[np.ndarray, np.ndarray, list[_Node]]  # tokens, weights and nodes of a path


def _nodes(path: Path, above: _Node) -> list[_Node]:
    """Returns the nodes of a path below a given one, and creates them where needed."""
    nodes = [] if path[0].after is None else [above.entries(path[0].after)]
    for segment in path:
        nodes.append((nodes[-1] if nodes else above).child(segment))
    return nodes


def lay_out(examples: Sequence[Example], share_prefix: bool) -> Layout:
    """Merges equal prefixes of the examples' trees, lays them out, and records every example's sequences."""
    layout = Layout()
    everything = _Node(Segment([0]))  # no segment: its children are the roots
    found: list[tuple[list[_Turn], int]] = []

    # First pass: merge the trees. Nothing has a position yet: a later example may add to an earlier prefix.
    for number, example in enumerate(examples):
        for sequence in example.root.sequences():
            turns: list[_Turn] = []
            scored: set[Segment] = set()
            for path in sequence:
                weights = path_weights(path, scored)
                nodes = _nodes(path, everything if share_prefix else _Node(Segment([0])))
                tokens = np.concatenate([node.segment.tokens for node in nodes])
                weights = np.concatenate([np.zeros(nodes[0].num_entries, weights.dtype), weights])
                if not share_prefix:
                    layout.roots.append(nodes[0])
                turns.append((tokens, weights, nodes))
            found.append((turns, number))

    # Second pass: positions, depth first, and then the sequences that refer to them.
    for root in (*layout.roots, *everything.children.values()):
        layout.place(root)
    for turns, number in found:
        layout.close(turns, number)
    return layout
