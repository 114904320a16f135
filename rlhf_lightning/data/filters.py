r"""Filters of training rows by quality: the option ``filters`` of datamodules.

A filter keeps, rewrites or drops a row. Filters are applied in order, each to the rows that those before it keep, and
what they keep is a function of the rows alone: no rank, epoch, order or interruption changes it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..utils.validation import check_count, check_fraction
from .cell_checks import check_number, describe_columns, is_missing
from .duplicates import equal_texts, similar_texts
from .sources import Source, open_source
from .word_ngrams import Gram, cell_texts, ngrams, row_texts, row_words, with_texts

Row = dict[str, Any]
Repeats = Callable[[Row], bool]


class RowFilter(ABC):
    """Base class of filters; a subclass is a frozen dataclass, whose fields are its options."""

    @abstractmethod
    def __call__(self, row: Row) -> Row | None:
        """Returns the columns of a row, perhaps with other values; ``None`` drops it.

        Args:
            row: its columns, after ``columns``, ``transform`` and ``pair_by``; not to be changed in place.

        Raises:
            ValueError: the row is bad.
        """

    @property
    def label(self) -> str:
        """The name under which dropped rows are counted."""
        return type(self).__name__

    @property
    def fingerprint(self) -> str:
        """All that the filter's decisions depend on, as a text; a resumed run needs the same."""
        return repr(self)

    def prepare(self) -> None:
        """Reads what rows are compared with; called once, before the first row."""
        return

    def repeats(self) -> Repeats | None:
        """Returns a function with an empty memory that tells whether a row repeats an earlier one that it has seen.

        Filters without a memory return ``None``.
        """
        return None


@dataclass(frozen=True)
class ScoreRange(RowFilter):
    """Keeps rows with a score from ``least`` to ``most``; rows whose score is empty are dropped.

    Args:
        column: the column of the score, or a rating in the column ``ratings``; a row with neither is a bad row.
        least: the lowest score that is kept; no limit by default.
        most: the highest score that is kept; no limit by default.

    Raises:
        ValueError: no limit, or ``least`` above ``most``.

    Example:
        >>> good = ScoreRange("score", least=3)
        >>> good({"text": "a", "score": 3.5}), good({"text": "b", "score": "2"}), good({"text": "c", "score": None})
        ({'text': 'a', 'score': 3.5}, None, None)
    """

    column: str
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if self.least is None and self.most is None:
            raise ValueError(f"ScoreRange of {self.column!r} has no limit: give least, most or both")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least={self.least} is above most={self.most} of {self.column!r}: exchange them")

    def __call__(self, row: Row) -> Row | None:
        """Returns the row, or ``None`` if its score is out of the range."""
        ratings = row.get("ratings")
        scores = row if self.column in row or not isinstance(ratings, dict) else ratings
        if self.column not in scores:
            raise ValueError(f"no column {self.column!r}{describe_columns(scores, self.column)} for ScoreRange")
        if is_missing(scores[self.column]):
            return None
        score = check_number(scores[self.column], self.column)
        above = self.least is None or score >= self.least
        return row if above and (self.most is None or score <= self.most) else None

    @property
    def label(self) -> str:
        """The class and its column."""
        return f"ScoreRange({self.column})"


@dataclass(frozen=True)
class _TextFilter(RowFilter):
    """Searches the texts of some columns for regular expressions."""

    patterns: list[str]
    columns: list[str] | None = None

    def __post_init__(self) -> None:
        _ = self._compiled

    @cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        return _compile(self.patterns)


@dataclass(frozen=True)
class StripText(_TextFilter):
    r"""Removes from texts what regular expressions match.

    Args:
        patterns: regular expressions of Python; ``(?i)`` at the beginning ignores case, ``(?s)`` lets ``.`` match the
            ends of lines. They are applied in order.
        columns: the columns whose texts are rewritten, contents of messages included; all by default.

    Raises:
        ValueError: no pattern, or one that is no regular expression.

    Example:
        >>> StripText([r"(?s)<think>.*?</think>\s*"])({"completion": "<think>2 and 2</think> 4", "answer": 4})
        {'completion': '4', 'answer': 4}
    """

    def __call__(self, row: Row) -> Row | None:
        """Returns the row with what the patterns match removed."""
        _check_columns(row, self.columns)
        return {name: with_texts(value, self._strip) if self._reads(name) else value for name, value in row.items()}

    def _reads(self, name: str) -> bool:
        return self.columns is None or name in self.columns

    def _strip(self, text: str) -> str:
        for pattern in self._compiled:
            text = pattern.sub("", text)
        return text


@dataclass(frozen=True)
class DropText(_TextFilter):
    """Drops rows in whose texts a regular expression is found.

    Args:
        patterns: regular expressions of Python; ``(?i)`` at the beginning ignores case.
        columns: the columns that are searched, contents of messages included; all by default.

    Raises:
        ValueError: no pattern, or one that is no regular expression.

    Example:
        >>> polite = DropText([r"(?i)as an ai language model"], columns=["completion"])
        >>> polite({"completion": "As an AI language model, I"}) is None, polite({"completion": "4"})
        (True, {'completion': '4'})
    """

    def __call__(self, row: Row) -> Row | None:
        """Returns the row, or ``None`` if a pattern is found."""
        _check_columns(row, self.columns)
        texts = [text for name in self.columns or row for text in cell_texts(row[name])]
        return None if any(pattern.search(text) for pattern in self._compiled for text in texts) else row


@dataclass(frozen=True)
class Duplicates(RowFilter):
    r"""Drops rows whose texts repeat those of an earlier row that is kept, exactly or nearly.

    Rows are compared in the source's order, in a pass of its own over all rows before the first one is used (with
    ``streaming``, too: a digest of each row is held, or, for near duplicates, about 2 KB and 8 bytes a word).

    Two rows are near duplicates if the Jaccard similarity of their sets of n-grams, |A and B| / |A or B|, is at least
    ``similarity``. N-grams are of words and single symbols, whatever their case, within a column; fewer tokens than n
    are one n-gram. Candidates are found by MinHash and bands (Broder, 1997; Leskovec et al., Mining of Massive
    Datasets, chapter 3) and then compared exactly, so that no other row is dropped; a near duplicate at the threshold
    itself is missed with a probability below 0.001, a closer one with less.

    Args:
        columns: the columns that are compared; all with text by default, ids among them.
        similarity: in (0, 1]; 1 drops rows with equal texts alone. 0.8 is usual for near duplicates.
        n: tokens of an n-gram, at least 1.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> from rlhf_lightning.datamodules import SFTDataModule
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "5"}]
        >>> data = SFTDataModule(train=rows, tokenizer="configs/models/nano", filters=[Duplicates(["prompt"])])
        >>> data.setup("fit")
        >>> data.report["train"]["kept"], data.report["train"]["filtered"]
        (1, 1)
    """

    columns: list[str] | None = None
    similarity: float = 1.0
    n: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.similarity, bool) or not 0 < self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity!r}, expected above 0 and at most 1 (equal)")
        check_count("n", self.n, "5 is usual")

    def __call__(self, row: Row) -> Row | None:
        """Returns the row; what repeats an earlier one is known by :meth:`repeats`."""
        _check_columns(row, self.columns)
        return row

    def repeats(self) -> Repeats:
        """Returns a function with an empty memory that tells whether a row repeats an earlier one."""
        seen = equal_texts() if self.similarity == 1 else similar_texts(self.similarity, self.n)

        def is_repeated(row: Row) -> bool:
            texts = list(row_texts(row, self.columns))
            return bool(texts) and seen(texts)

        return is_repeated


@dataclass(frozen=True)
class EvaluationOverlap(RowFilter):
    """Drops rows that share n-grams of words with rows of an evaluation.

    With ``threshold`` 0, ``rlhf-lightning contamination --rows EVALUATION --against ROWS`` of the rows that are kept
    finds nothing (:func:`~rlhf_lightning.evaluation.contamination` with the same n and columns). An evaluation's text
    of fewer than n words is found where a row has all of its words in a row; words are runs of letters and digits.

    Paper: GPT-3 (Brown et al., 2020, arXiv:2005.14165), appendix C, with n = 13 and any overlap.

    Args:
        evaluation: the source of the evaluation's rows, of any form that datamodules read; its n-grams are held.
        n: words of an n-gram, at least 1.
        threshold: in [0, 1); a row is dropped if the share of its words within shared n-grams is above it.
        columns: the columns of the training rows that are searched; all with text by default.
        evaluation_columns: the columns of the evaluation's rows that must not be found. Short answers are found in
            many rows: prompts alone are searched for by default.

    Raises:
        ValueError: a number out of its range, or an evaluation without text in these columns.

    Example:
        >>> clean = EvaluationOverlap([{"prompt": "a b c d"}], n=3)
        >>> clean.prepare()
        >>> clean({"prompt": "z B, c d!"}) is None, clean({"prompt": "a b d"})
        (True, {'prompt': 'a b d'})
    """

    evaluation: Source = field(repr=False)
    n: int = 13
    threshold: float = 0.0
    columns: list[str] | None = None
    evaluation_columns: list[str] | None = field(default_factory=lambda: ["prompt"])

    def __post_init__(self) -> None:
        check_count("n", self.n, "13 is usual")
        check_fraction("threshold", self.threshold, "0 counts any overlap")

    def __call__(self, row: Row) -> Row | None:
        """Returns the row, or ``None`` if it shares too much with the evaluation."""
        words = shared = 0
        for text in row_words(row, self.columns):
            covered = [False] * len(text)
            for size, grams in self._grams.items():
                for start, gram in ngrams(text, size):
                    if gram in grams:
                        covered[start : start + size] = [True] * size
            words, shared = words + len(text), shared + sum(covered)
        return None if words and shared / words > self.threshold else row

    def prepare(self) -> None:
        """Reads the evaluation."""
        _ = self._grams

    @property
    def fingerprint(self) -> str:
        """The options, and a digest of the evaluation's rows."""
        return f"{self!r}{open_source(self.evaluation, split='test').fingerprint}"

    @cached_property
    def _grams(self) -> dict[int, set[Gram]]:
        """The evaluation's n-grams by their number of words."""
        found: dict[int, set[Gram]] = {}
        for row_id, row in open_source(self.evaluation, split="test"):
            try:
                texts = list(row_words(row, self.evaluation_columns))
            except ValueError as error:
                raise ValueError(f"{row_id} has {error}; name the evaluation's with evaluation_columns") from error
            for words in texts:
                for _, gram in ngrams(words, self.n):
                    found.setdefault(len(gram), set()).add(gram)
        if not found:
            raise ValueError(f"no row of the evaluation has text in {self.evaluation_columns}: name others")
        return found


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"patterns={patterns!r}, expected a list of regular expressions, such as ['(?i)as an ai']")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            hint = "write a backslash before a character that is meant as it is"
            raise ValueError(f"the pattern {pattern!r} is no regular expression ({error}): {hint}") from error
    return compiled


def _check_columns(row: Row, columns: Sequence[str] | None) -> None:
    for name in columns or ():
        if name not in row:
            raise ValueError(f"no column {name!r}{describe_columns(row, name)}")
