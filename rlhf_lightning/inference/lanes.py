"""Lanes: what the device keeps of the rows that are being sampled, so that a step reads nothing from the host.

A step draws every lane's next token where the scores are, and the host reads the tokens of one or several steps with
one copy.

Legend: N lanes, V vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .completion import Request
from .sampling import FACTORS, GOLDEN, MASK64, SamplingParams, check_finite, draw, mix


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies an array to a device; the host does not wait for it."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    return pinned.copy_(host).to(device, non_blocking=True)


class Lanes:
    """The lanes of some requests.

    Args:
        requests: the samples; those that have begun are continued.
        params: the sampling settings.
        stop_ids: tokens that end a sample, and that none draws before its minimum length.
        device: where scores are computed.
        vocabulary: number of scores.

    Attributes:
        tokens_N: the last token of each; before the first draw, that of the prompt.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        device: torch.device,
        vocabulary: int,
    ) -> None:
        self._params = params
        self._counts = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
        last = [request.token_ids[-1] if request.token_ids else request.prompt[-1] for request in requests]
        # One copy for all of them.
        table = np.stack((np.array(last), streams([request.seed for request in requests]), self._counts))
        self.tokens_N, self._streams_N, self._steps_N = to_device(table, device).unbind()
        barred = [token for token in stop_ids if token < vocabulary] if params.min_new_tokens else []
        self._barred = to_device(np.array(barred, dtype=np.int64), device) if barred else None
        self._seen_NV = _seen(requests, device, vocabulary) if params.repetition_penalty != 1 else None

    def __len__(self) -> int:
        """Number of lanes."""
        return len(self._counts)

    def draw(self, logits_NV: Tensor) -> Tensor:
        """Draws the next token of every lane; returns what ``read`` takes, ``(4, N)`` in double precision."""
        uniforms_N = None if self._params.greedy else uniforms_on_device(self._streams_N, self._steps_N)
        # Samples below their minimum length must not draw a token that ends them.
        barred = None
        if self._barred is not None and int(self._counts.min()) < self._params.min_new_tokens:
            barred = self._steps_N < self._params.min_new_tokens, self._barred
        drawn = draw(logits_NV, uniforms_N, self._params, seen_NV=self._seen_NV, barred=barred)

        self.tokens_N = drawn.tokens_N
        self._steps_N = self._steps_N + 1
        self._counts += 1
        if self._seen_NV is not None:
            self._seen_NV.scatter_(1, drawn.tokens_N[:, None], True)
        # Token ids and single precision are exact in double precision.
        model_logprobs_N = drawn.logprobs_N if drawn.model_logprobs_N is None else drawn.model_logprobs_N
        parts = (drawn.tokens_N, drawn.logprobs_N, model_logprobs_N, drawn.finite_N)
        return torch.stack([part.double() for part in parts])

    def keep(self, order: Sequence[int]) -> None:
        """Keeps some lanes, in a new order."""
        self._counts = self._counts[list(order)]
        index = to_device(np.array(order, dtype=np.int64), self.tokens_N.device)
        self.tokens_N, self._streams_N, self._steps_N = (
            states[index] for states in (self.tokens_N, self._streams_N, self._steps_N)
        )
        if self._seen_NV is not None:
            self._seen_NV = self._seen_NV[index]

    def append(self, other: Lanes) -> None:
        """Appends the lanes of another."""
        self._counts = np.concatenate((self._counts, other._counts))
        self.tokens_N = torch.cat((self.tokens_N, other.tokens_N))
        self._streams_N = torch.cat((self._streams_N, other._streams_N))
        self._steps_N = torch.cat((self._steps_N, other._steps_N))
        if self._seen_NV is not None and other._seen_NV is not None:
            self._seen_NV = torch.cat((self._seen_NV, other._seen_NV))


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
