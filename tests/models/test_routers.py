"""Which routers' loss is known, and what is recorded of a pass, against transformers' own forward."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.losses.router import load_balancing_loss
from rlhf_lightning.models import resolve_layout
from rlhf_lightning.models.backbone import Layout, hidden_states
from rlhf_lightning.models.dropout import recompute
from rlhf_lightning.models.layout import probe_batch
from rlhf_lightning.models.routers import RouterRecorder, Routers, find_routers, recording
from rlhf_lightning.sequences import register_attention

from ..faults.small_models import all_types, at_most, small_model
from ..helpers import tiny_config, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = tiny_model("qwen3_moe", attn_implementation=register_attention())
    model.requires_grad_(True)
    return model


def own_loss(model: Any) -> torch.Tensor:
    """Computes all paths of the probe by transformers, as rows of one padded batch."""
    padded = probe_batch(model).padded(extra=3)
    given = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    loss: torch.Tensor = model(**given, output_router_logits=True, use_cache=False).aux_loss
    return loss


def test_routers_are_found_without_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    assert find_routers(model) == Routers(4, 2)
    assert "forward" not in vars(model.model)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_models_without_such_a_loss_have_none(kind: str) -> None:
    """DeepSeek's routers are recorded, but transformers has no loss for them."""
    assert find_routers(small_model(kind)) is None


def test_a_type_with_routers_may_have_none() -> None:
    assert find_routers(tiny_model("qwen3_moe", mlp_only_layers=[0, 1])) is None
    assert find_routers(tiny_model("qwen3_moe", mlp_only_layers=[0])) == Routers(4, 2)


def test_a_loss_that_is_another_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.qwen3_moe.modeling_qwen3_moe as theirs

    own = theirs.load_balancing_loss_func
    monkeypatch.setattr(theirs, "load_balancing_loss_func", lambda *args, **kwargs: 1.01 * own(*args, **kwargs))
    assert find_routers(tiny_model("qwen3_moe")) is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_recorded_is_what_transformers_makes_of_unshared_rows(
    model: PreTrainedModel, layout: Layout, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = probe_batch(model)
    expected = own_loss(model)
    weight = model.model.layers[0].mlp.gate.weight
    (expected_slope,) = torch.autograd.grad(expected, weight)
    if checkpointing:
        for layer in model.model.layers:
            monkeypatch.setattr(layer, "gradient_checkpointing", True)
            monkeypatch.setattr(layer, "_gradient_checkpointing_func", recompute, raising=False)
            monkeypatch.setattr(layer, "training", True)
    with recording(model, Routers(4, 2)) as recorder:
        hidden_states(model, batch, layout)
    loss = load_balancing_loss(recorder.sums)
    (slope,) = torch.autograd.grad(loss, weight)
    assert float(recorder.sums.weight) == 2 * int(batch.lengths.sum())  # of two layers, whatever is recomputed
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-6)


def test_passes_add_up_and_those_of_other_models_do_not(model: PreTrainedModel) -> None:
    batch, other = probe_batch(model), copy.deepcopy(model)
    with recording(model, Routers(4, 2)) as recorder, torch.no_grad():
        hidden_states(other, batch, "packed")
        hidden_states(model, batch, "packed")
        hidden_states(model, batch, "padded")
    hidden_states(model, batch, "packed")
    assert float(recorder.sums.weight) == 2 * 2 * int(batch.lengths.sum())


def test_nothing_recorded_is_an_error() -> None:
    recorder = RouterRecorder(Routers(4, 2))
    with pytest.raises(ValueError, match="no pass of the decoder was recorded"):
        assert recorder.sums
    with pytest.raises(ValueError, match=r"shapes none for 3 tokens and 4 experts.*router_aux_loss_coef=0"):
        recorder.add(None, torch.ones(3))
    with pytest.raises(ValueError, match=r"shapes \(2, 4\) for 3 tokens"):
        recorder.add([torch.zeros(1, 2, 4)], torch.ones(3))


def kinds_with_routers() -> list[str]:
    """Types whose default config has a coefficient of a loss on routers, or experts."""
    found = []
    for kind in all_types():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = AutoConfig.for_model(kind)
            except Exception:
                continue
        names = " ".join(config.to_dict())
        if "expert" in names or "router" in names or "moe" in names:
            found.append(kind)
    return found


def outcome(kind: str) -> str:
    """Whether a small model of a type has a loss on its routers that is known, and whether it is the model's own."""
    try:
        with at_most(20):
            model = small_model(kind)
    except BaseException:
        return "not small"
    routers = find_routers(model)
    if routers is None:
        return "none"
    try:
        layout = resolve_layout(model, "padded")
    except ValueError:
        return "refused"
    with torch.no_grad(), recording(model, routers) as recorder:
        hidden_states(model, probe_batch(model), layout)
        difference = float(load_balancing_loss(recorder.sums) / own_loss(model) - 1)
    return "own" if abs(difference) < 1e-4 else f"{kind} differs by {difference:.1e}"


@pytest.mark.slow
def test_every_type_that_has_routers_records_its_own_loss_or_none(record_property: Any) -> None:
    found: dict[str, str] = {}
    for kind in kinds_with_routers():
        try:
            found[kind] = outcome(kind)
        except Exception as error:
            found[kind] = f"{kind}: {error}"
    record_property("routers", dict(Counter(found.values())))
    assert set(found.values()) <= {"own", "none", "refused", "not small"}, found
    assert list(found.values()).count("own") >= 20, found
