"""Scalar heads: what they compute, how they differ, how they are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.models.reward_head import (
    RewardHead,
    freeze_output_projection,
    head_files,
    load_head,
    mean_pooled,
    read_head_options,
    read_head_state,
    with_padding_token,
)

from ..helpers import char_tokenizer, tiny_config, tiny_model


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_outputs_are_those_of_each_member_alone(kind: Any) -> None:
    head = RewardHead(6, kind=kind, num_outputs=2, num_models=3, seed=4, dtype=torch.float64)
    states = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = head(states)
    assert found.shape == (5, 3, 2)
    for s in range(5):
        for m in range(3):
            hidden = states[s]
            if kind == "mlp":
                inner = head.inner[m] @ hidden + head.bias[m]
                hidden = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            torch.testing.assert_close(found[s, m], head.weight[m] @ hidden)


def test_first_weights_depend_on_seed_and_member_alone() -> None:
    head = RewardHead(64, num_models=3, seed=1)
    assert torch.equal(head.weight, RewardHead(64, num_models=3, seed=1).weight)
    assert torch.equal(head.weight[:2], RewardHead(64, num_models=2, seed=1).weight)
    assert not torch.allclose(head.weight[0], head.weight[1])
    assert not torch.allclose(head.weight, RewardHead(64, num_models=3, seed=2).weight)
    drawn = RewardHead(2000, num_models=4).weight
    assert float(drawn.var()) == pytest.approx(1 / 2001, rel=0.1)
    state = torch.get_rng_state()
    RewardHead(8)
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_states_are_scored_in_single_precision() -> None:
    head = RewardHead(512, dtype=torch.bfloat16)
    states = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (states.double() @ head.weight[0, 0].double())[:, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"kind": "cubic"}, {"num_outputs": 0}, {"num_models": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"is {next(iter(options.values()))!r}; it must be"):
        RewardHead(4, **options)


def test_pooled_is_the_mean_of_each_sequence() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, -1.0]])
    assert mean_pooled(values, torch.tensor([0, 0, 1]), 2).tolist() == [[2.0, 4.0], [5.0, -1.0]]
    assert mean_pooled(values.bfloat16(), torch.tensor([0, 0, 1]), 2).dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_only_an_untied_projection_is_frozen(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    freeze_output_projection(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ([] if tied else ["lm_head.weight"])


def test_a_head_is_stored_with_its_options(tmp_path: Path) -> None:
    head = RewardHead(6, kind="mlp", num_outputs=2, num_models=3, seed=4)
    head_files(head, {"pooling": "mean"})(tmp_path)
    assert read_head_options(tmp_path) == {"pooling": "mean"}
    assert load_file(tmp_path / "reward_head.safetensors").keys() == {"weight", "inner", "bias"}
    other = RewardHead(6, kind="mlp", num_outputs=2, num_models=3, seed=5)
    assert load_head(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="leave head, num_attributes and num_models as they were trained"):
        load_head(RewardHead(6, kind="mlp"), tmp_path)


def test_folders_without_a_head_have_none(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert read_head_options(tmp_path) == {}
    assert not load_head(RewardHead(32), tmp_path)
    (tmp_path / "reward_head.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        read_head_options(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_the_head_of_a_classifier_is_found_in_its_shards(tmp_path: Path, max_shard_size: str) -> None:
    classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3))
    classifier.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (max_shard_size == "20KB") == (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(read_head_state(tmp_path)["weight"], classifier.score.weight[None])


def test_the_padding_token_is_never_the_end_of_sequence_token() -> None:
    tokenizer = char_tokenizer()
    assert with_padding_token(tokenizer) is tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    changed = with_padding_token(tokenizer)
    assert changed.pad_token_id == changed.unk_token_id != changed.eos_token_id
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
