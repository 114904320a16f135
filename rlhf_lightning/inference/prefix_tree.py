"""The pages of a cache by the tokens that they hold: prompts that begin alike share the keys and values of that.

A page holds a fixed number of tokens. The tree has a node per page, whose path from the root is all tokens up to the
page's end, since keys and values depend on all of them. A page is in use as often as there are rows and nodes that hold
it; where room is needed, pages that only the tree holds are given up, those first that were not read for longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

PAGE = 16  # tokens


@dataclass(eq=False)
class _Node:
    page: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PrefixTree:
    """Pages by the tokens up to their end; the pages themselves are numbers to it.

    Example:
        >>> tree = PrefixTree()
        >>> tree.insert(range(40), [7, 8, 9])  # 9 is not full
        [7, 8]
        >>> tree.match([*range(32), 99]), tree.match([*range(20), 99]), tree.match([99])
        ([7, 8], [7], [])
        >>> tree.give_up(lambda page: True), len(tree)
        (8, 1)
    """

    def __init__(self) -> None:
        self._roots: dict[tuple[int, ...], _Node] = {}
        # In the order of their last use; a node comes before its parent.
        self._used: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        """Number of pages."""
        return len(self._used)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning."""
        path = list(self._walk(tokens))
        self._touch(path)
        return [node.page for node in path]

    def _walk(self, tokens: Sequence[int]) -> Iterator[_Node]:
        children = self._roots
        for page in _full_pages(tokens):
            node = children.get(page)
            if node is None:
                return
            yield node
            children = node.children

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Adds the pages of a row as far as they are full and new.

        Args:
            tokens: those of the row.
            pages: the pages that hold them.

        Returns:
            The pages that were added, which the tree holds from now on.
        """
        path = list(self._walk(tokens))
        known = len(path)
        parent = path[-1] if path else None
        for number, page_tokens in enumerate(_full_pages(tokens)):
            if number >= known:
                node = _Node(pages[number], page_tokens, parent)
                (self._roots if parent is None else parent.children)[page_tokens] = node
                path.append(node)
                parent = node
        self._touch(path)
        return [node.page for node in path[known:]]

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def give_up(self, free: Callable[[int], bool]) -> int | None:
        """Removes the least recently used page that ends a path; ``None`` if there is no such page.

        Args:
            free: whether nothing but the tree holds a page.
        """
        for node in self._used:
            if not node.children and free(node.page):
                siblings = self._roots if node.parent is None else node.parent.children
                del siblings[node.tokens], self._used[node]
                return node.page
        return None


def _full_pages(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        yield tuple(tokens[start : start + PAGE])
