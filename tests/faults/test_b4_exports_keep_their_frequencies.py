"""A LongRoPE model that was trained with long sequences computes the same wherever its export is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.models import load_causal_lm, num_positions
from rlhf_lightning.models.backbone import make_steady
from rlhf_lightning.modules.critic import own_critic

from ..helpers import MAX_POSITIONS, save_tiny_model

ORIGINAL, LONG_FACTOR = 14, [1.5, 2.0, 3.0, 4.0]


def frequencies(model: Any) -> Tensor:
    ids = torch.arange(3, 9)[None]  # fewer than the short set is for
    model(input_ids=ids, use_cache=False)
    return model.get_decoder().rotary_emb.inv_freq.double()


def test_whoever_loads_an_export_computes_with_the_trained_frequencies(tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": LONG_FACTOR, "original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 1.0}
    folder, export = str(tmp_path / "model"), str(tmp_path / "export")
    save_tiny_model(folder, "phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
    trained = load_causal_lm(folder, dtype=torch.float32)
    make_steady(trained, longest=ORIGINAL + 1)
    trained.save_pretrained(export)
    loaders: dict[str, Callable[[], Any]] = {
        "here": lambda: load_causal_lm(export, dtype=torch.float32, trainable=False),
        "settled without a length": lambda: _settled(export),
        "a critic": lambda: (
            own_critic(export, kind="linear", seed=0, dtype=torch.float32, attention="sdpa", layout="auto").model
        ),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(export),
    }
    # By hand: 1 / (factor theta ^ (2 i / d)) of heads of 8 numbers.
    exact = 1 / (torch.tensor(LONG_FACTOR, dtype=torch.float64) * 10000.0 ** (torch.arange(4).double() / 4))
    for name, load in loaders.items():
        torch.testing.assert_close(frequencies(load()), exact, rtol=1e-6, atol=0, msg=name)
    assert num_positions(_settled(export)) == MAX_POSITIONS


def _settled(folder: str) -> Any:
    model = load_causal_lm(folder, dtype=torch.float32)
    make_steady(model)
    return model
