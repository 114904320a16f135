"""A LongRoPE model that was trained with long sequences computes the same wherever its export is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.models import base_model, load_causal_lm, num_positions, save_pretrained
from rlhf_lightning.models.backbone import fix_rotary_frequencies
from rlhf_lightning.models.critic import own_critic

from ..helpers import MAX_POSITIONS, char_tokenizer, save_tiny_model
from ..models.test_saving import logits, shake

ORIGINAL, LONG_FACTOR = 14, [1.5, 2.0, 3.0, 4.0]
# By hand: 1 / (factor theta ^ (2 i / d)) of heads of 8 numbers.
EXACT = 1 / (torch.tensor(LONG_FACTOR, dtype=torch.float64) * 10000.0 ** (torch.arange(4).double() / 4))


def frequencies(model: Any) -> Tensor:
    ids = torch.arange(3, 9)[None]  # fewer than the short set is for
    model(input_ids=ids, use_cache=False)
    return base_model(model).get_decoder().rotary_emb.inv_freq.double()


def save_base(place: Path) -> str:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": LONG_FACTOR, "original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 1.0}
    return str(save_tiny_model(place, "phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL))


def test_whoever_loads_an_export_computes_with_the_trained_frequencies(tmp_path: Path) -> None:
    folder, export = save_base(tmp_path / "model"), str(tmp_path / "export")
    trained = load_causal_lm(folder, dtype=torch.float32)
    fix_rotary_frequencies(trained, longest=ORIGINAL + 1)
    trained.save_pretrained(export)
    loaders: dict[str, Callable[[], Any]] = {
        "here": lambda: load_causal_lm(export, dtype=torch.float32, trainable=False),
        "settled without a length": lambda: _settled(export),
        "a critic": lambda: (
            own_critic(export, kind="linear", seed=0, dtype=torch.float32, attention="auto", layout="auto").model
        ),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(export),
    }
    for name, load in loaders.items():
        torch.testing.assert_close(frequencies(load()), EXACT, rtol=1e-6, atol=0, msg=name)
    assert num_positions(_settled(export)) == MAX_POSITIONS


def _settled(folder: str, longest: int | None = None) -> Any:
    model = load_causal_lm(folder, dtype=torch.float32)
    fix_rotary_frequencies(model, longest=longest)
    return model


def own(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the package's warnings about the parameters; transformers has lines of its own about them."""
    records = [record for record in caplog.records if record.name.startswith("rlhf_lightning")]
    return [record.getMessage() for record in records if "rope_parameters" in record.getMessage()]


def train_adapter(folder: str, longest: int) -> Any:
    """An adapter, its weights moved, for sequences of so many tokens."""
    model = load_causal_lm(folder, dtype=torch.float32, lora={"r": 2})
    fix_rotary_frequencies(model, longest=longest)
    shake(model)
    return model.eval()


def test_whoever_loads_an_adapter_computes_with_the_trained_frequencies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, export = save_base(tmp_path / "model"), str(tmp_path / "export")
    trained = train_adapter(base, ORIGINAL + 1)
    with caplog.at_level(logging.WARNING):
        save_pretrained(trained, char_tokenizer(), export)
    [said] = own(caplog)
    assert "\n" not in said
    assert "merge_adapter=True" in said
    caplog.clear()
    save_pretrained(trained, char_tokenizer(), tmp_path / "merged", merge_adapter=True)
    assert not own(caplog)

    def elsewhere(**options: Any) -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), export).eval()

    stored = json.loads((tmp_path / "export" / "rope_parameters.json").read_text())
    loaders: dict[str, Callable[[], Any]] = {
        "here": lambda: load_causal_lm(export, dtype=torch.float32, trainable=False),
        "the next stage, of short sequences": lambda: _settled(export, longest=ORIGINAL - 1),
        "the next stage, of long ones": lambda: _settled(export, longest=ORIGINAL + 3),
        "a critic": lambda: (
            own_critic(export, kind="linear", seed=0, dtype=torch.float32, attention="auto", layout="auto").model
        ),
        "merged, by transformers": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "elsewhere, as the line says": lambda: elsewhere(rope_parameters=stored),
    }
    expected = logits(trained)
    for name, load in loaders.items():
        model = load().eval()
        torch.testing.assert_close(frequencies(model), EXACT, rtol=1e-6, atol=0, msg=name)
        # A merged weight is rounded once more than the sum of two products.
        assert torch.allclose(logits(model), expected, atol=1e-4 if name.startswith("merged") else 1e-5), name
    assert not torch.allclose(frequencies(elsewhere()), EXACT, rtol=1e-2)  # which is why it is said
    again = _settled(export)
    assert num_positions(again) == MAX_POSITIONS
    save_pretrained(again, char_tokenizer(), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "rope_parameters.json").read_text()) == stored


def test_adapters_of_short_sequences_and_of_other_models_need_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bases = [
        (save_base(tmp_path / "phi3"), ORIGINAL),
        (str(save_tiny_model(tmp_path / "llama", "llama")), ORIGINAL + 1),
    ]
    for base, longest in bases:
        trained, export = train_adapter(base, longest), Path(base) / "export"
        with caplog.at_level(logging.WARNING):
            save_pretrained(trained, char_tokenizer(), export)
        assert not (export / "rope_parameters.json").exists()
        assert not own(caplog)
        elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), export).eval()
        assert torch.allclose(logits(elsewhere), logits(trained), atol=1e-5)


def test_an_adapter_on_an_export_that_was_trained_long_needs_nothing(tmp_path: Path) -> None:
    """The export's own config says with which frequencies."""
    first = load_causal_lm(save_base(tmp_path / "phi3"), dtype=torch.float32)
    fix_rotary_frequencies(first, longest=ORIGINAL + 1)
    save_pretrained(first, char_tokenizer(), tmp_path / "first")
    trained = train_adapter(str(tmp_path / "first"), ORIGINAL + 1)
    save_pretrained(trained, char_tokenizer(), tmp_path / "export")
    assert not (tmp_path / "export" / "rope_parameters.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    elsewhere = PeftModel.from_pretrained(base, tmp_path / "export").eval()
    assert torch.allclose(logits(elsewhere), logits(trained), atol=1e-5)
