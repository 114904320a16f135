"""Completions with a verdict each, for KTO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar

from ..data.formats import unpaired
from ..data.loaders import Couple
from ..data.sources import Source
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
        partners: give each example the completion of another prompt of its batch, for the KL estimate.
        kwargs: options of ``ExampleDataModule``: sources, batches, lengths, order, streaming.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``UnpairedDataModule(train="sums:unpaired?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "UnpairedDataModule"

    def __init__(self, train: Source | None = None, *, partners: bool = True, **kwargs: Any) -> None:
        super().__init__(train, **kwargs)
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
    partnered = list(examples)

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
            partnered[index] = Example(example.row_id, with_answer(example.root, prompt, answers[other][1]), fields)
    return partnered


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
        """Finds the next place; ``None`` where no completion fits.

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
