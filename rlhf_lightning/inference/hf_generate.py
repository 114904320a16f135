"""Generation for models that cannot batch rows of different lengths: one prompt length at a time, by transformers.

Nothing is padded, and the cache is the model's own, so every model that transformers can generate with works; the
samples are those of the fast path, as both draw with ``sample_next_tokens``.

Legend: N rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from .completion import Request
from .decoder import special_token
from .lanes import sample_next_tokens
from .sampling import SamplingParams


class _Chooser(LogitsProcessor):
    """Draws each row's token, and masks all others so that the loop takes it."""

    def __init__(self, requests: Sequence[Request], params: SamplingParams, stop_ids: Sequence[int]) -> None:
        self.requests, self.params, self.stop_ids = requests, params, stop_ids

    def __call__(self, input_ids_NT: Tensor, scores_NV: Tensor) -> Tensor:
        rows = [row for row, request in enumerate(self.requests) if request.finish_reason is None]
        tokens = sample_next_tokens(scores_NV[rows], [self.requests[row] for row in rows], self.params, self.stop_ids)
        chosen_NV = torch.full_like(scores_NV, -math.inf)
        chosen_NV[:, 0] = 0.0  # token of finished rows, which is not read, until all rows have ended
        chosen_NV[rows, 0] = -math.inf
        chosen_NV[rows, tokens] = 0.0
        return chosen_NV


class _AllEnded(StoppingCriteria):
    """Ends the loop when all rows have ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids_NT: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = all(request.finish_reason is not None for request in self.requests)
        return torch.full((len(input_ids_NT),), ended, dtype=torch.bool, device=input_ids_NT.device)


def generate_plain(
    model: PreTrainedModel,
    requests: Sequence[Request],
    params: SamplingParams,
    stop_ids: Sequence[int],
    max_batch_tokens: int,
    *,
    use_cache: bool = True,
) -> None:
    """Generates all samples; the results are in the requests.

    Args:
        model: the bare transformers model.
        requests: the samples to make.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        max_batch_tokens: tokens of cache; one row always fits.
        use_cache: whether to use the model's cache; False if its results differ with the cache, see ``loops_exactly``.
    """
    # Equal lengths need no padding, so that any model can batch them.
    ordered = sorted(requests, key=lambda request: (len(request.prompt), request.position))
    saved = model.generation_config
    # The model's own generation settings (penalties, lengths, caches) must not change the logits that are sampled from.
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, num_beams=1)
    try:
        for length, same in groupby(ordered, key=lambda request: len(request.prompt)):
            group = list(same)
            longest = max(request.limit for request in group)
            rows = max(1, max_batch_tokens // (length + longest))
            for first in range(0, len(group), rows):
                _loop(model, group[first : first + rows], params, stop_ids, longest, use_cache)
    finally:
        model.generation_config = saved


def _loop(
    model: PreTrainedModel,
    requests: Sequence[Request],
    params: SamplingParams,
    stop_ids: Sequence[int],
    limit: int,
    use_cache: bool,
) -> None:
    input_ids_NT = torch.tensor([request.prompt for request in requests], device=next(model.parameters()).device)
    generate: Any = model.generate
    generate(
        input_ids_NT,
        attention_mask=torch.ones_like(input_ids_NT),
        max_new_tokens=limit,
        use_cache=use_cache,
        logits_processor=[_Chooser(requests, params, stop_ids)],
        stopping_criteria=[_AllEnded(requests)],
    )


def loops_exactly(model: PreTrainedModel, *, use_cache: bool) -> bool:
    """Whether transformers' loop gives the logits of full forwards without a cache, on a few greedy tokens.

    Args:
        model: the bare transformers model.
        use_cache: with the model's own cache or without.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = [special_token(model) if i == 1 else (3 + 7 * i) % vocabulary for i in range(7)]
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    generate: Any = model.generate
    saved = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, num_beams=1)
    try:
        options = {"output_logits": True, "return_dict_in_generate": True, "use_cache": use_cache}
        out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)
        # The same tokens through one forward without a cache are the reference.
        found = torch.cat(list(out.logits)).double()
        expected = model(input_ids=out.sequences[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :].double()
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError):
        return False
    finally:
        model.generation_config = saved
    half = next(model.parameters()).dtype.itemsize < 4
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30)) <= (0.1 if half else 1e-3)
