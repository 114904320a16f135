"""Words of the texts in rows, and their n-grams, by which rows are compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\w+")
Gram = tuple[str, ...]


def row_texts(row: Mapping[str, Any], columns: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each column with text; the texts of a list or of messages are one text.

    Args:
        row: columns with their values.
        columns: the columns to read; all by default.

    Raises:
        ValueError: the row lacks one of the columns.

    Example:
        >>> list(row_texts({"prompt": [{"role": "user", "content": "Hi"}], "steps": ["a", "b"], "score": 1}))
        [('prompt', 'Hi'), ('steps', 'a b')]
    """
    missing = [name for name in columns or () if name not in row]
    if missing:
        raise ValueError(f"no column {missing[0]!r}: it has {', '.join(map(str, row))}")
    for name in row if columns is None else columns:
        if text := " ".join(cell_texts(row[name])):
            yield name, text


def row_words(row: Mapping[str, Any], columns: Sequence[str] | None = None) -> Iterator[list[str]]:
    """Yields the words of each column that has any: runs of letters and digits, whatever their case.

    Args:
        row: columns with their values.
        columns: the columns to read; all by default.

    Raises:
        ValueError: the row lacks one of the columns.

    Example:
        >>> list(row_words({"prompt": "What is 2+2?", "completion": "Four.", "score": 1}))
        [['what', 'is', '2', '2'], ['four']]
    """
    for _, text in row_texts(row, columns):
        if words := _WORD.findall(text.casefold()):
            yield words


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a cell with each of its texts changed; roles of messages and everything but text stay.

    Example:
        >>> with_texts([{"role": "user", "content": "Hi"}, 3], str.upper)
        [{'role': 'user', 'content': 'HI'}, 3]
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        key = "content" if "content" in value else "value"
        return {**value, key: with_texts(value[key], change)} if key in value else value
    return [with_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[int, Gram]]:
    """Yields all n-grams with their places; all words of a text of fewer than n.

    Example:
        >>> list(ngrams(["a", "b", "c"], 2)), list(ngrams(["a"], 2))
        ([(0, ('a', 'b')), (1, ('b', 'c'))], [(0, ('a',))])
    """
    size = min(n, len(words))
    for start in range(len(words) - size + 1):
        yield start, tuple(words[start : start + size])


def cell_texts(value: Any) -> Iterator[str]:
    """Yields the texts of a cell: a text, a list of texts, or the contents of messages.

    Example:
        >>> list(cell_texts([{"role": "user", "content": "Hi"}, "there", 3]))
        ['Hi', 'there']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from cell_texts(value.get("content", value.get("value")))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from cell_texts(item)
