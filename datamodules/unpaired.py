"""Completions with a verdict each, for KTO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar

from ..data.formats import unpaired
from ..data.loaders import Couple
from ..data.row_reader import OnBadRow
from ..data.sources import Source
from ..data.tokenization import OnTooLong, TokenizerSource
from ..data.transformed_rows import Transform
from ..sequences.branching import split_answer, with_answer
from ..sequences.example import Example
from .base import ExampleDataModule


class UnpairedDataModule(ExampleDataModule):
    """Serves prompts with one completion and a verdict on it; pairs are split into two.

    Rows are as in :func:`~rlhf_lightning.data.formats.unpaired`. The prompt becomes a root whose first child is
    the completion; the verdict is the field ``label``, true or false. With ``partners``, a second child is the
    completion of another prompt of the same global batch (in evaluation: of the whole split; see :func:`mismatch`) and
    the field ``partner`` its row id. The halves of a pair have the row ids ``<row id>/chosen`` and ``<row
    id>/rejected``; with ``streaming`` a pair is one row of a batch.

    Args:
        train: source of the training rows.
        val: source of the validation rows.
        test: source of the test rows.
        predict: source of the rows to predict.
        tokenizer: folder, hub id or tokenizer object; the module's if left out.
        global_batch_size: examples of one optimizer step, over all ranks; at least 1.
        eval_batch_size: the same for validation, test and prediction; ``global_batch_size`` if left out.
        max_length: maximum number of tokens of a sequence; unlimited if left out.
        on_too_long: ``drop`` the example, ``truncate_start`` (of the prompt, or of the one segment), ``truncate_end``
            (of the completion, with its end-of-sequence token), or ``error``.
        on_bad_row: ``error`` at the first row that cannot be used, or ``skip`` it.
        columns: new name of a column -> its name in the rows.
        transform: maps a row's columns (already renamed) to new ones, or to ``None`` to leave the row out; in YAML the
            function's dotted path.
        chat_template_kwargs: passed to the tokenizer's chat template (``enable_thinking: false``); a row's own
            ``chat_template_kwargs`` override them by name.
        partners: give each example the completion of another prompt of its batch, for the KL estimate.
        seed: seed of the order of training rows, together with the epoch; at least 0.
        shuffle: draw a new order of training rows in each epoch.
        drop_last: leave out a last training batch of fewer than ``global_batch_size`` examples.
        group_by_prompt: keep training rows of the same prompt together in every order, and on one rank where the
            batch allows it, so that their prompt is computed once; not with ``streaming``.
        streaming: read training rows on demand instead of tokenising all of them first.
        shuffle_buffer: with ``streaming``, the rows among which the next one is drawn; at least 1. Rows move by about
            as many places; files (of a list or folder) and Parquet row groups are reordered in each epoch.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``UnpairedDataModule(train="sums:unpaired?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "UnpairedDataModule"

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        global_batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        on_too_long: OnTooLong = "drop",
        on_bad_row: OnBadRow = "error",
        columns: dict[str, str] | None = None,
        transform: Transform | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        partners: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        group_by_prompt: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(
            train=train,
            val=val,
            test=test,
            predict=predict,
            tokenizer=tokenizer,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            on_too_long=on_too_long,
            on_bad_row=on_bad_row,
            columns=columns,
            transform=transform,
            chat_template_kwargs=chat_template_kwargs,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            group_by_prompt=group_by_prompt,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
        )

        self.partners = partners

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row, or the two of a pair."""
        rows = unpaired(columns)
        row_ids = [row_id] if len(rows) == 1 else [f"{row_id}/chosen", f"{row_id}/rejected"]
        return [Example(name, self.rows.answers(row), row.fields) for name, row in zip(row_ids, rows, strict=True)]

    def couple(self) -> Couple | None:
        """Returns the function that gives examples their partners; ``None`` without ``partners``."""
        if not self.partners:
            return None
        return partial(mismatch, seed=self.seed, max_length=self.max_length)


def mismatch(examples: list[Example], *, seed: int = 0, max_length: int | None = None) -> list[Example]:
    r"""Gives each example of a global batch the completion of another prompt, for KTO's estimate of the KL divergence.

    KTO (Ethayarajh et al. 2024, arXiv:2402.01306) estimates :math:`\mathrm{KL}(\pi_\theta \| \pi_{ref})` from prompts
    with unrelated completions of the same batch. The paper shifts the completions of a microbatch by one; here examples
    are ordered by a seeded hash of their row ids and each takes the completion of the next one with another prompt, so
    that partners depend neither on the order of the batch nor on its sharding.

    Args:
        examples: the whole batch, each with its completion as its only sequence.
        seed: seed of the order.
        max_length: maximum number of tokens of prompt and partner together; a longer partner is skipped.

    Returns:
        The examples in their original order. A partner is added as second sequence and its row id as field
        ``partner``; an example without one (all prompts are equal, or none fits) is unchanged.

    Example:
        >>> from rlhf_lightning.sequences import Segment
        >>> rows = [Example(f"rows:{i}", Segment([i], children=(Segment([10 * i], [1]),))) for i in (1, 2)]
        >>> [[child.tokens.tolist() for child in e.root.children] for e in mismatch(rows)]
        [[[10], [20]], [[20], [10]]]
    """
    order = sorted(range(len(examples)), key=lambda index: _draw(seed, examples[index].row_id))
    coupled = list(examples)

    # Equal prompts get equal numbers: a completion of the same prompt would not be unrelated.
    answers = [split_answer(example) for example in examples]
    numbers: dict[bytes, int] = {}
    prompts = [numbers.setdefault(answers[index][0].tobytes(), len(numbers)) for index in order]
    next_partner = NextPartner(prompts, [len(answers[index][1].tokens) for index in order])

    for place, index in enumerate(order):
        example, (prompt, _) = examples[index], answers[index]
        found = next_partner(place, math.inf if max_length is None else max_length - len(prompt))
        if found is not None:
            other = order[found]
            fields = {**example.fields, "partner": examples[other].row_id}
            coupled[index] = Example(example.row_id, with_answer(example.root, prompt, answers[other][1]), fields)
    return coupled


class NextPartner:
    """Finds the next place, cyclically, with another prompt and a completion that is short enough.

    A tree over the places: each node holds the shortest completion below it, and the shortest one of any other prompt
    than that one's. So a search takes logarithmic time in the number of places, also where nothing fits.

    Args:
        prompts: a number for each place's prompt.
        lengths: of each place's completion.

    Example:
        >>> NextPartner([0, 0, 1], [5, 5, 9])(0, room=9), NextPartner([0, 0, 1], [5, 5, 9])(0, room=8)
        (2, None)
    """

    def __init__(self, prompts: Sequence[int], lengths: Sequence[int]) -> None:
        self.prompts = prompts
        self.size = 1 << max(0, len(prompts) - 1).bit_length()
        empty = (math.inf, -1, math.inf)
        leaves = [(float(length), prompt, math.inf) for prompt, length in zip(prompts, lengths, strict=True)]
        self._nodes = [empty] * self.size + leaves + [empty] * (self.size - len(leaves))
        for node in range(self.size - 1, 0, -1):
            self._nodes[node] = _shorter(self._nodes[2 * node], self._nodes[2 * node + 1])

    def __call__(self, place: int, room: float) -> int | None:
        """Finds the next place; ``None`` if there is none.

        Args:
            place: the place that needs a partner.
            room: maximum length of the completion.
        """
        prompt = self.prompts[place]
        found = self._first(1, 0, self.size, place + 1, prompt, room)
        return self._first(1, 0, self.size, 0, prompt, room) if found is None else found

    def _first(self, node: int, start: int, stop: int, least: int, prompt: int, room: float) -> int | None:
        """Finds the first place from ``least`` on below a node, which spans ``start`` to ``stop``."""
        shortest, of_prompt, other = self._nodes[node]
        best = other if of_prompt == prompt else shortest
        if stop <= least or best == math.inf or best > room:
            return None
        if stop - start == 1:
            return start
        middle = (start + stop) // 2
        found = self._first(2 * node, start, middle, least, prompt, room)
        return self._first(2 * node + 1, middle, stop, least, prompt, room) if found is None else found


def _shorter(one: tuple[float, int, float], two: tuple[float, int, float]) -> tuple[float, int, float]:
    """Merges two nodes: the shortest completion, its prompt, and the shortest one of another prompt."""
    if two[0] < one[0]:
        one, two = two, one
    shortest, prompt, other = one
    return shortest, prompt, min(other, two[2] if two[1] == prompt else two[0])


def _draw(seed: int, row_id: str) -> bytes:
    return blake2b(f"{seed}/{row_id}".encode(), digest_size=16).digest()
