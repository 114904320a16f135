"""Sampling and its arithmetic: the probe of a half-precision model, and completions of a least length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_lightning import GRPOModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.models import hidden_states, layout, resolve_layout
from rlhf_lightning.models.backbone import TOLERANCE
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.sequences import register_attention

from ..helpers import EOS_ID, save_tiny_model, tiny_model
from ..modules.naive import naive_model, step
from ..rl.fixed_rollouts import prompts, remainder

# The probe.

WRONG = 5e-3  # of the packed states: within what half precision rounds, and far above what fp32 does


def shifted(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Makes packed states wrong by a share of their norm, as a small mistake of a mask would."""

    class Shifted:
        def __init__(self, states: Any) -> None:
            self.states = states

        def read(self, *place: Any) -> torch.Tensor:
            return self.states.read(*place) * (1 + share)

    def wrong(model: Any, batch: Any, kind: Any) -> Any:
        states = hidden_states(model, batch, kind)
        return Shifted(states) if kind == "packed" else states

    monkeypatch.setattr(layout, "hidden_states", wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mistake_finer_than_half_precision_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOLERANCE[torch.float32] < WRONG < TOLERANCE[dtype]
    model: Any = tiny_model("llama", dtype=dtype)
    set_attention(model, register_attention())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert resolve_layout(model, "packed") == "packed"
    shifted(monkeypatch, WRONG)
    with pytest.raises(ValueError, match=r"packed hidden states differ from its own eager forward by 5\.0e-03"):
        resolve_layout(model, "packed")
    assert resolve_layout(model, "auto") == "padded"

    # The weights are widened for the time of the probe alone.
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_half_precision_rounds_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance is that of fp32, not zero."""
    model: Any = tiny_model("llama", dtype=torch.bfloat16)
    set_attention(model, register_attention())
    shifted(monkeypatch, TOLERANCE[torch.float32] / 2)
    assert resolve_layout(model, "packed") == "packed"


# Completions of a least length.

LEAST = 4


def test_a_correction_covers_tokens_that_may_not_end_yet(tmp_path: Any) -> None:
    """Before ``min_new_tokens`` samples come from p without the end, p / (1 - p(end)): the weight is 1 - p(end)."""
    folder = str(save_tiny_model(tmp_path / "model", "gpt2", initializer_range=0.5))
    module = GRPOModule(
        folder,
        rewards=[remainder],
        sampling={"min_new_tokens": LEAST},
        off_policy={"correction": "token_truncate"},
        num_generations=6,
        max_completion_length=LEAST + 2,
    )
    policy = naive_model(folder)
    drawn: list[list[Completion]] = []
    generate = module.generate

    def watched(*given: Any) -> list[list[Completion]]:
        found = generate(*given)
        drawn.extend(found)
        return found

    module.generate = watched  # type: ignore[method-assign, assignment]
    rows = prompts(4)
    found = step(module, rows, policy).metrics

    weights = []
    for row, group in zip(rows, drawn, strict=True):
        prompt = row.root.tokens.tolist()
        for sample in group:
            logits = policy(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1]
            ends = logits.softmax(-1)[:, EOS_ID].tolist()
            weights += [1 - end if n < LEAST else 1.0 for n, end in enumerate(ends)]
    assert min(weights) < 0.9  # else any weights near 1 would do
    assert weights.count(1.0) > 0
    assert found["train/sampling/importance_sampling_ratio/min"] == pytest.approx(min(weights), rel=1e-4)
    assert found["train/sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, rel=1e-4)
    assert found["train/sampling/importance_sampling_ratio/mean"] == pytest.approx(
        sum(weights) / len(weights), rel=1e-4
    )
