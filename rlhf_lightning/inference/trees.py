"""Search trees: nodes, their paths, and their files.

A node is one step of solutions: its tokens continue those of its parent, and the root, which has none, is the prompt's
end. A tree is saved as JSON, from which it is read again, or as a page that draws it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..utils.files import write_atomically
from .completion import FinishReason

_FORMAT = 1


@dataclass(eq=False)
class Node:
    """One step of a search.

    Args:
        token_ids: the step's tokens, separator included; none at the root.
        text: the step's text.
        logprobs: of each token under the sampling distribution; empty if the engine does not report them.
        finish_reason: ``stop`` if the solution has ended here; ``length`` if it was cut off; ``None`` if it continues.
        prior: probability of the step under the policy among its siblings, which sum to 1.
        multiplicity: number of draws that gave this step.
        score: the scorer's, of the solution up to here; ``None`` before it was scored.
        visits: simulations through the node, in a search that simulates; draws that gave it, in others.
        value: the search's estimate: the mean of what was backed up, the posterior weight of particles, or the score.
        chosen: whether the chosen solution passes through it.
        rollout: whether this is a completion in one piece that was drawn to evaluate its parent.
        path: numbers of the draws that led here: with the search's seed, they determine the seeds of all further draws.
        draws: number of steps drawn from here.
        parent: ``None`` at the root.
        children: the steps that continue it.
        rollouts: the completions that were drawn to evaluate it.

    Example:
        >>> root = Node()
        >>> step = Node((5, 6), "1+1=", parent=root)
        >>> step.children.append(Node((7,), "2", finish_reason="stop", parent=step))
        >>> step.children[0].all_token_ids()
        (5, 6, 7)
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    prior: float = 1.0
    multiplicity: int = 1
    score: float | None = None
    visits: int = 0
    value: float | None = None
    chosen: bool = False
    rollout: bool = False
    path: tuple[int, ...] = ()
    draws: int = 0
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] = field(default_factory=list, repr=False)
    rollouts: list[Node] = field(default_factory=list, repr=False)

    @property
    def line(self) -> list[Node]:
        """The nodes from the root to this one."""
        found, node = [], self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return [node, *reversed(found)]

    @property
    def depth(self) -> int:
        """Number of steps from the root."""
        return len(self.line) - 1

    def all_token_ids(self) -> tuple[int, ...]:
        """Returns the tokens from the prompt's end up to here."""
        return tuple(token for node in self.line for token in node.token_ids)

    def all_logprobs(self) -> tuple[float, ...]:
        """Returns the log-probabilities of these tokens; empty if those of a step are unknown."""
        line = self.line
        if any(len(node.logprobs) != len(node.token_ids) for node in line):
            return ()
        return tuple(logprob for node in line for logprob in node.logprobs)

    def subtree(self) -> Iterator[Node]:
        """Yields the node and all below it, depth first: a node's steps before its rollouts."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo += [*reversed(node.rollouts), *reversed(node.children)]


# The fields of a node that are saved as they are.
_SAVED = ("text", "finish_reason", "prior", "multiplicity", "score", "visits", "value", "chosen", "rollout", "draws")


@dataclass(eq=False)
class SearchTree:
    """The tree of one search.

    Args:
        root: the node at the prompt's end.
        prompt: the prompt's text; empty if it was given as tokens and the engine cannot decode them.
        prompt_ids: the prompt's tokens.
        strategy: name of the search's class.
        seed: seed of the search.
        statistics: further numbers, such as the ``log_evidence`` of a particle filter.

    Example:
        >>> tree = SearchTree(Node(children=[Node((5, 6), "5+6", prior=1.0)]), "5+6=?", (1, 2))
        >>> tree.root.children[0].parent = tree.root
        >>> [node.text for node in SearchTree.from_json(tree.to_json()).nodes()]
        ['', '5+6']
    """

    root: Node
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()
    strategy: str = ""
    seed: int = 0
    statistics: dict[str, float] = field(default_factory=dict)

    def nodes(self) -> Iterator[Node]:
        """Yields all nodes, depth first."""
        return self.root.subtree()

    def leaves(self) -> Iterator[Node]:
        """Yields the nodes without steps and rollouts, in the order of the tree; the root if it is alone."""
        return (node for node in self.nodes() if not node.children and not node.rollouts)

    def to_json(self) -> dict[str, Any]:
        """Returns the tree as plain values: its nodes in a list, each with the number of its parent.

        Infinite scores are written as text, since JSON has no such number.
        """
        numbers: dict[Node, int] = {}
        rows = []
        for number, node in enumerate(self.nodes()):
            numbers[node] = number
            row: dict[str, Any] = {"parent": None if node.parent is None else numbers[node.parent]}
            row |= {name: _plain(getattr(node, name)) for name in _SAVED}
            row |= {"token_ids": list(node.token_ids), "logprobs": [_plain(logprob) for logprob in node.logprobs]}
            rows.append({**row, "path": list(node.path)})
        return {
            "format": _FORMAT,
            "strategy": self.strategy,
            "seed": self.seed,
            "prompt": self.prompt,
            "prompt_ids": list(self.prompt_ids),
            "statistics": {name: _plain(value) for name, value in self.statistics.items()},
            "nodes": rows,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SearchTree:
        """Makes a tree of what ``to_json`` returned.

        Raises:
            ValueError: these are no values of a tree.
        """
        if values.get("format") != _FORMAT:
            raise ValueError(
                f"format is {values.get('format')!r}; a search tree has {_FORMAT}: give what to_json returned"
            )
        try:
            nodes: list[Node] = []
            for row in values["nodes"]:
                nodes.append(_node(row, None if row["parent"] is None else nodes[row["parent"]]))
            statistics = {str(name): float(value) for name, value in values["statistics"].items()}
            prompt_ids = tuple(map(int, values["prompt_ids"]))
            return cls(nodes[0], values["prompt"], prompt_ids, values["strategy"], int(values["seed"]), statistics)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the values are of no search tree ({error!r}): give what to_json returned") from error

    def save(self, path: str | Path) -> Path:
        """Writes the tree, whole or not at all.

        Args:
            path: a file; ``.json`` can be loaded again, ``.html`` is a page that draws the tree.

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            write_atomically(path, json.dumps(self.to_json(), allow_nan=False) + "\n")
        elif path.suffix == ".html":
            from .tree_drawing import draw

            write_atomically(path, draw(self))
        else:
            raise ValueError(f"path is {str(path)!r}; a tree is saved as .json, or drawn as .html")
        return path

    @classmethod
    def load(cls, path: str | Path) -> SearchTree:
        """Reads a tree from a JSON file.

        Raises:
            ValueError: the file holds no tree.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file ({error}): give one that save wrote") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no search tree: give a file that save wrote")
        return cls.from_json(values)


def _node(row: Mapping[str, Any], parent: Node | None) -> Node:
    """Makes a node of its saved row, below its parent."""
    if row["finish_reason"] not in (None, *get_args(FinishReason)):
        raise ValueError(f"finish_reason is {row['finish_reason']!r}; it must be stop, length or null")
    values = {name: row[name] for name in _SAVED}
    for name in ("prior", "score", "value"):
        values[name] = None if values[name] is None else float(values[name])
    logprobs = tuple(map(float, row["logprobs"]))
    node = Node(tuple(row["token_ids"]), logprobs=logprobs, path=tuple(row["path"]), parent=parent, **values)
    if parent is not None:
        (parent.rollouts if node.rollout else parent.children).append(node)
    return node


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
