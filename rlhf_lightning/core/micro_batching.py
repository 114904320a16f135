"""Micro-batching under global normalisers: the interface of a method, and passes that are independent of the split.

A method defines ``constants`` (computed once without gradient, such as a reference's log-probs), ``scores`` (computed
with gradient) and ``loss`` (a pure function of both, divided by global totals). All three use *rows*: tensors whose
first dimension is the example. So micro-batches, ranks, gathered losses and validation share one implementation.

Legend: E examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import Any, ClassVar, Self

import lightning
import torch
from torch import Tensor

from ..distributed.collectives import (
    Scores,
    concatenate,
    gather_scores,
    rows_before_this_rank,
    sum_over_ranks,
    world_size,
)
from ..losses.router import RouterSums, load_balancing_loss
from ..models.dropout import switch_off_dropout
from ..sequences import Example, SequenceBatch, pack, plan_micro_batches
from ..utils.keywords import CheckedKeywords
from .gradients import GradientSums
from .hooks import wrap_hooks
from .router_loss import AUX_LOSS, RouterLoss
from .timing import PhaseClock

ROW_KEY = "_row"  # hash of a row's id, which gives rows a canonical order on any number of ranks


class MicroBatchedModule(CheckedKeywords, lightning.LightningModule):
    """A module whose loss is a sum over rows, divided by totals of the global batch.

    Args:
        micro_batch_tokens: maximum number of tokens per forward, above 0.
        share_prefix: compute a prompt once for all its completions.
    """

    keeps_dropout: ClassVar[bool] = False  # whether dropout=None means the rates of the model's config
    dropout: float | None = None

    def __init__(self, *, micro_batch_tokens: int, share_prefix: bool) -> None:
        super().__init__()
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefix = share_prefix
        self._sums: GradientSums | None = None  # of the running step
        self.hooks_reached: set[str] = set()  # names of the core's hooks that have run
        # By the id of a scheduler: the monitored metric, and whether it is required.
        self.scheduler_monitors: dict[int, tuple[str | None, bool]] = {}
        self.clock: PhaseClock | None = None  # set by callbacks that measure time

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        wrap_hooks(cls)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measures the time of a block as one of ``timing.PHASES``; does nothing without a clock."""
        return nullcontext() if self.clock is None else self.clock.phase(name)

    @property
    def drops(self) -> bool:
        """Whether dropout is active in training; if not, the policy is trained as it is scored."""
        return self.keeps_dropout if self.dropout is None else self.dropout > 0

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as torch does; without dropout, the models within stay in evaluation mode."""
        super().train(mode)
        if mode and not self.drops:
            switch_off_dropout(self)
        return self

    def settle_layout(self) -> None:
        """Decides the layout of batches; called on every rank before the first batch."""

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss to add to the method's own; it couples all tokens of the global batch."""
        return None

    # The interface of a method.

    @property
    def coupled(self) -> bool:
        """Whether a row's loss depends on the other rows of the global batch."""
        return False

    def totals(self, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the counts of these examples that the loss is divided by; they are summed over all ranks."""
        return {"examples": float(len(examples))}

    def constants(self, batch: SequenceBatch) -> Scores:
        """Computes rows that carry no gradient; called once per micro-batch, under ``torch.no_grad``."""
        return {}

    @property
    def shares_constants(self) -> bool:
        """Whether a row's loss reads ``statistics`` of the whole global batch's constants."""
        return False

    def statistics(self, constants: Scores, totals: dict[str, float]) -> dict[str, float]:
        """Computes statistics of the constants of *all* rows that the loss needs; they are added to the totals.

        A loss that couples rows by its constants alone (KTO's KL estimate) needs no second pass then.
        """
        return {}

    def remember(self, rows: Scores, totals: dict[str, float]) -> None:
        """Updates running estimates after the step of a global batch; called with the same rows on every rank."""

    def scores(self, batch: SequenceBatch) -> Scores:
        """Computes rows that carry gradient."""
        raise TypeError(f"{type(self).__name__} must define scores(batch)")

    def loss(self, rows: Scores, totals: dict[str, float]) -> Tensor:
        """Computes the rows' share of the loss: a sum over them, divided by the global totals."""
        raise TypeError(f"{type(self).__name__} must define loss(rows, totals)")

    def metrics(self, rows: Scores, totals: dict[str, float]) -> Scores:
        """Computes logged metrics from the rows of a whole global batch or validation set."""
        return {}

    # The passes.

    def backward_examples(self, examples: Sequence[Example]) -> tuple[Scores, dict[str, float]]:
        """Accumulates this rank's part of the gradient of the global batch's loss.

        Returns:
            This rank's rows, detached, and the global totals, which include the load-balancing loss where it is
            trained.
        """
        if not self.drops:
            switch_off_dropout(self)  # a caller may have switched modes since
        totals = sum_over_ranks(self.totals(examples), self.device)
        plan = plan_micro_batches(examples, budget=self.micro_batch_tokens, share_prefix=self.share_prefix)
        batches = [[examples[n] for n in micro] for micro in plan]
        if (self.coupled or self.router_loss is not None) and (len(batches) > 1 or world_size() > 1):
            return self._backward_coupled(batches, totals), totals

        # Statistics of the global batch need the constants of every micro-batch before the first loss.
        known: list[Scores] = []
        if self.shares_constants:
            known = [self._constants(self._pack(micro)) for micro in batches]
            totals |= self._statistics(gather_scores(concatenate(known), self.device), totals)

        rows = []
        for n, micro in enumerate(batches):
            batch = self._pack(micro)
            constants = known[n] if known else self._constants(batch)
            scores, routed = self._routed_scores(batch)
            loss = self.loss(in_canonical_order(constants | scores), totals)
            # With a router loss there is a single micro-batch here, so its sums are those of the global batch.
            balance = self._router_share(routed, self._router_sums([routed], totals))
            self._backward_pass(sum(balance, start=loss))
            self._count(batch)
            rows.append(constants | _detached(scores))
        return concatenate(rows), totals

    def _backward_coupled(self, batches: list[list[Example]], totals: dict[str, float]) -> Scores:
        """Backpropagates a loss that couples the rows of the global batch, by gradient caching.

        GradCache (Gao et al., 2021, arXiv:2101.06983): scores all rows without gradient, differentiates the loss with
        respect to them, then recomputes each micro-batch with gradient and backpropagates its slice. Departures: rows
        are gathered over ranks, and the routers' sums over the whole batch are taken in the first pass too.
        """
        # First pass: scores without gradient; the random state is kept so that dropout repeats in the second pass.
        states, constants, scored, routed = [], [], [], []
        for micro in batches:
            batch = self._pack(micro)
            constants.append(self._constants(batch))
            states.append(_random_state(self.device))
            with torch.no_grad():
                scores, sums = self._routed_scores(batch)
            scored.append(scores)
            routed.append(sums)

        # The gradient of the loss with respect to the scores of all ranks, computed on every rank.
        own = concatenate(c | s for c, s in zip(constants, scored, strict=True))
        everyone = gather_scores(own, self.device)
        whole = self._router_sums(routed, totals)
        if not everyone:
            return own
        totals |= self._statistics(everyone, totals)
        names = [name for name, value in scored[0].items() if value.is_floating_point()] if scored else []
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in everyone.items()}
        with torch.enable_grad():
            loss = self.loss(in_canonical_order(leaves), totals)
            slopes = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True) if scored else ()

        # Second pass: the dot product of scores and cached gradients has the same gradient as the loss.
        place = rows_before_this_rank(len(own.get(ROW_KEY, ())))
        for micro, constant, state in zip(batches, constants, states, strict=True):
            _set_random_state(state, self.device)
            mine = slice(place, place + len(constant[ROW_KEY]))
            place = mine.stop
            batch = self._pack(micro)
            again, sums = self._routed_scores(batch)
            parts = [
                (again[name] * slope[mine]).sum()
                for name, slope in zip(names, slopes, strict=True)
                if slope is not None and again[name].requires_grad
            ]
            parts += self._router_share(sums, whole)
            self._backward_pass(sum(parts[1:], start=parts[0]))
            self._count(batch)
        return own

    def _routed_scores(self, batch: SequenceBatch) -> tuple[Scores, RouterSums | None]:
        """Computes rows that carry gradient, and the routers' sums over the batch where they have a loss."""
        if self.router_loss is None:
            return self.scores(batch), None
        self.settle_layout()  # before recording, as the layout probe is not part of the batch
        with self.router_loss.recording() as recorder:
            scores = self.scores(batch)
        return scores, recorder.sums

    def _router_sums(self, parts: Sequence[RouterSums | None], totals: dict[str, float]) -> RouterSums | None:
        """Sums the routers' statistics over the global batch and adds their loss to the totals."""
        if self.router_loss is None:
            return None
        whole = self.router_loss.summed([part for part in parts if part is not None], self.device)
        totals[AUX_LOSS] = float(load_balancing_loss(whole))
        return whole

    def _router_share(self, part: RouterSums | None, whole: RouterSums | None) -> list[Tensor]:
        """Returns a micro-batch's share of the load-balancing loss in a list, empty where none is trained."""
        loss = self.router_loss
        return [] if loss is None or part is None or whole is None else [loss.share(part, whole)]

    @contextmanager
    def _summed_gradients(self) -> Iterator[None]:
        """Accumulates the gradients of the backward passes in the context with ``GradientSums``."""
        self._sums = GradientSums(self.parameters())
        try:
            yield
        finally:
            self._sums.end()
            self._sums = None

    def _backward_pass(self, loss: Tensor) -> None:
        if self._sums is not None:
            self._sums.begin_pass()
        self.manual_backward(loss)

    def _count(self, batch: SequenceBatch) -> None:
        if self.clock is not None:
            self.clock.count_trained(batch)

    @torch.no_grad()
    def _statistics(self, rows: Scores, totals: dict[str, float]) -> dict[str, float]:
        return self.statistics(in_canonical_order(rows), totals) if self.shares_constants else {}

    def _constants(self, batch: SequenceBatch) -> Scores:
        with torch.no_grad(), self.phase("score"):
            constants = self.constants(batch)
        return constants | {ROW_KEY: row_keys(batch.examples, self.device)}

    def _pack(self, examples: list[Example]) -> SequenceBatch:
        return pack(examples, share_prefix=self.share_prefix, device=self.device)

    @torch.no_grad()
    def score_examples(self, examples: Sequence[Example]) -> Scores:
        """Scores examples without gradient in micro-batches, and returns rows in the order of ``examples``."""
        return self.in_micro_batches(examples, lambda batch: self._constants(batch) | self.scores(batch))

    def in_micro_batches(self, examples: Sequence[Example], rows_of: Callable[[SequenceBatch], Scores]) -> Scores:
        """Applies a function to packed micro-batches and returns its rows in the order of ``examples``."""
        plan = plan_micro_batches(examples, budget=self.micro_batch_tokens, share_prefix=self.share_prefix)
        rows = concatenate(rows_of(self._pack([examples[n] for n in micro])) for micro in plan)
        order = torch.argsort(torch.tensor([n for micro in plan for n in micro], dtype=torch.long)).to(self.device)
        return {name: value[order] for name, value in rows.items()}


def row_keys(examples: Sequence[Example], device: torch.device) -> Tensor:
    """Hashes row ids: ``(E,)``."""
    digests = [blake2b(example.row_id.encode(), digest_size=8).digest() for example in examples]
    keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.long, device=device)


def prompt_keys(examples: Sequence[Example], device: torch.device) -> Tensor:
    """Hashes the tokens of prompts: ``(E,)``."""
    digests = [blake2b(example.root.tokens.tobytes(), digest_size=8).digest() for example in examples]
    keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.long, device=device)


def _detached(rows: Scores) -> Scores:
    return {name: value.detach() for name, value in rows.items()}


def in_canonical_order(rows: Scores) -> Scores:
    """Sorts rows by their id, so that neither ties nor rounding depend on how they were split."""
    order = torch.argsort(rows[ROW_KEY], stable=True)
    return {name: value[order] for name, value in rows.items()}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
