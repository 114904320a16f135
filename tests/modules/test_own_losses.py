"""Losses of one's own: against the formula, through the command line, in checkpoints, and bad ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning import DPOModule, GRPOModule, PPOModule
from rlhf_lightning.cli import PostTrainingCLI, main
from rlhf_lightning.losses.preference import PreferencePairs, preference_loss
from rlhf_lightning.rl import PolicyLoss, PPOLoss

from ..helpers import save_tiny_model
from ..invariance.harness import TOLERANCE, assert_same
from ..invariance.harness import step as one_step
from ..invariance.methods import Method, pairs
from ..rl.fixed_rollouts import FixedGRPO, options, prompts
from .naive import naive_model, step
from .test_grpo import (
    GROUP,
    ROWS,
    compare,
    look_at_all,
    mean_over_tokens,
    naive_advantages,
    naive_rewards,
    tokens_of,
)

HERE = __name__


@dataclass(frozen=True)
class Squared(PolicyLoss):
    """(log p + scale A)^2: no other loss resembles it."""

    scale: float = 1.0

    def per_token(self, logprobs_N: Tensor, *, advantages_N: Tensor, **_: Any) -> Tensor:
        return (logprobs_N + self.scale * advantages_N).square()


class PlainRatio(PPOLoss):
    """The ratio without clipping."""

    def per_token(self, logprobs_N: Tensor, *, old_logprobs_N: Tensor, advantages_N: Tensor, **_: Any) -> Tensor:
        return -(logprobs_N - old_logprobs_N).exp() * advantages_N


def squared_hinge(pairs: PreferencePairs) -> Tensor:
    return (1 - pairs.margin).relu().square()


def by_length(pairs: PreferencePairs) -> Tensor:
    """DPO weighted by length, where lengths are compared with their mean over the batch."""
    return -F.logsigmoid(pairs.margin) * pairs.chosen_lengths / pairs.chosen_lengths.double().mean()


def plain_sft(pairs: PreferencePairs) -> Tensor:
    return -pairs.sft_logps


plain_sft.divided_by = "chosen_tokens"  # type: ignore[attr-defined]


def brevity(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


not_callable = 3


def test_grpo_trains_a_class(tmp_path: Path) -> None:
    """Gradient and loss are those of the formula with full logits, weighted like the loss type (per token)."""
    folder = str(save_tiny_model(tmp_path, "gpt2", initializer_range=0.1))
    policy = naive_model(folder, moved=0.05)
    module = FixedGRPO(folder, **options(num_generations=GROUP, loss=Squared(scale=0.5)))
    found = step(module, prompts(ROWS), policy)
    advantages = naive_advantages(naive_rewards())

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (logprobs + 0.5 * advantages[row][sample]) ** 2

    compare(found, policy, mean_over_tokens(tokens_of(look_at_all(policy), token_loss)))


def test_dpo_trains_a_function() -> None:
    generator = torch.Generator().manual_seed(0)
    logps = [-5 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = torch.arange(1, 7)
    found = preference_loss(*logps, chosen_lengths=lengths, rejected_lengths=lengths, beta=0.7, loss_type=squared_hinge)
    margin = 0.7 * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
    assert torch.allclose(found, torch.clamp(1 - margin, min=0) ** 2, rtol=1e-12)


def test_what_a_function_is_given() -> None:
    seen: list[PreferencePairs] = []

    def sees(pairs: PreferencePairs) -> Tensor:
        seen.append(pairs)
        return -F.logsigmoid(pairs.beta * (pairs.chosen_logratios - pairs.rejected_logratios))

    chosen, rejected, zero, length = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-2.0]), torch.ones(1)
    lengths = {"chosen_lengths": length, "rejected_lengths": 2 * length}
    found = preference_loss(chosen, rejected, zero, zero, **lengths, loss_type=sees)
    assert torch.equal(found, preference_loss(chosen, rejected, zero, zero, **lengths))
    assert float(seen[0].chosen_rewards) == pytest.approx(0.1)
    assert float(seen[0].rejected_rewards) == pytest.approx(-0.1)
    assert float(seen[0].margin) == pytest.approx(0.2)
    assert float(seen[0].rejected_lengths) == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def test_a_function_that_couples_pairs_is_given_the_global_batch(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(DPOModule, pairs, {"loss_type": ["apo_zero", by_length], "loss_weights": [0.1, 1.0]})
    whole = one_step(method, tiny, pairs(7))
    unsaid = one_step(method, tiny, pairs(7), micro_batch_tokens=1)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(unsaid, whole, TOLERANCE["64-true"])
    monkeypatch.setattr(by_length, "couples_pairs", True, raising=False)
    split = one_step(method, tiny, pairs(7), micro_batch_tokens=1)
    assert_same(split, whole, TOLERANCE["64-true"])


def test_a_function_that_is_divided_by_tokens(tiny: str) -> None:
    """As ``sft``, whose sums LD-DPO and WPO leave alone, with the budget split; and unlike one divided by pairs."""
    more: dict[str, Any] = {"ld_alpha": 0.3, "use_weighting": True, "loss_weights": [1.0, 0.5]}
    named = Method(DPOModule, pairs, {"loss_type": ["sigmoid", "sft"], **more})
    own = Method(DPOModule, pairs, {"loss_type": ["sigmoid", plain_sft], **more})
    found = one_step(own, tiny, pairs(5), micro_batch_tokens=41)
    assert_same(found, one_step(named, tiny, pairs(5)), TOLERANCE["64-true"])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("couples_pairs", 1, "wrong.couples_pairs is 1; it must be True or False"),
        (
            "divided_by",
            "tokens",
            "wrong.divided_by is 'tokens'; it must be one of pairs, chosen_tokens; did you mean 'chosen_tokens'?",
        ),
    ],
)
def test_attributes_of_another_value(attribute: str, value: object, message: str) -> None:
    def wrong(pairs: PreferencePairs) -> Tensor:
        return -pairs.margin

    setattr(wrong, attribute, value)
    with pytest.raises(ValueError, match=re.escape(message) + "$") as error:
        DPOModule("no model", loss_type=wrong)
    assert "\n" not in str(error.value)


RUNS: dict[str, tuple[type, list[str], Callable[[Any], object], object]] = {
    "grpo": (
        GRPOModule,
        [f"--model.loss.class_path={HERE}.Squared", "--model.loss.scale=0.5", "--model.loss.epsilon=0.3"],
        lambda module: module.policy_loss,
        Squared(scale=0.5, epsilon=0.3),
    ),
    "ppo": (
        PPOModule,
        [
            f"--model.loss.class_path={HERE}.PlainRatio",
            "--model.loss.init_args.epsilon=0.3",
            "--model.num_updates=1",
            f"--model.rewards=[{HERE}.brevity]",
        ],
        lambda module: module.policy_loss,
        PlainRatio(epsilon=0.3),
    ),
    "dpo": (
        DPOModule,
        [f"--model.loss_type=[{HERE}.squared_hinge,sft]"],
        lambda module: module.loss_types,
        [squared_hinge, "sft"],
    ),
}


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("method", RUNS)
def test_checkpoints_hold_the_loss(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cls, own, loss_of, expected = RUNS[method]
    quiet = ["--trainer.logger=false", "--trainer.callbacks=null"]
    cli = PostTrainingCLI(["fit", "--config", f"configs/{method}/tiny.yaml", *own, *quiet, "--trainer.max_steps=0"])
    cli.trainer.save_checkpoint("last.ckpt")
    loaded = loss_of(cls.load_from_checkpoint("last.ckpt"))  # type: ignore[attr-defined]
    assert loaded == expected
    assert type(loaded) is type(expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_runs_are_resumed_with_the_same_loss(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, own, _, _ = RUNS[method]

    def fit(name: str, steps: int, *more: str) -> None:
        folder = tmp_path / name
        given = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", "--trainer.logger=false"]
        given += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=true"]
        given += [f"--trainer.callbacks.folder={folder}/model", "--trainer.callbacks+=TrainingCheckpoint"]
        given += [f"--trainer.callbacks.folder={folder}/checkpoints", "--trainer.limit_val_batches=0"]
        main(["fit", "--config", f"configs/{method}/tiny.yaml", *own, *given, *more])

    fit("whole", 2)
    fit("parts", 1)
    first = weights(tmp_path / "parts")
    fit("parts", 2, "--ckpt_path=last")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") != first
    assert "other values" not in capsys.readouterr().err


BAD_LOSSES: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda p: p.sum(), " returned shape (): return one loss per {each}, (3,)"),
    (lambda p: p[:2], " returned shape (2,): return one loss per {each}, (3,)"),
    (lambda p: p / 0, " returned -inf for {each} 0 of 3: losses must be finite"),
    (lambda p: torch.where(torch.arange(3) == 1, torch.nan, p), " returned nan for {each} 1 of 3"),
    (lambda p: p.detach(), " returned losses without gradient: compute them from the policy's log-probs"),
    (lambda p: 3.0, " returned a float: return a tensor of one loss per {each}, (3,)"),
    (lambda p: None, " returned a NoneType: return a tensor of one loss per {each}, (3,)"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_LOSSES, ids=[message for _, message in BAD_LOSSES])
def test_bad_values(wrong: Callable[[Tensor], Any], message: str) -> None:
    class Wrong(PolicyLoss):
        def per_token(self, logprobs_N: Tensor, **_: Any) -> Tensor:
            return wrong(logprobs_N)  # type: ignore[no-any-return]

    logps, index = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True), torch.zeros(3, dtype=torch.long)
    expected = "^Wrong.per_token" + re.escape(message.format(each="sampled token"))
    with pytest.raises(ValueError, match=expected):
        Wrong()(logps, old_logprobs_N=None, advantages_N=logps.detach(), sequence_index_N=index, num_sequences=1)

    def wrong_pairs(pairs: PreferencePairs) -> Any:
        return wrong(pairs.chosen_logps)

    ref, lengths = logps.detach(), torch.ones(3)
    with pytest.raises(ValueError, match="^loss_type wrong_pairs" + re.escape(message.format(each="pair"))):
        preference_loss(logps, ref, ref, ref, chosen_lengths=lengths, rejected_lengths=lengths, loss_type=wrong_pairs)


@pytest.mark.parametrize(
    ("loss_type", "message"),
    [
        ("nowhere.loss", "cannot import 'nowhere.loss': No module named 'nowhere'"),
        (f"{HERE}.nothing", f"module '{HERE}' has nothing called 'nothing'"),
        (f"{HERE}.not_callable", f"loss_type is '{HERE}.not_callable', a int; it must name a function"),
        ("sigmod", "did you mean 'sigmoid'?"),
        (["sft", "nowhere.loss"], "cannot import 'nowhere.loss'"),
    ],
    ids=str,
)
def test_paths_of_no_function(loss_type: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        DPOModule("no model", loss_type=loss_type)
    assert "\n" not in str(error.value)


def test_an_f_divergence_is_refused_with_a_function() -> None:
    with pytest.raises(
        ValueError, match=r"f_divergence_type 'forward_kl' is not defined for loss_type '[\w.]+\.squared_hinge'"
    ):
        DPOModule("no model", loss_type=squared_hinge, f_divergence_type="forward_kl")
