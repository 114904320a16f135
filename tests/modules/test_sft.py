"""SFTModule against a naive computation: transformers' own logits, one row at a time, autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.sequences import Example, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from ..invariance.methods import demonstrations
from .naive import assert_gradient, naive_model, step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def naive_loss(model: Any, rows: list[Example], loss_type: str, smoothing: float) -> torch.Tensor:
    """A loop over tokens of the full softmax, divided by all weights together."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        ((prompt, completion),) = row.root.paths()
        tokens = torch.tensor([*prompt.tokens, *completion.tokens])
        log_p = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
        assert completion.weights is not None
        for n, w in enumerate(completion.weights):
            place = len(prompt.tokens) + n
            picked = log_p[place - 1, tokens[place]]
            loss = -picked * (picked.detach().exp() if loss_type == "dft" else 1.0)
            loss = (1 - smoothing) * loss - smoothing * log_p[place - 1].mean()
            total, weight = total + float(w) * loss, weight + float(w)
    return total / weight


@pytest.mark.parametrize(("loss_type", "smoothing"), [("nll", 0.0), ("nll", 0.2), ("dft", 0.0)])
def test_a_step_is_the_naive_gradient(folder: str, loss_type: Any, smoothing: float) -> None:
    rows = demonstrations(6)
    model = naive_model(folder)
    loss = naive_loss(model, rows, loss_type, smoothing)
    loss.backward()
    found = step(SFTModule(folder, loss_type=loss_type, label_smoothing=smoothing), rows)
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_gradient(found.gradient, model)


def test_it_learns_rows_by_heart(folder: str) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(1, 9)]
    torch.manual_seed(0)
    module = SFTModule(folder, optimizer=partial(torch.optim.AdamW, lr=5e-3))
    run = trainer("32-true", max_epochs=60, check_val_every_n_epoch=60)
    run.fit(module, SFTDataModule(train=rows, val=rows, global_batch_size=4))
    assert run.callback_metrics["val/mean_token_accuracy"] == 1.0
    assert run.callback_metrics["val/loss"] < 0.1


def test_a_batch_without_scored_tokens_changes_nothing(folder: str) -> None:
    found = step(SFTModule(folder), [Example("rows:0", Segment([5, 6, 7], [0, 0, 0]))])
    assert found.metrics["train/loss"] == 0.0
    assert all(not gradient.any() for gradient in found.gradient.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "nl"}, "nll"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "dft"),
        ({"init": "scratch"}, "init is 'scratch'; it must be one of pretrained, random"),
        ({"layout": "pakced"}, "did you mean 'packed'"),
    ],
)
def test_bad_options(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SFTModule(folder, **options)
    assert "\n" not in str(caught.value)
