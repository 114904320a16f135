"""Policies with a compressor on a pretended card: all models are on it, and nothing is computed on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.models import ContextCompressor

from . import matrix
from .matrix import Placed, card, pretended
from .steps import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `.*_dataloader`")

_RECALL = "recall:{contract}?split={split}&rows=4&length=24&facts=2"
_DRAWN = {
    "rewards": ["rlhf_lightning.rewards.exact_answer"],
    "num_generations": 2,
    "max_completion_length": 4,
    "num_updates": 1,
}
_METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SFTModule": ("SFTDataModule", "demonstrations", {}),
    "GRPOModule": ("PromptDataModule", "prompts", {**_DRAWN, "beta": 0.1}),
    "PPOModule": ("PromptDataModule", "prompts", _DRAWN),
}


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("GRPOModule", "bf16-mixed"),
        pytest.param("SFTModule", "bf16-true", marks=pytest.mark.slow),
        pytest.param("PPOModule", "16-mixed", marks=pytest.mark.slow),
    ],
)
def test_everything_is_on_the_card(method: str, precision: str, tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", initializer_range=0.05, max_position_embeddings=256)
    made = ContextCompressor.from_pretrained(policy, ratio=4, segment_length=16, encoder_rank=2)
    compressor = str(made.save_pretrained(tmp_path / "compressor"))
    data, contract, options = _METHODS[method]
    rows = {name: _RECALL.format(contract=contract, split=split) for name, split in
            (("train", "train"), ("val", "validation"))}  # fmt: skip
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    config = {
        "model": {
            "class_path": f"rlhf_lightning.modules.{method}",
            "init_args": {"model": policy, "compressor": compressor, **options},
        },
        "data": {"class_path": f"rlhf_lightning.datamodules.{data}", "init_args": {**rows, "global_batch_size": 2}},
        "trainer": {
            "strategy": {"class_path": f"{pretended.__name__}.OnPretended"},
            "precision": precision,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [{"class_path": f"{matrix.__name__}.Placed"}],
            **quiet,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    Placed.devices.clear()
    Placed.on_host.clear()
    with card():
        main(["fit", "--debug", "--config", str(tmp_path / "config.yaml")])
    assert set(Placed.devices) == {"cuda:0"}
    assert dict(Placed.on_host) == {}
