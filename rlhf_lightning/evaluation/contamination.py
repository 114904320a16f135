"""Contamination of evaluation rows: which of their n-grams other rows, such as those of training, have as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..data.sources import Source, open_source
from ..data.word_ngrams import Gram, ngrams, row_words
from ..utils.validation import check_count, check_fraction


@dataclass(frozen=True)
class Overlap:
    """Text that a row shares with other rows.

    Attributes:
        row_id: of the row.
        words: number of its words.
        share: of its words, those within an n-gram that other rows have.
        ngram: the first such n-gram; empty without one.
        found_in: the first other row that has it; empty without one.

    Example:
        >>> Overlap("test:0", words=20, share=0.5, ngram="the cat sat on the mat", found_in="train:7").share
        0.5
    """

    row_id: str
    words: int
    share: float
    ngram: str = ""
    found_in: str = ""


@dataclass(frozen=True)
class Contamination:
    """Text that rows share with others.

    Attributes:
        n: words of an n-gram.
        threshold: a row is contaminated if its share is above it.
        rows: one overlap for every row with text.

    Example:
        >>> found = Contamination(n=8, threshold=0.0, rows=(Overlap("test:0", 20, 0.5), Overlap("test:1", 9, 0.0)))
        >>> found.contaminated
        ['test:0']
    """

    n: int
    threshold: float
    rows: tuple[Overlap, ...]

    @property
    def contaminated(self) -> list[str]:
        """Ids of contaminated rows."""
        return [row.row_id for row in self.rows if row.share > self.threshold]

    @property
    def share(self) -> float:
        """Share of the rows that are contaminated."""
        return len(self.contaminated) / len(self.rows)


def contamination(
    rows: Source, against: Source, *, n: int = 13, threshold: float = 0.0, columns: Sequence[str] | None = None
) -> Contamination:
    """Finds what rows share with others, by n-grams of words.

    Words are runs of letters and digits, whatever their case; n-grams do not reach from one column into another. A
    text of fewer than n words is found where the other rows have all of its words in a row. Only the n-grams of
    ``rows`` are held in memory; ``against`` is read once.

    Paper: GPT-3 (Brown et al., 2020, arXiv:2005.14165), appendix C, with n = 13 and any overlap.

    Args:
        rows: a source of rows to check, such as those of an evaluation.
        against: a source of rows that they should not share text with, such as those of training.
        n: words of an n-gram, at least 1.
        threshold: in [0, 1); a row is contaminated if the share of its words within shared n-grams is above it.
        columns: columns of ``rows`` to check; by default all with text. Of ``against`` all with text are read.

    Raises:
        ValueError: a number out of its range, a row without the columns, or no row with text.

    Example:
        >>> found = contamination([{"text": "a b c d"}, {"text": "x y"}], [{"text": "z B, c d!"}], n=3)
        >>> found.share, found.rows[0].share, found.rows[0].ngram, found.rows[0].found_in
        (0.5, 0.75, 'b c d', 'memory:1')
    """
    check_count("n", n, "13 is usual")
    check_fraction("threshold", threshold, "0 counts any overlap")
    texts: list[tuple[str, list[str]]] = []
    # By n-gram: the numbers of texts and the places in them where it begins.
    places: dict[Gram, list[tuple[int, int]]] = {}
    of_row: dict[str, list[int]] = {}
    for row_id, row in open_source(rows):
        for words in _words(row, columns, row_id):
            of_row.setdefault(row_id, []).append(len(texts))
            for start, gram in ngrams(words, n):
                places.setdefault(gram, []).append((len(texts), start))
            texts.append((row_id, words))
    if not texts:
        raise ValueError(f"no row of {_named(rows)} has text" + ("" if columns is None else f" in {list(columns)}"))

    # Every n-gram is looked up in all lengths that texts of fewer words have.
    sizes = sorted({len(gram) for gram in places})
    first: dict[Gram, str] = {}
    for row_id, row in open_source(against):
        for words in row_words(row):
            for size in sizes:
                for start in range(len(words) - size + 1):
                    gram = tuple(words[start : start + size])
                    if gram in places:
                        first.setdefault(gram, row_id)
    return Contamination(n, threshold, tuple(_overlaps(texts, of_row, places, first)))


def _overlaps(
    texts: Sequence[tuple[str, list[str]]],
    of_row: Mapping[str, Sequence[int]],
    places: Mapping[Gram, Sequence[tuple[int, int]]],
    first: Mapping[Gram, str],
) -> Iterator[Overlap]:
    """Counts the words of each row that are within shared n-grams."""
    covered = [[False] * len(words) for _, words in texts]
    begins: dict[int, tuple[int, Gram]] = {}
    for gram in first:
        for text, start in places[gram]:
            covered[text][start : start + len(gram)] = [True] * len(gram)
            begins[text] = min(begins.get(text, (start, gram)), (start, gram))
    for row_id, numbers in of_row.items():
        words = sum(len(covered[number]) for number in numbers)
        share = sum(sum(covered[number]) for number in numbers) / words
        shared = next((begins[number][1] for number in numbers if number in begins), ())
        yield Overlap(row_id, words, share, " ".join(shared), first.get(shared, ""))


def _words(row: Mapping[str, object], columns: Sequence[str] | None, row_id: str) -> Iterator[list[str]]:
    try:
        yield from row_words(row, columns)
    except ValueError as error:
        raise ValueError(f"{row_id} has {error}") from error


def _named(source: Source) -> str:
    return repr(source) if isinstance(source, str) else "the rows"
