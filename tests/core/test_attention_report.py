"""The reported attention is the one that runs."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import Any

import pytest

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.callbacks import JSONLLogger
from rlhf_lightning.sequences import ExampleBatch

from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs

TREE = import_module("rlhf_lightning.sequences.tree_attention")
CASCADE = "packed rows, flash attention along the tree (cascade)"
BLOCKS = "packed rows, scaled-dot-product attention in blocks"


@pytest.mark.parametrize(
    ("cls", "options", "runs", "said"),
    [
        (SFTModule, {}, "_blocks", BLOCKS),
        (RewardModule, {}, "_blocks", BLOCKS),
        (SFTModule, {"attention": "cascade"}, "cascade_attention", CASCADE),
        (SFTModule, {"layout": "padded"}, None, "padded rows, scaled-dot-product attention"),
    ],
)
def test_the_kernel_that_runs_is_reported_once(
    cls: Any, options: Any, runs: Any, said: str, tiny_model_folder: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ran = cls(str(tiny_model_folder("llama")), **options), Counter()
    for name in ("_blocks", "cascade_attention", "flex_tree_attention"):
        inner = getattr(TREE, name)

        def spy(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            ran[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(TREE, name, spy)
    module._trainer = run = trainer("32-true", max_epochs=1)
    module.configure_model()
    module.decide_layout()
    ran.clear()
    with caplog.at_level("INFO"):
        rows = ExampleBatch((demonstrations if cls is SFTModule else pairs)(2))
        run.fit(module, Batches(*[rows] * 3))
    assert set(ran) == ({runs} if runs else set())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("attention: ")]
    assert lines == [f"attention: {said}"]
    assert module.attention_in_use == said


def test_loggers_know_it(tiny_model_folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    logger = JSONLLogger(str(tmp_path / "history.jsonl"))
    monkeypatch.setattr(logger, "log_hyperparams", lambda params, *rest: known.update(params))
    trainer("32-true", max_steps=1, logger=logger).fit(
        SFTModule(str(tiny_model_folder("llama"))), Batches(ExampleBatch(demonstrations(2)))
    )
    assert known["attention_in_use"] == BLOCKS
