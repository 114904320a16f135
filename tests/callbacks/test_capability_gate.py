"""Candidates that are rejected leave no trace: the run continues, to the bit, from the state that was accepted."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Timer

from rlhf_lightning import GRPOModule, RewardModule, SFTModule
from rlhf_lightning.callbacks import CapabilityGate, ModelExport, TrainingCheckpoint, capability_gate
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule
from rlhf_lightning.evaluation import TaskResult
from rlhf_lightning.self_improvement import Finding
from rlhf_lightning.self_improvement.gate import Decision
from rlhf_lightning.utils.files import content_hash

from ..integration.test_resume import RUNS, Metrics, Run, assert_same, final, fit, ignore_totals

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]

SAYS_NO_Z = {"name": "no z", "verifier": f"{__name__}.says_no_z"}


def says_no_z(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float("z" not in text) for text in completions]


def raises(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


def suite(folder: Path, rows: int = 3, **task: Any) -> dict[str, Any]:
    """A suite of one task, whose prompts are in a file."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(rows)))
    options = {"prompts": str(path), "sampling": {"max_new_tokens": 2}, **SAYS_NO_Z, **task}
    return {"name": "small", "tasks": [options]}


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Verdicts in turn instead of those of the test, and then only accepted ones."""
    script: list[Any] = []

    def scripted(accepted: list[TaskResult], candidate: list[TaskResult], *args: Any, **kwargs: Any) -> Decision:
        verdict = script.pop(0) if script else "accept"
        return Decision(verdict, "as told", 0.0, 0.0, 0.0, 1.0, kwargs["kl"])

    monkeypatch.setattr(capability_gate, "decide", scripted)
    return script


def forget_gate(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Takes out the gate's own state, which tells of rejections; returns it."""
    ignore_totals(checkpoint)
    keys = [key for key in checkpoint["callbacks"] if key.startswith("CapabilityGate")]
    return {key: checkpoint["callbacks"].pop(key) for key in keys}


def gated(run: Run, folder: Path, **options: Any) -> tuple[Run, list[CapabilityGate]]:
    made: list[CapabilityGate] = []

    def callbacks() -> list[lightning.Callback]:
        made.append(CapabilityGate(suite(folder), str(folder / f"accepted {len(made)}"), **options))
        return [*run.callbacks(), made[-1]]

    return dataclasses.replace(run, callbacks=callbacks), made


FAST = ("sft", "dpo", "grpo")
SLOW = (
    "sft-streamed",
    "sft-foreign",
    "dpo-full",
    "dpo-precomputed",
    "dpo-moving",
    "simpo",
    "kto",
    "kto-running",
    "ppo",
)


def assert_leaves_no_trace(
    name: str, every: int | None, model: Path, tmp_path: Path, verdicts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a smaller step, what is tried again is what was rejected; each second try is accepted.

    The first rejection goes back to the start, and the last one is after training has ended.
    """
    monkeypatch.setattr(capability_gate, "scale_learning_rates", lambda trainer, factor: None)
    run, gates = gated(RUNS[name], tmp_path, every_n_steps=every)
    plain = fit(run, model, tmp_path / "plain")
    boundaries = [entry["step"] for entry in gates[0].history]
    assert len(boundaries) >= 2
    verdicts.extend(["reject", "accept"] * len(boundaries))
    again = fit(run, model, tmp_path / "again")
    assert [entry["step"] for entry in gates[1].history] == [step for step in boundaries for _ in range(2)]
    assert [entry["accepted_step"] for entry in gates[1].history][::2] == [0, *boundaries[:-1]]

    (last, expected), (path, found) = final(tmp_path / "plain"), final(tmp_path / "again")
    assert path.name == last.name
    forget_gate(expected)
    forget_gate(found)
    assert_same(found, expected)
    # The last step is logged as it was.
    own = [[(s, v) for s, v in m.rows if not any(key.startswith("gate/") for key in v)] for m in (plain, again)]
    assert own[0][-1][1]
    assert_same(own[1][-1], own[0][-1])


@pytest.mark.parametrize("name", FAST)
def test_a_rejected_candidate_leaves_no_trace(
    name: str, tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_leaves_no_trace(name, 4, tiny_model_folder(), tmp_path, verdicts, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "every"), [(name, 4) for name in SLOW] + [("sft", None), ("dpo-moving", None), ("grpo", 3)]
)
def test_nor_with_any_other_state(
    name: str,
    every: int | None,
    tiny_model_folder: Any,
    tmp_path: Path,
    verdicts: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_leaves_no_trace(name, every, tiny_model_folder(), tmp_path, verdicts, monkeypatch)


def test_the_gate_draws_nothing_from_the_run(tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]) -> None:
    run, _ = gated(RUNS["sft"], tmp_path, every_n_steps=4, criteria={"max_kl": 10.0})
    fit(run, tiny_model_folder(), tmp_path / "gated")
    fit(RUNS["sft"], tiny_model_folder(), tmp_path / "plain")
    found, expected = final(tmp_path / "gated")[1], final(tmp_path / "plain")[1]
    forget_gate(found)
    ignore_totals(expected)
    assert_same(found, expected)


# Rows that teach the policy to say what the suite forbids.
POISON = [{"prompt": f"{n}+{n}=", "completion": "zz"} for n in range(6)]


def poisoned(model: Path, *callbacks: lightning.Callback, steps: int = 8, resume: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=options.pop("logger", False),
        callbacks=list(callbacks),
        max_steps=steps,
        enable_checkpointing=any(isinstance(callback, TrainingCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (1 + n))
    given = options.pop("of_module", {})
    module = SFTModule(str(model), optimizer=partial(torch.optim.AdamW, lr=0.05), lr_scheduler=schedule, **given)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = SFTDataModule(train=POISON, global_batch_size=3, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module, before, trainer


def test_what_makes_the_policy_worse_is_taken_back(tiny_model_folder: Any, tmp_path: Path) -> None:
    """With the gate the run ends as it began; without it, the policy says nothing else."""
    model, logged = tiny_model_folder(), Metrics()
    criteria = {"accept": "not_worse", "patience": 2}
    gate = CapabilityGate(suite(tmp_path, rows=8), str(tmp_path / "accepted"), every_n_steps=4, criteria=criteria)
    export = ModelExport(str(tmp_path / "model"))
    module, before, trainer = poisoned(model, export, gate, logger=logged)
    assert [(entry["step"], entry["verdict"], entry["scores"]["no z"]) for entry in gate.history] == [
        (4, "reject", 0.0),
        (4, "stop", 0.0),
    ]
    assert gate.history[0]["p_value"] == pytest.approx(1 / 256)
    assert trainer.global_step == 0
    for name, weight in module.named_parameters():
        assert torch.equal(weight, before[name]), name
    exported = SFTModule(str(tmp_path / "model"))
    exported.configure_model()
    assert_same({name: p.detach() for name, p in exported.named_parameters()}, before)
    told = [values for _, values in logged.rows if "gate/accepted" in values]
    assert [(values["gate/accepted"], values["gate/no z"]) for values in told] == [(0.0, 0.0)] * 2

    # The manifest tells what was decided, and has the hashes of what is there.
    manifest = json.loads((tmp_path / "accepted" / "manifest.json").read_text())
    assert manifest["decisions"] == gate.history
    (entry,) = manifest["accepted"]
    for kind in ("checkpoint", "results"):
        assert content_hash(tmp_path / "accepted" / entry[kind]["file"]) == entry[kind]["sha256"]
    results = [TaskResult.read(row) for row in json.loads((tmp_path / "accepted" / "step=0.json").read_text())]
    assert results[0].accuracy.value == 1.0

    free, _, _ = poisoned(model)
    assert gate._meter.results(free, None)[0].accuracy.value == 0.0


def test_each_rejection_makes_the_step_smaller(tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]) -> None:
    """The peak is 0.05, divided by 1 + n of the steps so far; an accepted state keeps its rate."""
    rates: list[tuple[int, float]] = []

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

    verdicts.extend(["reject", "reject", "accept", "reject", "accept"])
    gate = CapabilityGate(suite(tmp_path), str(tmp_path / "accepted"), every_n_steps=2, step_factor=0.5)
    poisoned(tiny_model_folder(), gate, Rates(), steps=4)
    peaks = [rate * (1 + step) for step, rate in rates]
    assert [step for step, _ in rates] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]
    assert peaks == pytest.approx([0.05] * 2 + [0.025] * 2 + [0.0125] * 4 + [0.00625] * 2)


def test_new_seed_draws_other_samples(tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]) -> None:
    drawn: list[str] = []

    def reward(completions: list[str]) -> list[float]:
        drawn.append("|".join(completions))
        return [float(len(text)) for text in completions]

    verdicts.extend(["reject", "reject", "accept"])
    gate = CapabilityGate(
        suite(tmp_path), str(tmp_path / "accepted"), every_n_steps=1, criteria={"on_reject": "new_seed"}
    )
    module = GRPOModule(
        str(tiny_model_folder()), rewards=[reward], num_generations=2, max_completion_length=4, num_updates=1
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, callbacks=[gate], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule(train=[{"prompt": "1+1="}], global_batch_size=1))
    assert len(drawn) == 3
    assert len(set(drawn)) == 3


def test_a_run_that_was_stopped_continues_with_its_gate(
    tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]
) -> None:
    """Interrupted after a rejection, and resumed, the same decisions follow and the same weights."""
    model = tiny_model_folder()

    def run(name: str, steps: int, resume: Any = None) -> tuple[CapabilityGate, Any]:
        gate = CapabilityGate(suite(tmp_path), str(tmp_path / name / "accepted"), every_n_steps=3)
        saver = TrainingCheckpoint(str(tmp_path / name / "checkpoints"), every_n_steps=1, keep=9)
        module, _, _ = poisoned(model, gate, saver, steps=steps, resume=resume)
        return gate, module

    verdicts.extend(["accept", "reject", "accept"])
    whole, expected = run("whole", 8)
    assert [entry["verdict"] for entry in whole.history] == ["accept", "reject", "accept", "accept"]

    class Killed(Exception):
        pass

    class Kill(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if len(gate.history) == 2 and trainer.global_step == 5:
                raise Killed

    verdicts.extend(["accept", "reject"])
    gate = CapabilityGate(suite(tmp_path), str(tmp_path / "cut" / "accepted"), every_n_steps=3)
    saver = TrainingCheckpoint(str(tmp_path / "cut" / "checkpoints"), every_n_steps=1, keep=9)
    with pytest.raises(Killed):
        poisoned(model, gate, saver, Kill(), steps=8)
    # The newest checkpoint was made before the rejection; the one that the second attempt made of step 4 is after it.
    after = tmp_path / "cut" / "checkpoints" / "step=4.ckpt"
    resumed, found = run("cut", 8, after)
    assert [entry["verdict"] for entry in resumed.history] == ["accept", "reject", "accept", "accept"]
    for (name, weight), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_old_states_are_removed_and_changed_ones_refused(
    tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]
) -> None:
    model, folder = tiny_model_folder(), tmp_path / "accepted"
    gate = CapabilityGate(suite(tmp_path), str(folder), every_n_steps=1, keep=2)
    poisoned(model, gate, steps=3)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "step=2.ckpt", "step=2.json", "step=3.ckpt", "step=3.json",
    }  # fmt: skip
    other = CapabilityGate(suite(tmp_path), str(folder), every_n_steps=1)
    with pytest.raises(ValueError, match=r"holds accepted states of another run.*or choose another folder$"):
        poisoned(model, other, steps=1)

    class Damage(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            with (tmp_path / "new" / "step=0.ckpt").open("ab") as file:
                file.write(b"0")

    verdicts.append("reject")
    gate = CapabilityGate(suite(tmp_path), str(tmp_path / "new"), every_n_steps=1)
    with pytest.raises(ValueError, match=r"step=0.ckpt' of the last accepted state does not have the SHA-256 of the"):
        poisoned(model, gate, Damage(), steps=1)


class AsTold:
    """Passes or fails as told, and samples from the candidate."""

    def __init__(self, passes: bool) -> None:
        self.passes = passes
        self.said: list[str] = []

    def run(self, engine: Any, seed: int) -> Finding:
        self.said.append(engine.generate([engine.tokenizer("1+1=")["input_ids"]], 1)[0][0].text)
        return Finding("told", 1.0, 1.0, 1.0, 0.5, passed=self.passes, detail="as told")


@pytest.mark.parametrize("passes", [True, False])
def test_validators_must_pass_as_well(
    passes: bool, tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]
) -> None:
    """A refused candidate is taken back, and the record has the finding; what is rejected anyway is not validated."""
    check = AsTold(passes)
    criteria = {"patience": 2, "on_reject": "smaller_step"}
    gate = CapabilityGate(
        suite(tmp_path), str(tmp_path / "accepted"), every_n_steps=1, criteria=criteria, validators=[check]
    )
    module, before, _ = poisoned(tiny_model_folder(), gate, steps=2)
    assert len(check.said) == 2
    assert [entry["verdict"] for entry in gate.history] == (["accept"] * 2 if passes else ["reject", "stop"])
    assert all(entry["validation"]["findings"][0]["check"] == "told" for entry in gate.history)
    assert gate.history[0]["reason"] == ("as told" if passes else "told: as told")
    changed = any(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert changed == passes

    verdicts.append("stop")
    again = CapabilityGate(suite(tmp_path), str(tmp_path / "again"), every_n_steps=1, validators=[check])
    poisoned(tiny_model_folder(), again, steps=1)
    assert len(check.said) == 2
    with pytest.raises(ValueError, match="there is no check 'Robustnes'"):
        CapabilityGate(suite(tmp_path), str(tmp_path / "b"), validators=[{"class_path": "Robustnes"}])


def test_divergence_from_the_start_is_limited(tiny_model_folder: Any, tmp_path: Path) -> None:
    """KL(candidate || start) on one sample per prompt that the candidate draws, against both models by hand."""
    criteria = {"accept": "not_worse", "max_kl": 1e-6, "on_reject": "stop"}
    task = suite(tmp_path, rows=4, sampling={"max_new_tokens": 5})
    gate = CapabilityGate(task, str(tmp_path / "accepted"), every_n_steps=2, criteria=criteria)
    weights: list[Any] = []
    samples: list[Any] = []
    gate._meter.samples = lambda module, draw=gate._meter.samples: samples.append(draw(module)) or samples[-1]  # type: ignore[method-assign]

    class Weights(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weights.append({name: p.detach().clone() for name, p in pl_module.model.named_parameters()})

    module, _, _ = poisoned(tiny_model_folder(), gate, Weights(), steps=2)
    assert re.fullmatch(
        r"its divergence from the start is \S+ nats per token, above max_kl=1e-06", gate.history[0]["reason"]
    )

    def mean_logprob() -> float:
        total, count = 0.0, 0
        for _, _, prompt, tokens in samples[-1]:
            with torch.no_grad():
                logits = module.model(input_ids=torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            for n, token in enumerate(tokens):
                total, count = total + float(logits[len(prompt) + n - 1, token]), count + 1
        return total / count

    start = mean_logprob()
    with torch.no_grad():
        for name, weight in module.model.named_parameters():
            weight.copy_(weights[-1][name])
    gate._meter.samples(module)
    assert samples[2] == samples[1]  # the candidate's
    assert gate.history[0]["kl"] == pytest.approx(mean_logprob() - start, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps is 0; it must be a whole number of at least 1"),
        ({"step_factor": 1.0}, r"step_factor is 1.0; it must be in \(0, 1\)"),
        ({"keep": 0}, r"keep is 0; it must be a whole number of at least 1"),
        ({"criteria": {"level": 0.7}}, r"criteria.level is 0.7; it must be in \(0, 0.5\)"),
        ({"criteria": {"max_token_ms": 9}}, r"^criteria.max_token_ms is 9, and training changes neither size nor"),
        ({"criteria": {"max_memory_gb": 2}}, r"^criteria.max_memory_gb is 2, and training changes neither size nor"),
        ({"suite": {"name": "none", "tasks": []}}, r"suite 'none' has no tasks: give at least one"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CapabilityGate(**{"suite": suite(tmp_path), "folder": str(tmp_path / "accepted"), **options})


def test_refusals_in_training_leave_nothing(tiny_model_folder: Any, tmp_path: Path) -> None:
    model, folder = tiny_model_folder(), str(tmp_path / "accepted")
    cases: Iterator[tuple[dict[str, Any], dict[str, Any], str]] = iter(
        [
            (
                {"verifier": f"{__name__}.raises"},
                {},
                r"^the verifier of task 'no z' failed on all of 3 answers of 'SFTModule': KeyError: 'answer'",
            ),
            ({"limit": 3, "prompts": str(tmp_path / "empty.jsonl")}, {}, r"empty.jsonl"),
            ({"strategy": "best_of_m"}, {}, r"^task 'no z': there is no strategy 'best_of_m'"),
            (
                {"dropout": 0.0},
                {"criteria": {"on_reject": "new_seed"}},
                r"^criteria.on_reject is 'new_seed', and SFTModule draws",
            ),
            (
                {},
                {"criteria": {"min_unique_answers": 0.5}},
                r"^criteria.min_unique_answers is 0.5, and no task measures",
            ),
        ]
    )
    (tmp_path / "empty.jsonl").write_text("")
    for task, options, message in cases:
        rate = {"dropout": task.pop("dropout")} if "dropout" in task else {}
        gate = CapabilityGate(suite(tmp_path, **task), folder, every_n_steps=1, **options)
        with pytest.raises(ValueError, match=message) as raised:
            poisoned(model, gate, steps=1, of_module=rate)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "accepted").exists()


def test_it_needs_a_module_that_generates(tiny_model_folder: Any, tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CapabilityGate(suite(tmp_path), str(tmp_path / "accepted"))],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^CapabilityGate needs a module that generates text; it was given a Rew"):
        trainer.fit(RewardModule(str(tiny_model_folder())), datamodule=RUNS["reward"].data())


def test_time_passes_after_a_rejection_at_the_end(tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]) -> None:
    """Lightning's timer has stopped by then; what it had counted is counted once."""
    timer, told, begun = Timer(duration={"hours": 1}), [], time.monotonic()

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            told.append((time.monotonic(), timer.time_elapsed()))

    verdicts.extend(["reject", "accept"])
    gate = CapabilityGate(suite(tmp_path), str(tmp_path / "accepted"), every_n_steps=9)
    poisoned(tiny_model_folder(), gate, timer, Clock(), steps=2)
    assert len(told) == 4
    assert told[3][1] - told[2][1] == pytest.approx(told[3][0] - told[2][0], abs=1e-3)
    assert told[1][1] <= told[2][1] <= told[2][0] - begun


def test_states_that_a_checkpoint_needs_are_kept(tiny_model_folder: Any, tmp_path: Path, verdicts: list[Any]) -> None:
    """Killed after two more states were accepted, the run continues from its newest checkpoint."""
    folder = tmp_path / "accepted"

    class Kill(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                raise InterruptedError

    def run(*callbacks: lightning.Callback, resume: Any = None) -> CapabilityGate:
        gate = CapabilityGate(suite(tmp_path), str(folder), every_n_steps=1, keep=1)
        saver = TrainingCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=3, keep=1)
        poisoned(tiny_model_folder(), gate, saver, *callbacks, steps=6, resume=resume)
        return gate

    with pytest.raises(InterruptedError):
        run(Kill())
    assert {path.name for path in folder.glob("*.ckpt")} == {"step=3.ckpt", "step=5.ckpt"}
    assert [entry["step"] for entry in run(resume="last").history] == [1, 2, 3, 4, 5, 6]
    # Nothing needs the state of step 3 once there is a checkpoint of step 6, which the next accepted state finds.
    assert {path.name for path in folder.glob("*.ckpt")} == {"step=3.ckpt", "step=6.ckpt"}
    with pytest.raises(ValueError, match=r"or resume with ckpt_path='.*accepted/step=6\.ckpt'$"):
        CapabilityGate(suite(tmp_path), str(folder)).snapshots.read(2)
