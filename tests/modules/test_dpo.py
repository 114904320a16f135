"""DPOModule against a naive computation: transformers' own logits, one unshared sequence at a time, autograd."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule
from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.sequences import Example

from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from ..invariance.methods import pairs
from .naive import assert_gradient, logps, naive_model, sequences, step

ROWS = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1} or so"} for n in range(1, 14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def completion_logps(model: Any, example: Example) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected completion."""
    chosen, rejected = (logps(model, prompt, completion) for prompt, completion in sequences(example))
    return chosen, rejected


def test_a_step_is_the_naive_gradient(folder: str) -> None:
    examples = pairs(5)
    policy, reference = naive_model(folder, moved=0.05), naive_model(folder)  # apart, so that margins are not zero
    beta, losses = 0.2, []
    for example in examples:
        chosen, rejected = completion_logps(policy, example)
        with torch.no_grad():
            ref_chosen, ref_rejected = completion_logps(reference, example)
        losses.append(-F.logsigmoid(beta * (chosen - ref_chosen - rejected + ref_rejected)))
    loss = torch.stack(losses).mean()
    loss.backward()
    found = step(DPOModule(folder, beta=beta), examples, policy)
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_gradient(found.gradient, policy)


def fit(module: DPOModule, **options: Any) -> tuple[DPOModule, dict[str, float]]:
    torch.manual_seed(0)
    data = PreferenceDataModule(train=ROWS, val=ROWS[:5], global_batch_size=4)
    run = trainer("32-true", **{"max_epochs": 4, **options})
    run.fit(module, data)
    return module, {k: float(v) for k, v in run.callback_metrics.items()}


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 4}}, {"reference": "precomputed"}])
def test_it_fits_a_few_pairs_and_leaves_the_reference_alone(folder: str, options: dict[str, Any]) -> None:
    module, metrics = fit(DPOModule(folder, optimizer=partial(torch.optim.AdamW, lr=3e-3), **options))
    assert metrics["val/rewards/accuracies"] == 1.0
    assert metrics["val/loss"] < 0.4  # log 2 = 0.69 at the start
    original = AutoModelForCausalLM.from_pretrained(folder)
    examples = PreferenceDataModule(train=ROWS, tokenizer=folder)
    examples.setup("fit")
    example = next(iter(examples.all_examples()))[0]
    with torch.no_grad():
        expected = completion_logps(original, example)
        rows = module.score_examples([example])
    assert float(rows["ref_chosen_logps"]) == pytest.approx(float(expected[0]), rel=1e-4)
    assert float(rows["ref_rejected_logps"]) == pytest.approx(float(expected[1]), rel=1e-4)
    assert abs(float(rows["chosen_logps"]) - float(expected[0])) > 1e-2


def test_kinds_of_reference_agree(folder: str) -> None:
    results = [
        fit(DPOModule(folder, reference=kind, lora=lora, optimizer=partial(torch.optim.SGD, lr=0.05)), max_epochs=1)[1]
        for kind, lora in (("frozen", {"r": 4}), ("adapter", {"r": 4}), ("precomputed", {"r": 4}))
    ]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5, abs=1e-6)


def test_no_reference_is_registered_or_saved(folder: str, tmp_path: Path) -> None:
    module = DPOModule(folder)
    module.configure_model()
    names = set(dict(module.named_parameters()))
    assert all(name.startswith("model.") for name in names)
    assert len(names) == len(list(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["reference"]["weights"] == {}


def test_a_random_reference_is_in_the_checkpoint(folder: str) -> None:
    module = DPOModule(folder, init="random")
    module.configure_model()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["reference"]["weights"].keys() == module.model.state_dict().keys()


def test_half_precision_keeps_rotary_frequencies_exact(tmp_path: Path) -> None:
    qwen = str(save_tiny_model(tmp_path, "qwen3"))
    module = DPOModule(qwen)
    data = PreferenceDataModule(train=ROWS, global_batch_size=4)
    run = trainer("bf16-true", max_steps=1)
    run.fit(module, data)
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    rotary = {name: b for name, b in module.model.named_buffers() if name.endswith("inv_freq")}
    exact = dict(AutoModelForCausalLM.from_pretrained(qwen).named_buffers())
    assert rotary
    for name, frequencies in rotary.items():
        assert torch.equal(frequencies, exact[name]), name
    # The policy starts as its own reference, to the bit.
    assert float(run.callback_metrics["train/rewards/margins"]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta"),
        ({"loss_type": "sigmoidd"}, "sigmoid"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "weights"),
        ({"reference": "none"}, "reference is 'none'; it must be one of auto, frozen, adapter, precomputed"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0; it must be above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be above 0"),
    ],
)
def test_bad_options(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DPOModule(folder, **options)
    assert "\n" not in str(caught.value)


def test_an_adapter_reference_needs_an_adapter(folder: str) -> None:
    with pytest.raises(ValueError, match="no adapter: give lora"):
        DPOModule(folder, reference="adapter").configure_model()
