"""Draws the next token: settings, seeded uniforms, filters, and one inverse-CDF draw per row.

Legend: N rows, V vocabulary, B blocks of the vocabulary, W tokens per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..utils.option_groups import OptionGroup

MASK64 = (1 << 64) - 1
# SplitMix64's constants: the factors of its finaliser, and what its state advances by.
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = 0x9E3779B97F4A7C15
# Below this vocabulary one cumulative sum over all of it is as cheap as two levels of blocks.
_DIRECT_VOCABULARY = 2048
# Candidates tried first for top-p; rows that need more are sorted in full.
_NUCLEUS_GUESS = 128


@dataclass(frozen=True, kw_only=True)
class SamplingFilters(OptionGroup):
    """Settings that change the distribution of the next token, and what ends a completion.

    The filters apply in the order of ``transformers``: repetition penalty, minimum length, temperature, top-k, top-p,
    min-p. Departure: a filter decides by the score alone, so tokens of equal score are kept or removed together (in
    ``transformers`` a sort decides which of them stays within top-p).

    Args:
        top_k: keep the ``k`` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this mass, in (0, 1]; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1]; 0 keeps all.
        repetition_penalty: above 0; divides the positive and multiplies the negative scores of tokens that the prompt
            or the completion holds already; 1 changes nothing.
        stop: strings that end a completion; its tokens include those of the stop string, its text does not.
        min_new_tokens: minimum number of tokens; only the maximum may end a completion earlier.
    """

    group: ClassVar[str] = "sampling"

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        super().__post_init__()
        self._check("top_k", self.top_k >= 0, "at least 0; 0 keeps every token")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps every token")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 keeps every token")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing")
        self._check("stop", "" not in self.stop, "strings of at least one character")
        self._check("min_new_tokens", self.min_new_tokens >= 0, "at least 0")

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{self.full_name(name)}={getattr(self, name)!r} is not allowed: it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingFilters):
    """All settings of sampling: the filters, the temperature, the maximum length, and the seed.

    Args:
        max_new_tokens: maximum number of tokens, at least 1; the end-of-sequence token counts.
        temperature: at least 0; 0 takes the most likely token.
        stop_token_ids: tokens that end a completion, besides the model's own end-of-sequence tokens.
        seed: makes every sample a function of (seed, prompt number, sample number); ``None`` draws one from torch's
            global generator at each call.
        model_logprobs: also record log-probabilities under the unmodified model (temperature 1, nothing filtered).

    Example:
        >>> SamplingParams(max_new_tokens=64, temperature=0.7, top_p=0.95, seed=1).greedy
        False
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    model_logprobs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        super().__post_init__()
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        positive = "at least 0; 0 takes the most likely token"
        self._check("temperature", 0 <= self.temperature < math.inf, positive)
        fits = self.min_new_tokens <= self.max_new_tokens
        self._check("min_new_tokens", fits, f"at most max_new_tokens={self.max_new_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


class SampledTokens(NamedTuple):
    """One sampled token per row.

    Attributes:
        tokens_N: token ids.
        logprobs_N: log-probabilities under the distribution that was sampled from: 0 where the draw was greedy.
        model_logprobs_N: under the unmodified model, or ``None`` where not asked for.
        finite_N: whether the row's scores were finite; nothing else of a row may be used if they were not.
    """

    tokens_N: Tensor
    logprobs_N: Tensor
    model_logprobs_N: Tensor | None
    finite_N: Tensor


def derive_seed(*parts: int | str) -> int:
    """Mixes numbers and strings into one 64-bit seed.

    Example:
        >>> derive_seed(7, "train:12", 0) != derive_seed(7, "train:12", 1)
        True
    """
    digest = blake2b(digest_size=8)
    for part in parts:
        text = (part if isinstance(part, str) else f"\0{int(part)}").encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection on 64 bits whose output bits each depend on all input bits."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(FACTORS[0])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(FACTORS[1])
    return state ^ (state >> np.uint64(31))


def uniforms(seeds: npt.ArrayLike, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns one number in (0, 1) per (seed, step), a function of these two alone.

    SplitMix64 (Steele, Lea and Flood, 2014) used as a counter-based generator: step ``t`` of a seed is the mixed sum of
    the mixed seed and ``t`` times the golden ratio, so that no state has to be kept or advanced.

    Args:
        seeds: 64-bit integers; larger or negative ones are taken modulo ``2**64``.
        steps: non-negative integers, same shape.

    Example:
        >>> bool((uniforms([3, 3], [0, 1]) == uniforms([3], [0])).tolist() == [True, False])
        True
    """
    seeds_64 = np.array([int(seed) & MASK64 for seed in np.asarray(seeds, dtype=object).ravel()], dtype=np.uint64)
    return _uniforms64(seeds_64, np.asarray(steps, dtype=np.uint64))


def _uniforms64(seeds: npt.NDArray[np.uint64], steps: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    # SplitMix64 with the seed mixed first, so that neighbouring seeds and steps are unrelated.
    bits = mix(mix(seeds) + (steps + np.uint64(1)) * np.uint64(GOLDEN))
    # 52 bits and half a step keep clear of both ends: 0 would pick a token of no mass, 1 would run off the end.
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def sample_tokens(
    logits_NV: Tensor,
    uniforms_N: Tensor | None,
    params: SamplingParams,
    *,
    seen_NV: Tensor | None = None,
    barred: tuple[Tensor, Tensor] | None = None,
) -> SampledTokens:
    """Samples one token per row by inverting the cumulative distribution at one uniform per row.

    Nothing is read back from the device.

    Args:
        logits_NV: the model's scores; left as they are.
        uniforms_N: numbers in (0, 1) in double precision; not read when greedy.
        params: temperature, filters and penalty.
        seen_NV: true where a token is in the row's prompt or completion; needed with a repetition penalty.
        barred: true for rows in which some tokens must not be drawn yet, and these tokens.

    Returns:
        The tokens; ``check_finite`` must be called on their ``finite_N`` before they are used.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> sample_tokens(logits, None, SamplingParams(temperature=0)).tokens_N.tolist()
        [2]
    """
    raw_NV = logits_NV.float()
    scores_NV = raw_NV

    # Before the temperature, as in transformers: scores of seen tokens move away from being chosen.
    if params.repetition_penalty != 1 and seen_NV is not None:
        penalty = params.repetition_penalty
        punished_NV = torch.where(scores_NV < 0, scores_NV * penalty, scores_NV / penalty)
        scores_NV = torch.where(seen_NV, punished_NV, scores_NV)

    # Never in place on the caller's logits.
    if barred is not None:
        rows_N, tokens = barred
        scores_NV = scores_NV.clone() if scores_NV is logits_NV or params.model_logprobs else scores_NV
        scores_NV[:, tokens] = scores_NV[:, tokens].masked_fill(rows_N[:, None], -math.inf)
    if params.greedy:
        tokens_N = scores_NV.argmax(-1)
        logprobs_N = torch.zeros(len(tokens_N), dtype=torch.float32, device=tokens_N.device)
        finite_N = torch.isfinite(scores_NV.gather(-1, tokens_N[:, None])).squeeze(-1)
    else:
        if uniforms_N is None:
            raise ValueError(f"temperature={params.temperature} samples, and sampling needs one uniform per row")
        tokens_N, logprobs_N, finite_N = _sample_filtered(scores_NV, uniforms_N, params)

    # Under the model itself: temperature 1, without filters and penalties.
    model_logprobs_N = None
    if params.model_logprobs:
        model_logprobs_N = raw_NV.gather(-1, tokens_N[:, None]).squeeze(-1) - raw_NV.logsumexp(-1)
    return SampledTokens(tokens_N, logprobs_N, model_logprobs_N, finite_N)


def check_finite(finite: bool) -> None:
    """Refuses NaN and infinity among the scores of rows that were drawn from."""
    if not finite:
        raise ValueError(
            "the model's scores hold NaN or infinity: no token can be drawn; check its weights and precision"
        )


def _sample_filtered(scores_NV: Tensor, uniforms_N: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Applies temperature and filters, and draws; the largest score becomes 0, so that no exponential overflows.

    Returns:
        The tokens, their log-probabilities, and whether the scores were finite: NaN and infinity anywhere in a row
        reach its maximum or its total.
    """
    work_NV = scores_NV - scores_NV.amax(-1, keepdim=True)
    if params.temperature != 1:
        work_NV.div_(params.temperature)
    # Filters apply after the temperature, as in transformers and vLLM.
    floor_N1 = _floor(work_NV, params)
    if floor_N1 is not None:
        work_NV.masked_fill_(work_NV < floor_N1, -math.inf)
    weights_NV = work_NV.exp_()
    tokens_N, total_N = _invert(weights_NV, uniforms_N)
    logprobs_N = weights_NV.gather(-1, tokens_N[:, None]).squeeze(-1).log() - total_N.log().float()
    return tokens_N, logprobs_N, torch.isfinite(total_N)


def _floor(work_NV: Tensor, params: SamplingParams) -> Tensor | None:
    """The lowest score that survives top-k, top-p and min-p in each row, ``(N, 1)``; ``None`` without a filter.

    A filter keeps the tokens above some score, so filters in sequence are one comparison with the highest of their
    floors; top-p measures its mass among the survivors of top-k, and min-p depends on the top token, which all keep.
    """
    vocabulary = work_NV.shape[-1]
    floors = []
    top_k_N1 = None
    if 0 < params.top_k < vocabulary:
        top_k_N1 = work_NV.topk(params.top_k, dim=-1).values[:, -1:]
        floors.append(top_k_N1)
    if params.top_p < 1:
        floors.append(_nucleus_floor(work_NV, top_k_N1, params))
    if params.min_p > 0:
        floors.append(torch.full_like(work_NV[:, :1], math.log(params.min_p)))
    if not floors:
        return None
    return torch.stack(floors).amax(0)


def _nucleus_floor(work_NV: Tensor, top_k_N1: Tensor | None, params: SamplingParams) -> Tensor:
    """The score of the last token of the smallest most-likely set with mass ``top_p``, ``(N, 1)``."""
    survivors_NV = work_NV if top_k_N1 is None else work_NV.masked_fill(work_NV < top_k_N1, -math.inf)
    mass_N1 = survivors_NV.exp().sum(-1, keepdim=True, dtype=torch.float64)

    # Usually a few tokens hold the mass: try the best ones before sorting all.
    size = min(max(_NUCLEUS_GUESS, params.top_k), survivors_NV.shape[-1])
    best_NS = survivors_NV.topk(size, dim=-1).values
    floor_N1, reached_N = _mass_floor(best_NS, mass_N1, params.top_p)
    if size == survivors_NV.shape[-1]:
        return floor_N1
    # On another device, sorting every row is cheaper than waiting for the answer.
    if survivors_NV.device.type != "cpu":
        return _mass_floor(survivors_NV.sort(dim=-1, descending=True).values, mass_N1, params.top_p)[0]
    if not bool(reached_N.all()):
        rows = (~reached_N).nonzero().squeeze(-1)
        ordered = survivors_NV[rows].sort(dim=-1, descending=True).values
        floor_N1[rows] = _mass_floor(ordered, mass_N1[rows], params.top_p)[0]
    return floor_N1


def _mass_floor(best_NS: Tensor, mass_N1: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The last score with less than ``top_p`` of the mass before it, and whether it is among those given."""
    share_NS = best_NS.exp().double().cumsum(-1) / mass_N1
    kept_N1 = 1 + (share_NS < top_p).sum(-1, keepdim=True)
    size = best_NS.shape[-1]
    return best_NS.gather(-1, (kept_N1 - 1).clamp(max=size - 1)), (kept_N1 <= size).squeeze(-1)


def _invert(weights_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first token at which the cumulative weight exceeds ``uniform * total``, and the total.

    Large vocabularies go block by block: one pass sums the blocks, the block is found among these sums, and only that
    block is accumulated token by token.
    """
    vocabulary = weights_NV.shape[-1]
    if vocabulary <= _DIRECT_VOCABULARY:
        token_N1, _, total_N1 = _first_above(weights_NV, uniforms_N[:, None])
        return token_N1.squeeze(-1), total_N1.squeeze(-1)

    # Two levels of about the square root of the vocabulary each.
    width = 1 << round(math.log2(vocabulary) / 2)
    blocks = vocabulary // width
    sums_NB = weights_NV[:, : blocks * width].unflatten(-1, (blocks, width)).sum(-1)
    if blocks * width < vocabulary:
        sums_NB = torch.cat((sums_NB, weights_NV[:, blocks * width :].sum(-1, keepdim=True)), dim=-1)
    block_N1, rest_N1, total_N1 = _first_above(sums_NB, uniforms_N[:, None])

    # Within the block, at the fraction of its weight that is left.
    index_NW = block_N1 * width + torch.arange(width, device=weights_NV.device)
    block_NW = weights_NV.gather(-1, index_NW.clamp(max=vocabulary - 1))
    block_NW = block_NW.masked_fill(index_NW >= vocabulary, 0.0)
    within_N1, _, _ = _first_above(block_NW, rest_N1)
    return (block_N1 * width + within_N1).squeeze(-1).clamp(max=vocabulary - 1), total_N1.squeeze(-1)


def _first_above(weights_NX: Tensor, fraction_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first entry whose cumulative weight exceeds that fraction of the total.

    Returns:
        The entry's index, the fraction of the entry's own weight at which the target lies, and the total; each (N, 1).
    """
    cumulative_NX = weights_NX.double().cumsum(-1)
    total_N1 = cumulative_NX[:, -1:].contiguous()
    # In fp64: a sum over the vocabulary in fp32 would move the boundaries between tokens.
    target_N1 = fraction_N1 * total_N1
    index_N1 = torch.searchsorted(cumulative_NX, target_N1, right=True)
    # Rounding may push a target to the very end: the last entry that has weight takes it.
    last_N1 = torch.searchsorted(cumulative_NX, total_N1, right=False)
    # NaN, which the caller refuses, is past every entry.
    index_N1 = torch.minimum(index_N1, last_N1).clamp(max=weights_NX.shape[-1] - 1)
    weight_N1 = weights_NX.gather(-1, index_N1).double()
    before_N1 = cumulative_NX.gather(-1, index_N1) - weight_N1
    return index_N1, ((target_N1 - before_N1) / weight_N1).clamp(0.0, 1.0), total_N1
