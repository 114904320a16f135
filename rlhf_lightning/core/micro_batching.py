"""Passes over micro-batches under global normalizers; no result depends on how a batch is split.

A method defines ``no_grad_rows`` (computed once without gradient, such as a reference's log-probs), ``grad_rows``
(computed with gradient) and ``loss`` (a pure function of both, divided by global normalizers). All three use *rows*:
tensors whose first dimension is the example. So micro-batches, ranks, gathered losses and validation share one
implementation.

On a GPU the host never waits within a micro-batch: what it knows of the rows goes to the device with the batch, in one
copy, and what it needs of the device's rows it reads once per step, of all micro-batches together.

Legend: E examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.collectives import Rows, concatenate, gather_rows, rows_before_this_rank, sum_over_ranks, world_size
from ..losses.router import RouterSums, load_balancing_loss
from ..models.dropout import switch_off_dropout
from ..sequences import Example, SequenceBatch, pack, plan_micro_batches
from ..sequences.geometry import Part
from ..utils.transfer import to_device
from .gradients import GradientSums
from .router_loss import AUX_LOSS

ROW_KEY = "_row"  # hash of a row's id, which gives rows a canonical order on any number of ranks


class MicroBatching:
    """Runs a module's forward and backward passes in micro-batches of at most ``micro_batch_tokens`` tokens.

    Args:
        module: a ``PostTrainingModule``: its ``micro_batch_tokens`` and ``share_prefix`` are read at each pass.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._sums: GradientSums | None = None  # of the running step
        self._wanted: set[Part] = set()  # what the models' layers read of batches

    def backward(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, Any]]:
        """Accumulates this rank's part of the gradient of the global batch's loss.

        Returns:
            This rank's rows, detached, and the global normalizers, which include the load-balancing loss where it is
            trained, as a tensor.
        """
        if not self.module.drops:
            switch_off_dropout(self.module)  # a caller may have switched modes since
        # Where activations are recomputed to save memory, no copies of weights are held either.
        with nullcontext() if self.module.gradient_checkpointing else self.module.rounded_weights():
            return self._backward(examples)

    def _backward(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, Any]]:
        normalizers: dict[str, Any] = sum_over_ranks(self.module.normalizers(examples))
        batches = [[examples[n] for n in micro] for micro in self.plan(examples)]
        if (self.module.couples_rows or self.module.router_loss is not None) and (len(batches) > 1 or world_size() > 1):
            return self._backward_coupled(batches, normalizers), normalizers

        # Statistics of the global batch need the no-grad rows of every micro-batch before the first loss.
        known: list[tuple[SequenceBatch, Rows]] = []
        if self.module.uses_batch_statistics:
            for micro in batches:
                known.append(self._with_no_grad_rows(self.pack(micro)))
                known[-1][0].drop_masks()
            normalizers |= self.statistics(gather_rows(concatenate(fixed for _, fixed in known)), normalizers)

        rows = []
        for n, micro in enumerate(batches):
            batch, fixed = known[n] if known else self._with_no_grad_rows(self.pack(micro))
            grad_rows, routed = self._routed_rows(batch)
            loss = self.module.loss(in_canonical_order(fixed | grad_rows), normalizers)
            # With a router loss there is a single micro-batch here, so its sums are those of the global batch.
            balance = self._router_share(routed, self._router_sums([routed], normalizers))
            self._backward_pass(sum(balance, start=loss))
            self._count(batch)
            batch.drop_masks()
            rows.append(fixed | _detached(grad_rows))
        return concatenate(rows), normalizers

    def _backward_coupled(self, batches: list[list[Example]], normalizers: dict[str, Any]) -> Rows:
        """Backpropagates a loss that couples the rows of the global batch, by gradient caching.

        GradCache (Gao et al., 2021, arXiv:2101.06983): computes all rows without gradient, differentiates the loss with
        respect to them, then recomputes each micro-batch with gradient and backpropagates its slice. Departures: rows
        are gathered over ranks, and the routers' sums over the whole batch are taken in the first pass too.
        """
        # First pass: rows without gradient; the random state is kept so that dropout repeats in the second pass.
        states, known, computed, routed = [], [], [], []
        for micro in batches:
            known.append(self._with_no_grad_rows(self.pack(micro)))
            states.append(_random_state(self.module.device))
            with torch.no_grad():
                grad_rows, sums = self._routed_rows(known[-1][0])
            known[-1][0].drop_masks()
            computed.append(grad_rows)
            routed.append(sums)

        # The gradient of the loss with respect to the rows of all ranks, computed on every rank's host.
        local_rows = concatenate(c | s for (_, c), s in zip(known, computed, strict=True))
        global_rows = gather_rows(local_rows)
        whole = self._router_sums(routed, normalizers)
        if not global_rows:
            return local_rows
        normalizers |= self.statistics(global_rows, normalizers)
        names = [name for name, value in computed[0].items() if value.is_floating_point()] if computed else []
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in global_rows.items()}
        with torch.enable_grad():
            loss = self.module.loss(in_canonical_order(leaves), normalizers)
            slopes = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True) if computed else ()
        place = rows_before_this_rank(len(local_rows.get(ROW_KEY, ())))
        given = {name: slope for name, slope in zip(names, slopes, strict=True) if slope is not None}
        slope_of = to_device(given, self.module.device)

        # Second pass: the dot product of rows and cached gradients has the same gradient as the loss.
        for (batch, fixed), state in zip(known, states, strict=True):
            _set_random_state(state, self.module.device)
            local = slice(place, place + len(fixed[ROW_KEY]))
            place = local.stop
            again, sums = self._routed_rows(batch)
            parts = [(again[n] * slope[local]).sum() for n, slope in slope_of.items() if again[n].requires_grad]
            parts += self._router_share(sums, whole)
            self._backward_pass(sum(parts[1:], start=parts[0]))
            self._count(batch)
            batch.drop_masks()
        return local_rows

    def _routed_rows(self, batch: SequenceBatch) -> tuple[Rows, RouterSums | None]:
        """Computes rows that carry gradient, and the routers' sums over the batch where they have a loss."""
        if self.module.router_loss is None:
            return self.module.grad_rows(batch), None
        self.module.decide_layout()  # before recording, as the layout probe is not part of the batch
        with self.module.router_loss.recording() as recorder:
            rows = self.module.grad_rows(batch)
        return rows, recorder.sums

    def _router_sums(self, parts: Sequence[RouterSums | None], normalizers: dict[str, Any]) -> RouterSums | None:
        """Sums the routers' statistics over the global batch and adds their loss to the normalizers."""
        if self.module.router_loss is None:
            return None
        whole: RouterSums = self.module.router_loss.summed(
            [part for part in parts if part is not None], self.module.device
        )
        normalizers[AUX_LOSS] = load_balancing_loss(whole).double()
        return whole

    def _router_share(self, part: RouterSums | None, whole: RouterSums | None) -> list[Tensor]:
        """Returns a micro-batch's share of the load-balancing loss in a list, empty where none is trained."""
        loss = self.module.router_loss
        return [] if loss is None or part is None or whole is None else [loss.share(part, whole)]

    @contextmanager
    def summed_gradients(self) -> Iterator[None]:
        """Accumulates the gradients of the backward passes in the context with ``GradientSums``."""
        self._sums = GradientSums(self.module.parameters())
        try:
            yield
        finally:
            self._sums.end()
            self._sums = None

    def _backward_pass(self, loss: Tensor) -> None:
        if self._sums is not None:
            self._sums.begin_pass()
        self.module.manual_backward(loss)

    def _count(self, batch: SequenceBatch) -> None:
        if self.module.clock is not None:
            self.module.clock.count_trained(batch)

    @torch.no_grad()
    def statistics(self, rows: Rows, normalizers: dict[str, float]) -> dict[str, float]:
        """Computes the method's statistics of the rows of a whole global batch; empty where it uses none."""
        if not self.module.uses_batch_statistics:
            return {}
        found: dict[str, float] = self.module.batch_statistics(in_canonical_order(rows), normalizers)
        return found

    def _with_no_grad_rows(self, batch: SequenceBatch) -> tuple[SequenceBatch, Rows]:
        with torch.no_grad(), self.module.phase("score"):
            rows: Rows = self.module.no_grad_rows(batch)
        return batch, rows | {ROW_KEY: self.extra(batch)[ROW_KEY]}

    def plan(self, examples: Sequence[Example]) -> list[list[int]]:
        """Groups examples into micro-batches within the budget; returns the numbers of the examples of each."""
        module = self.module
        return plan_micro_batches(examples, budget=module.micro_batch_tokens, share_prefix=module.share_prefix)

    def pack(self, examples: Sequence[Example]) -> SequenceBatch:
        """Packs examples into one batch on the module's device, with what the module's ``example_arrays`` adds."""
        return pack(
            examples,
            share_prefix=self.module.share_prefix,
            device=self.module.device,
            extra=self._arrays(examples),
            also=self.module.example_parts(examples),
            wanted=self._wanted,
        )

    def pack_plain(self, examples: Sequence[Example]) -> SequenceBatch:
        """Packs examples into one batch on the module's device, without anything that the module adds."""
        module = self.module
        return pack(examples, share_prefix=module.share_prefix, device=module.device, wanted=self._wanted)

    def _arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {ROW_KEY: row_keys(examples), **self.module.example_arrays(examples)}

    def extra(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Returns the module's ``example_arrays`` of a batch on its device, whoever packed it."""
        if ROW_KEY not in batch.extra:
            batch.extra |= to_device(self._arrays(batch.examples), batch.input_ids.device)
        return batch.extra

    def part(self, batch: SequenceBatch, name: str) -> SequenceBatch | None:
        """Returns one of the module's ``example_parts`` of a batch, whoever packed it; ``None`` where it has none."""
        if not batch.also:
            parts = self.module.example_parts(batch.examples)
            batch.also = {key: self.pack_plain(examples) for key, examples in parts.items()}
        return batch.also.get(name)

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> Rows:
        """Scores examples without gradient in micro-batches, and returns rows in the order of ``examples``."""
        return self.map(examples, lambda batch: self._with_no_grad_rows(batch)[1] | self.module.grad_rows(batch))

    def map(self, examples: Sequence[Example], rows_of: Callable[[SequenceBatch], Rows]) -> Rows:
        """Applies a function to packed micro-batches and returns its rows in the order of ``examples``."""
        plan = self.plan(examples)
        with self.module.rounded_weights():
            rows = concatenate(rows_of(self.pack([examples[n] for n in micro])) for micro in plan)
        order = np.argsort([n for micro in plan for n in micro])
        index = to_device({"order": order}, self.module.device)["order"]
        return {name: value[index] for name, value in rows.items()}


def row_keys(examples: Sequence[Example]) -> np.ndarray:
    """Hashes row ids: ``(E,)``."""
    return _hashes(example.row_id.encode() for example in examples)


def prompt_keys(examples: Sequence[Example]) -> np.ndarray:
    """Hashes the tokens of prompts: ``(E,)``."""
    return _hashes(example.root.tokens.tobytes() for example in examples)


def _hashes(values: Iterable[bytes]) -> np.ndarray:
    digests = [blake2b(value, digest_size=8).digest() for value in values]
    return np.array([int.from_bytes(digest, "big", signed=True) for digest in digests], np.int64)


def _detached(rows: Rows) -> Rows:
    return {name: value.detach() for name, value in rows.items()}


def in_canonical_order(rows: Rows) -> Rows:
    """Sorts rows by their id, so that neither ties nor rounding depend on how they were split."""
    order = torch.argsort(rows[ROW_KEY], stable=True)
    return {name: value[order] for name, value in rows.items()}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
