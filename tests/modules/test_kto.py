"""KTOModule against a naive computation: the estimate of the KL divergence, the loss, its gradient."""

from __future__ import annotations

import re
from functools import partial
from hashlib import blake2b
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from rlhf_lightning import KTOModule
from rlhf_lightning.callbacks import TrainingCheckpoint
from rlhf_lightning.datamodules import UnpairedDataModule
from rlhf_lightning.datamodules.unpaired import mismatch
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import char_tokenizer, save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import pairs
from .naive import Step, assert_gradient, logps, naive_model, sequences, step

BETA, DESIRABLE, UNDESIRABLE = 0.2, 1.3, 0.7
WEIGHTS = {"beta": BETA, "desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}
ROWS = [
    {"prompt": f"{n}+{n}=", "completion": text, "label": label}
    for n in range(1, 9)
    for text, label in ((f"{2 * n}", True), (f"{n * n + 1} or so", False))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def labelled(count: int, *, partners: bool = True) -> list[Example]:
    rows = [
        Example(e.row_id, Segment(e.root.tokens, children=e.root.children[:1]), {"label": n % 3 != 0})
        for n, e in enumerate(pairs(count))
    ]
    return mismatch(rows) if partners else rows


def ratio(policy: Any, reference: Any, prompt: list[int], completion: list[int]) -> Tensor:
    with torch.no_grad():
        ref_logps = logps(reference, prompt, completion)
    return logps(policy, prompt, completion) - ref_logps


def naive_losses(policy: Any, reference: Any, examples: list[Example], kl: float) -> Tensor:
    losses = []
    for example in examples:
        reward = BETA * (ratio(policy, reference, *sequences(example)[0]) - kl)
        if example.fields["label"]:
            losses.append(DESIRABLE * (1 - torch.sigmoid(reward)))
        else:
            losses.append(UNDESIRABLE * (1 - torch.sigmoid(-reward)))
    return torch.stack(losses)


def naive_kl(policy: Any, reference: Any, examples: list[Example]) -> float:
    with torch.no_grad():
        ratios = [ratio(policy, reference, *sequences(example)[1]) for example in examples]
    return float(torch.stack(ratios).mean())


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    """Moved so that the mean log-ratio of mismatched pairs, which random moves make negative, is above 0."""
    policy, reference = naive_model(folder), naive_model(folder)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.02)
    for _ in range(3):
        for example in labelled(6):
            (-logps(policy, *sequences(example)[1]) / 6).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert naive_kl(policy, reference, labelled(6)) > 0.5
    return policy


@pytest.mark.parametrize("budget", [4096, 45, 1])
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_a_step_is_the_naive_gradient(budget: int, folder: str, policy: Any) -> None:
    examples, reference = labelled(6), naive_model(folder)
    kl = naive_kl(policy, reference, examples)
    policy.zero_grad()
    loss = naive_losses(policy, reference, examples, kl).mean()
    loss.backward()
    found = step(KTOModule(folder, micro_batch_tokens=budget, **WEIGHTS), examples, policy)
    assert found.metrics["train/kl"] == pytest.approx(kl, rel=1e-6)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(found.gradient, policy)


def test_a_negative_estimate_counts_as_zero(folder: str) -> None:
    examples, reference, policy = labelled(4), naive_model(folder), naive_model(folder, moved=0.05)
    assert naive_kl(policy, reference, examples) < 0
    loss = naive_losses(policy, reference, examples, 0.0).mean()
    found = step(KTOModule(folder, **WEIGHTS), examples, policy)
    assert found.metrics["train/kl"] == 0.0
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_apo_zero_unpaired_reads_no_partners(folder: str, policy: Any) -> None:
    reference, steps = naive_model(folder), []
    for partners in (True, False):
        examples = labelled(5, partners=partners)
        steps.append(step(KTOModule(folder, loss_type="apo_zero_unpaired", **WEIGHTS), examples, policy))
    policy.zero_grad()
    loss = naive_losses(policy, reference, examples, 0.0).mean()
    loss.backward()
    for found in steps:
        assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert "train/kl" not in found.metrics
        assert_gradient(found.gradient, policy)


def test_rewards_are_averaged_by_label(folder: str, policy: Any) -> None:
    examples, reference = labelled(6), naive_model(folder)
    kl = naive_kl(policy, reference, examples)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for example in examples:
        with torch.no_grad():
            reward = BETA * float(ratio(policy, reference, *sequences(example)[0]))
        rewards[example.fields["label"]].append(reward)
    metrics = step(KTOModule(folder, **WEIGHTS), examples, policy).metrics
    chosen, rejected = (sum(rewards[label]) / len(rewards[label]) for label in (True, False))
    assert metrics["train/rewards/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert metrics["train/rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-4)
    right = sum(r > BETA * kl for r in rewards[True]) + sum(r <= BETA * kl for r in rewards[False])
    assert metrics["train/rewards/accuracies"] == pytest.approx(right / 6)
    assert metrics["train/desirable"] == pytest.approx(4 / 6)


# The whole evaluation set is one estimate.


def naive_partners(examples: list[Example], seed: int) -> dict[str, Example]:
    """A plain reading of the rule: around the circle of hashes of row ids, the next one with another prompt."""
    circle = sorted(examples, key=lambda e: blake2b(f"{seed}/{e.row_id}".encode(), digest_size=16).digest())
    partners = {}
    for place, one in enumerate(circle):
        others = [*circle[place + 1 :], *circle[:place]]
        partners[one.row_id] = next(o for o in others if o.root.tokens.tolist() != one.root.tokens.tolist())
    return partners


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_estimate_of_an_evaluation_is_that_of_the_whole_set(stage: str, folder: str) -> None:
    data = UnpairedDataModule(train=ROWS, tokenizer=char_tokenizer(), seed=3, partners=False)
    examples = [example for batch in data.all_examples() for example in batch]
    partners = naive_partners(examples, seed=3)
    policy, reference, ratios = naive_model(folder), naive_model(folder), []
    (-sum(logps(policy, sequences(e)[0][0], sequences(partners[e.row_id])[0][1]) for e in examples) / 16).backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.02 * (0 if parameter.grad is None else parameter.grad)
    for example in examples:
        partner = partners[example.row_id]
        assert partner.row_id != example.row_id
        assert sequences(partner)[0][0] != sequences(example)[0][0]
        with torch.no_grad():
            ratios.append(float(ratio(policy, reference, sequences(example)[0][0], sequences(partner)[0][1])))
    kl = sum(ratios) / len(ratios)
    assert kl > 0.1, "an estimate of 0 would hide the difference"
    loss = float(naive_losses(policy, reference, examples, kl).mean().detach())
    for size, budget in ((1, 8192), (3, 25), (5, 8192), (16, 60), (100, 8192)):
        module = KTOModule(folder, micro_batch_tokens=budget, **WEIGHTS)
        module.configure_model()
        module.double().model.load_state_dict(policy.state_dict())
        module.references[0].model.double()
        run = trainer()
        evaluate = run.validate if stage == "val" else run.test
        rows = UnpairedDataModule(**{stage: ROWS}, tokenizer=char_tokenizer(), seed=3, eval_batch_size=size)
        (metrics,) = evaluate(module, rows, verbose=False)
        assert metrics[f"{stage}/kl"] == pytest.approx(kl, rel=1e-6), size
        assert metrics[f"{stage}/loss"] == pytest.approx(loss, rel=1e-6), size
        assert metrics[f"{stage}/kl_samples"] == 16


# Batches of one row.


class Logged(lightning.Callback):
    """Keeps what every step logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run_single_rows(module: KTOModule, examples: list[Example], **options: Any) -> list[dict[str, float]]:
    logged = Logged()
    run = trainer(max_epochs=1, callbacks=[logged], num_sanity_val_steps=0, **options)
    run.fit(module, Batches(*(ExampleBatch([example]) for example in examples)))
    return logged.steps


def test_single_rows_borrow_the_last_completion_and_average_over_time(folder: str) -> None:
    examples, decay, rate = labelled(5, partners=False), 0.8, 0.5
    # Replays the whole training naively: the estimate of each step, the running estimate, the step.
    policy, reference = naive_model(folder), naive_model(folder)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    total, weight, expected, losses = 0.0, 0.0, [], []
    for number, example in enumerate(examples):
        if number:
            borrowed = sequences(examples[number - 1])[0][1]
            with torch.no_grad():
                newest = float(ratio(policy, reference, sequences(example)[0][0], borrowed))
            total, weight = decay * total + newest, decay * weight + 1
        expected.append(max(0.0, total / weight if weight else 0.0))
        optimizer.zero_grad()
        loss = naive_losses(policy, reference, [example], expected[-1]).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert any(kl > 0 for kl in expected)

    optimizer_of = partial(torch.optim.SGD, lr=rate)
    module = KTOModule(folder, kl_ema_decay=decay, max_grad_norm=None, optimizer=optimizer_of, **WEIGHTS)
    found = run_single_rows(module, examples)
    assert [s["train/kl"] for s in found] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert [s["train/loss"] for s in found] == pytest.approx(losses, rel=1e-6)
    assert [s["train/kl_samples"] for s in found] == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_the_running_estimate_is_in_the_checkpoint(folder: str) -> None:
    examples = labelled(6, partners=False)
    options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "kl_ema_decay": 0.8, **WEIGHTS}
    whole = run_single_rows(KTOModule(folder, **options), examples)
    first = KTOModule(folder, **options)
    run_single_rows(first, examples[:3])
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    second = KTOModule(folder, **options)
    second.on_load_checkpoint(checkpoint)
    second.configure_model()  # the reference; the policy continues from where the first one is
    second.double().model.load_state_dict(first.model.state_dict())
    second.references[0].model.double()
    rest = run_single_rows(second, examples[3:])
    names = ("train/kl", "train/loss")
    assert [[s[n] for n in names] for s in rest] == [[s[n] for n in names] for s in whole[3:]]


def test_rows_of_one_prompt_have_no_partner_and_use_the_running_estimate(folder: str, policy: Any) -> None:
    one = labelled(1, partners=False)[0]
    rows = [Example(f"rows:{n}", one.root, {"label": n == 0}) for n in range(2)]
    module = KTOModule(folder, **WEIGHTS)
    module._kl_sum, module._kl_weight = 3.0, 2.0
    found = step(module, rows, policy)
    assert found.metrics["train/kl"] == 1.5
    loss = naive_losses(policy, naive_model(folder), rows, 1.5).mean()
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_partners_of_the_batch_feed_the_running_estimate(folder: str, policy: Any) -> None:
    examples = labelled(4)
    module = KTOModule(folder, kl_ema_decay=0.5, **WEIGHTS)
    module._kl_sum, module._kl_weight = 2.0, 1.0
    kl = naive_kl(policy, naive_model(folder), examples)
    assert step(module, examples, policy).metrics["train/kl"] == pytest.approx(kl, rel=1e-6)
    assert module._running_kl() == pytest.approx((1.0 + kl) / 1.5)


class Written(Logger):
    """Keeps what is handed to a logger, by step."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update({k: v for k, v in metrics.items() if k.startswith("train/")})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_what_a_step_did_not_measure_is_not_logged_again(folder: str, tmp_path: Any) -> None:
    """Batches of one label have nothing to say of the other, in a run and where it is resumed."""
    rows = [ROWS[n] for n in (0, 2, 1, 3, 4, 6, 5, 7)]  # two of each label in turn
    labels = [row["label"] for row in rows[::2]]
    assert labels == [True, False, True, False]

    def run(ckpt_path: Any = None) -> dict[int, dict[str, float]]:
        written, saver = Written(), TrainingCheckpoint(str(tmp_path), every_n_steps=1, keep=99)
        options = {"max_epochs": 1, "log_every_n_steps": 1, "logger": written, "callbacks": [saver]}
        module = KTOModule(folder, optimizer=partial(torch.optim.SGD, lr=0.1))
        data = UnpairedDataModule(train=rows, global_batch_size=2, shuffle=False)
        run = trainer("32-true", **options, enable_checkpointing=True)
        run.fit(module, data, ckpt_path=ckpt_path)
        return written.rows

    whole = run()
    for number, label in enumerate(labels):
        own, other = ("chosen", "rejected") if label else ("rejected", "chosen")
        assert {"train/loss", "train/kl", f"train/rewards/{own}"} <= whole[number].keys()
        assert not {f"train/rewards/{other}", f"train/logps/{other}"} & whole[number].keys(), number
    for later in (3, 4):  # a run that goes back replaces none of the later ones
        (tmp_path / f"step={later}.ckpt").unlink()
    resumed = run(tmp_path / "step=2.ckpt")
    assert resumed == {number: whole[number] for number in (2, 3)}


# As a user meets it.


def fit(module: KTOModule, **data: Any) -> dict[str, float]:
    torch.manual_seed(0)
    run = trainer("32-true", max_epochs=6)
    run.fit(module, UnpairedDataModule(**{"train": ROWS, "val": ROWS, "global_batch_size": 4, **data}))
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({}, {}),
        ({}, {"global_batch_size": 1}),
        ({"lora": {"r": 4}}, {}),
        ({"loss_type": "apo_zero_unpaired", "reference": "precomputed"}, {}),
    ],
)
def test_it_fits_a_few_rows(folder: str, options: dict[str, Any], data: dict[str, Any]) -> None:
    module = KTOModule(folder, optimizer=partial(torch.optim.AdamW, lr=3e-3), beta=0.3, **options)
    metrics = fit(module, **data)
    assert metrics["val/rewards/chosen"] > 0.1
    assert metrics["val/rewards/rejected"] < -0.1
    assert metrics["val/loss"] < 0.4  # 0.5 at the start


def test_pairs_are_split(folder: str) -> None:
    rows = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1}."} for n in range(1, 5)]
    metrics = fit(KTOModule(folder), train=rows, val=rows)
    assert metrics["val/desirable"] == 0.5


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused(folder: str, label: bool) -> None:
    rows = [row | {"label": label} for row in ROWS]
    name = "undesirable_weight" if label else "desirable_weight"
    said = f"all 16 training rows .from memory:1 to memory:16. are labelled {str(label).lower()}.*{name}=0"
    with pytest.raises(ValueError, match=said):
        fit(KTOModule(folder), train=rows)
    fit(KTOModule(folder, **{name: 0.0}), train=rows)


def test_rows_without_label_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=re.escape("row rows:0 has the label None; it must be true or false")):
        step(KTOModule(folder), pairs(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kto_pair"}, "loss_type"),
        ({"beta": -0.1}, "beta"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing to learn"),
        ({"kl_ema_decay": 1.0}, "kl_ema_decay is 1.0"),
        ({"reference": "precomputed"}, "partners of loss_type 'kto' change with every batch"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTOModule("nowhere", **options)


def test_steps_are_the_same_for_any_budget_and_layout(folder: str, policy: Any) -> None:
    def run(**options: Any) -> Step:
        return step(KTOModule(folder, **WEIGHTS, **options), labelled(7), policy)

    whole = run()
    for options in ({"micro_batch_tokens": 30}, {"layout": "padded"}, {"share_prefix": False}):
        part = run(**options)
        for name in ("train/loss", "train/kl"):
            assert part.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-7)
        for name, gradient in whole.gradient.items():
            assert float((part.gradient[name] - gradient).norm()) <= 1e-10 * max(1.0, float(gradient.norm())), name
