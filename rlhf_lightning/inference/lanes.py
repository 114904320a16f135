"""Lanes: what the device keeps of the rows that are being sampled, so that a step reads nothing from the host.

A step draws every lane's next token where the scores are, and the host reads the tokens of one or several steps with
one copy.

Legend: N lanes, V vocabulary, S steps, K drafts of a lane, W = K + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .completion import Request
from .sampling import FACTORS, GOLDEN, MASK64, SamplingParams, check_finite, mix, sample_tokens


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies an array to a device; the host does not wait for it."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)  # whatever the default device is
    return pinned.copy_(host).to(device, non_blocking=True)


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size`` and ``least``.

    Example:
        >>> [bucket(size) for size in (1, 5, 64)], bucket(3, least=16)
        ([1, 8, 64], 16)
    """
    return max(least, 1 << (size - 1).bit_length())


class Lanes:
    """The lanes of some requests.

    Args:
        requests: the samples; begun ones are continued.
        params: the sampling settings.
        stop_ids: tokens that end a sample, and that none draws before its minimum length.
        device: where scores are computed.
        vocabulary: number of scores.
        fixed_width: whether their number is a power of two, lanes at the end being idle, and each notices its end on
            the device, so that several steps can be drawn before the host reads them.

    Attributes:
        tokens_N: the last token of each; before the first draw, that of the prompt.
        alive_N: with ``fixed_width``, the lanes that are not idle and have not ended; stop strings end none here.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        device: torch.device,
        vocabulary: int,
        *,
        fixed_width: bool = False,
    ) -> None:
        self._params, self._fixed = params, fixed_width
        self._counts = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
        last = [request.token_ids[-1] if request.token_ids else request.prompt[-1] for request in requests]
        limits = np.array([request.limit for request in requests])
        # One copy for all of them.
        table = np.stack((np.array(last), streams([request.seed for request in requests]), self._counts, limits))
        self.tokens_N, self._streams_N, self._steps_N, self._limits_N = to_device(table, device).unbind()
        known = [token for token in stop_ids if token < vocabulary]
        self._stops = to_device(np.array(known, dtype=np.int64), device) if known else None
        self._seen_NV = _seen(requests, device, vocabulary) if params.repetition_penalty != 1 else None
        self.alive_N = torch.ones(len(requests), dtype=torch.bool, device=device) if fixed_width else None

    def __len__(self) -> int:
        """Number of lanes, without idle ones."""
        return len(self._counts)

    def draw(self, logits_NV: Tensor) -> Tensor:
        """Draws the next token of every lane; returns what ``read`` takes, ``(4, N)`` in double precision."""
        uniforms_N = None if self._params.greedy else uniforms_on_device(self._streams_N, self._steps_N)
        # Samples below their minimum length must not draw a token that ends them.
        barred = None
        if self._stops is not None and int(self._counts.min()) < self._params.min_new_tokens:
            barred = self._steps_N < self._params.min_new_tokens, self._stops
        drawn = sample_tokens(logits_NV, uniforms_N, self._params, seen_NV=self._seen_NV, barred=barred)

        self._counts += 1
        if self.alive_N is None:
            self.tokens_N = drawn.tokens_N
            self._steps_N = self._steps_N + 1
        else:
            self._advance(drawn.tokens_N, self.alive_N)
        if self._seen_NV is not None:
            self._seen_NV.scatter_(1, self.tokens_N[:, None], True)
        # Token ids and single precision are exact in double precision.
        model_logprobs_N = drawn.logprobs_N if drawn.model_logprobs_N is None else drawn.model_logprobs_N
        parts = (drawn.tokens_N, drawn.logprobs_N, model_logprobs_N, drawn.finite_N)
        return torch.stack([part.double() for part in parts])

    def _advance(self, tokens_N: Tensor, alive_N: Tensor) -> None:
        """Takes the tokens of lanes that are alive, and finds the ended ones."""
        self.tokens_N = tokens_N.where(alive_N, self.tokens_N)
        self._steps_N = self._steps_N + alive_N
        alive_N = alive_N & (self._steps_N < self._limits_N)
        if self._stops is not None:
            ended_N = (self.tokens_N[:, None] == self._stops).any(-1)
            alive_N = alive_N & ~(ended_N & (self._steps_N >= self._params.min_new_tokens))
        self.alive_N = alive_N

    def keep(self, order: Sequence[int]) -> None:
        """Keeps some lanes, in a new order; none of them has ended."""
        kept = list(order)
        self._counts = self._counts[kept]
        width = bucket(len(kept)) if self._fixed and kept else len(kept)
        # Idle lanes repeat the first.
        index = np.array([*kept, *kept[:1] * (width - len(kept))], dtype=np.int64)
        chosen = to_device(np.stack((index, np.arange(width) < len(kept))), self.tokens_N.device)
        self._select(chosen[0])
        if self._fixed:
            self.alive_N = chosen[1].bool()

    def _select(self, index: Tensor) -> None:
        self.tokens_N, self._streams_N, self._steps_N, self._limits_N = (
            states[index] for states in (self.tokens_N, self._streams_N, self._steps_N, self._limits_N)
        )
        if self._seen_NV is not None:
            self._seen_NV = self._seen_NV[index]

    def append(self, other: Lanes) -> None:
        """Appends the lanes of another."""
        ours, theirs = len(self), len(other)
        self._counts = np.concatenate((self._counts, other._counts))
        self.tokens_N = torch.cat((self.tokens_N[:ours], other.tokens_N[:theirs]))
        self._streams_N = torch.cat((self._streams_N[:ours], other._streams_N[:theirs]))
        self._steps_N = torch.cat((self._steps_N[:ours], other._steps_N[:theirs]))
        self._limits_N = torch.cat((self._limits_N[:ours], other._limits_N[:theirs]))
        if self._seen_NV is not None and other._seen_NV is not None:
            self._seen_NV = torch.cat((self._seen_NV[:ours], other._seen_NV[:theirs]))
        if self._fixed:
            self.keep(range(ours + theirs))

    def copy(self) -> Lanes:
        """Lanes that draw ahead while these stay as they are."""
        other = copy(self)
        other._counts = self._counts.copy()
        other._seen_NV = None if self._seen_NV is None else self._seen_NV.clone()
        return other

    def ahead(self, drafts_NK: Tensor) -> Lanes:
        """Lanes for this and the next K steps of every lane, as if its drafts were what the steps before them draw.

        Args:
            drafts_NK: token ids; -1 where there is no draft, and then the steps after it mean nothing.

        Returns:
            ``N * W`` lanes, the steps of a lane next to each other.
        """
        width = drafts_NK.shape[1] + 1
        other = copy(self)
        other._counts = (self._counts[:, None] + np.arange(width)).ravel()
        other._streams_N = self._streams_N.repeat_interleave(width)
        other._steps_N = (self._steps_N[:, None] + torch.arange(width, device=drafts_NK.device)).flatten()
        if self._seen_NV is not None:
            seen_NWV = self._seen_NV[:, None].repeat(1, width, 1)
            # Each draft is seen by the steps after it.
            for column, drafts_N in enumerate(drafts_NK.clamp(min=0).unbind(1), start=1):
                seen_NWV[:, column:].scatter_(2, drafts_N[:, None, None].expand(-1, width - column, 1), True)
            other._seen_NV = seen_NWV.flatten(0, 1)
        return other

    def take(self, tokens_NW: Tensor, kept_N: Tensor, counts: Sequence[int]) -> None:
        """Takes the first tokens of each lane as drawn.

        Args:
            tokens_NW: tokens.
            kept_N: how many of each lane's, at least 1.
            counts: the same numbers on the host.
        """
        self.tokens_N = tokens_NW.gather(1, kept_N[:, None] - 1).squeeze(1)
        self._steps_N = self._steps_N + kept_N
        self._counts += np.array(counts, dtype=np.int64)
        if self._seen_NV is not None:
            taken_NW = torch.arange(tokens_NW.shape[1], device=kept_N.device) < kept_N[:, None]
            self._seen_NV.scatter_(1, tokens_NW.where(taken_NW, self.tokens_N[:, None]), True)


def read(drawn: Sequence[Tensor], requests: Sequence[Request], params: SamplingParams) -> None:
    """Reads the draws of one or several steps with one copy, and appends them to requests that have not finished.

    Args:
        drawn: ``Lanes.draw`` of each step.
        requests: those of the lanes.
        params: the sampling settings.

    Raises:
        ValueError: scores that were drawn from were not finite.
    """
    for tokens, logprobs, model_logprobs, finite in torch.stack(list(drawn)).tolist():
        for row, request in enumerate(requests):
            if request.finish_reason is None:
                check_finite(bool(finite[row]))
                request.push(int(tokens[row]), logprobs[row], model_logprobs[row] if params.model_logprobs else None)


def sample_next_tokens(
    logits_NV: Tensor, requests: Sequence[Request], params: SamplingParams, stop_ids: Sequence[int]
) -> list[int]:
    """Draws the next token of every request from its row of logits and appends it; returns the tokens."""
    lanes = Lanes(requests, params, stop_ids, logits_NV.device, logits_NV.shape[-1])
    read([lanes.draw(logits_NV)], requests, params)
    return [request.token_ids[-1] for request in requests]


def remaining(count: int, leaving: Sequence[int]) -> list[int]:
    """The rows that stay, in their new order: the last row takes the index of one that leaves.

    Args:
        count: number of rows.
        leaving: rows that leave, in ascending order.

    Example:
        >>> remaining(5, [1, 3])
        [0, 4, 2]
    """
    order = list(range(count))
    # From the end, because the last row may leave as well.
    for row in reversed(leaving):
        order[row] = order[-1]
        order.pop()
    return order


def streams(seeds: Sequence[int]) -> npt.NDArray[np.int64]:
    """The mixed seeds, which ``uniforms_on_device`` reads; torch computes with signed integers alone."""
    return mix(np.array([seed & MASK64 for seed in seeds], dtype=np.uint64)).view(np.int64)


def uniforms_on_device(streams_N: Tensor, steps_N: Tensor) -> Tensor:
    """Returns the same numbers as ``uniforms``, on any device.

    Args:
        streams_N: ``streams`` of the seeds.
        steps_N: non-negative integers.

    Example:
        >>> from rlhf_lightning.inference.sampling import uniforms
        >>> numbers = uniforms_on_device(torch.from_numpy(streams([7, -1])), torch.tensor([0, 3]))
        >>> numbers.tolist() == uniforms([7, -1], [0, 3]).tolist()
        True
    """
    state = streams_N + (steps_N + 1) * _signed(GOLDEN)
    # The finaliser of SplitMix64; products of signed integers wrap as those of unsigned ones do.
    state = (state ^ _shifted(state, 30)) * _signed(FACTORS[0])
    state = (state ^ _shifted(state, 27)) * _signed(FACTORS[1])
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 12).double() + 0.5) * 2.0**-52


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shifts bits to the right, with zeros on the left, where torch repeats the sign."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _seen(requests: Sequence[Request], device: torch.device, vocabulary: int) -> Tensor:
    """Marks the tokens in each request's prompt and completion, ``(N, V)``."""
    known = [(*request.prompt, *request.token_ids) for request in requests]
    # Short rows repeat one of their tokens.
    table = np.array([tokens + tokens[-1:] * (max(map(len, known)) - len(tokens)) for tokens in known], dtype=np.int64)
    seen_NV = torch.zeros((len(requests), vocabulary), dtype=torch.bool, device=device)
    return seen_NV.scatter_(1, to_device(table, device), True)
