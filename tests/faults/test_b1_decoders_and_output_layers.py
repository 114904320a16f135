"""The decoder and the output projection are found by what they are, and not by what a class calls them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.models import output_head
from rlhf_lightning.models.backbone import check_output_head, decoder_of

from .small_models import TooLong, all_types, at_most, small_config, small_model


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("modernbert-decoder", "lm_head"),  # and the output projection is called decoder
        ("bert", "cls.predictions.transform"),
        ("electra", "generator_predictions"),
    ],
)
def test_a_layer_before_the_output_projection_is_the_reason_of_the_refusal(kind: str, layer: str) -> None:
    with pytest.raises(ValueError, match=f"through {layer!r} before its output projection") as error:
        check_output_head(small_model(kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["biogpt", "trocr", "whisper", "rwkv"])
def test_output_projections_of_other_names_are_found(kind: str) -> None:
    model = small_model(kind)
    check_output_head(model)
    hidden = torch.randn(3, output_head(model).weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(output_head(model).logits(hidden), model.get_output_embeddings()(hidden))


@pytest.mark.slow
def test_no_decoder_of_any_type_is_or_holds_an_output_projection() -> None:
    seen = 0
    for kind in all_types():
        try:
            with at_most(20), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(small_config(kind))
        except (Exception, TooLong):  # a type that does not build small
            continue
        projection = model.get_output_embeddings()
        if projection is not None:
            assert projection not in set(decoder_of(model).modules()), kind
            seen += 1
    assert seen >= 150
