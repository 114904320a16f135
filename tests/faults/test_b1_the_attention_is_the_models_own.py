"""No model trains, scores or samples with another attention than its own eager one: it agrees, or it is refused.

The oracle is the model's own forward by its eager attention, one sequence at a time, without padding and cache.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.inference.engine import LocalEngine
from rlhf_lightning.inference.sampling import SamplingParams
from rlhf_lightning.models import resolve_layout, token_stats
from rlhf_lightning.models.backbone import fix_rotary_frequencies
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.sequences import Example, Segment, SequenceBatch, pack, register_attention

from .small_models import REACH, UNBUILT, VOCAB, TooLong, all_types, at_most, small_model

FAST = (
    "bloom",
    "xglm",
    "gpt_oss",
    "llama4_text",
    "doge",
    "deepseek_v32",
    "bert",
    "falcon",
    "qwen3_next",
    "gemma2",
    "mamba",
)
NEW_TOKENS = REACH + 4
WAYS = ("layout auto", "layout padded", "sampling")
SHARES = 6  # of the sweep, for several workers
LEAST_TYPES = 110  # that are compared, over all shares


def forest() -> SequenceBatch:
    """A pair, a tree and a lone sequence: longer than any window, and than the probe."""
    generator = torch.Generator().manual_seed(5)

    def leaf(count: int, *children: Segment) -> Segment:
        return Segment(torch.randint(3, VOCAB, (count,), generator=generator).tolist(), [1.0] * count, children)

    def prompt(count: int, *children: Segment) -> Segment:
        return Segment(torch.randint(3, VOCAB, (count,), generator=generator).tolist(), children=children)

    trees = [prompt(26, leaf(5), leaf(14)), prompt(7, leaf(3), leaf(20, leaf(9), leaf(2))), prompt(1, leaf(REACH + 13))]
    return pack([Example(f"rows:{n}", tree) for n, tree in enumerate(trees)])


def own_logprobs(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    found = []
    for number, path in enumerate(batch.path_index.split(batch.lengths.tolist())):
        logits = model(input_ids=batch.input_ids[path][None], use_cache=False).logits[0]
        mine = batch.sequence_index == number
        rows = logits[batch.source_depth[mine]].float().log_softmax(dim=-1)
        found.append(rows.gather(1, batch.target_ids[mine][:, None])[:, 0])
    return torch.cat(found)


def gradient(model: PreTrainedModel, logprobs: Tensor) -> Tensor:
    slope = torch.linspace(-1, 1, len(logprobs))
    model.zero_grad()
    (logprobs * slope).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def far(found: Tensor, expected: Tensor) -> bool:
    return not float((found - expected).norm() / expected.norm().clamp_min(1e-30)) < 2e-3


def refused(error: ValueError) -> str:
    return f"refused ({error})" if "\n" not in str(error) else f"DIFFERS (a message of several lines: {error})"


def trained(kind: str, layout: Any) -> str:
    """Outcome of a model of a type in training and scoring."""
    theirs = small_model(kind)
    mine = copy.deepcopy(theirs)
    set_attention(mine, register_attention())  # as loading does
    batch = forest()
    try:
        fix_rotary_frequencies(mine)
        place = resolve_layout(mine, layout)
    except ValueError as error:
        return refused(error)
    expected, found = own_logprobs(theirs, batch), token_stats(mine, batch, place).logprobs
    if far(found.detach(), expected.detach()):
        return f"DIFFERS ({place}, forward)"
    if far(gradient(mine, found), gradient(theirs, expected)):
        return f"DIFFERS ({place}, gradient)"
    return f"agree ({place})"


def sampled(kind: str) -> str:
    """Outcome of a model of a type in sampling, with rows of different length in one batch."""
    theirs = small_model(kind)
    mine = copy.deepcopy(theirs)
    set_attention(mine, register_attention())
    prompts = [[5, 9, 33, 7, 8, 11, 40], [12, 3], [*range(10, 10 + REACH + 3)]]
    # So hot that the tokens are drawn from many: what has all of its weight on one token would agree with anything.
    with torch.no_grad():
        temperature = max(1.0, float(theirs(input_ids=torch.tensor(prompts[-1:]), use_cache=False).logits.std()))
    engine = LocalEngine(mine, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature, seed=3)
            groups = engine.generate(prompts, 1, params)
        except ValueError as error:
            return refused(error)
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = theirs(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        rows = (logits / temperature).log_softmax(-1)
        expected = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
        if far(torch.tensor(completion.logprobs), expected):
            return "DIFFERS (sampling)"
        if len(completion.token_ids) > 4 and float(expected.mean()) > -0.1:
            return "DIFFERS (its tokens are certain, which compares nothing)"
    return "agree"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAST)
def test_a_type_agrees_or_is_refused(kind: str) -> None:
    for layout in ("auto", "padded"):
        assert not trained(kind, layout).startswith("DIFFERS"), layout
    assert not sampled(kind).startswith("DIFFERS")


def test_the_sweep_compares_at_least_so_many_types() -> None:
    """Each share fails where one of these is not built, so that all shares together compare as many."""
    expected = set(all_types()) - UNBUILT
    assert len(expected) >= LEAST_TYPES
    assert set(FAST) <= expected


@pytest.mark.slow
@pytest.mark.timeout(450)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", range(SHARES))
def test_every_type_that_builds_small_agrees_or_is_refused(
    share: int, record_property: Callable[[str, object], None]
) -> None:
    """Prints each type (``pytest -s`` shows them); the counts of all shares stand at the end of the run."""
    named = os.environ.get("RLHF_LIGHTNING_TYPES", "").split()
    kinds = (named or all_types())[share::SHARES]
    counts, wrong = Counter[str](), []
    for kind in kinds:
        try:
            with at_most(20):
                small_model(kind)
        except (Exception, TooLong) as error:
            print(f"{kind:24} not built: {type(error).__name__}")
            counts["not built"] += 1
            wrong += [] if kind in UNBUILT else [f"{kind}: not built ({type(error).__name__})"]
            continue
        found = _compared(kind)
        print(f"{kind:24} {' | '.join(text[:110] for text in found)}", flush=True)
        counts["built"] += 1
        counts.update(f"{name}: {text.split(' (')[0]}" for name, text in zip(WAYS, found, strict=True))
        wrong += [f"{kind}: {text}" for text in found if text.startswith("DIFFERS")]
    record_property(f"types, {', '.join(WAYS)}", dict(counts))
    assert not wrong, wrong


def _compared(kind: str) -> list[str]:
    """Outcome of a type in each of ``WAYS``."""
    found = []
    for check in (lambda: trained(kind, "auto"), lambda: trained(kind, "padded"), lambda: sampled(kind)):
        try:
            with at_most(30):
                found.append(check())
        except TooLong:
            found.append("too slow here")
        except Exception as error:  # the model's own forward, or a message of more than one line
            found.append(f"DIFFERS (raised {type(error).__name__}: {str(error)[:80]})")
    return found
