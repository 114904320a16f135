"""Rounds of a model's own samples that a gate accepts or takes back, in one run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import CapabilityGate, SelfImprovement, TrainingCheckpoint, capability_gate
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.inference import derive_seed
from rlhf_lightning.self_improvement.gate import Decision

from ..helpers import save_tiny_model
from ..integration.test_resume import assert_same, final, ignore_totals
from ..invariance.harness import trainer
from ..self_improvement.naive_replay import naive_replay
from .test_weight_average import trained

pytestmark = [pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]

ADAM, LARGE = (partial(torch.optim.AdamW, lr=rate) for rate in (0.01, 0.03))
MANY = {"num_samples": 64, "keep": 12}
ROWS = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in (1, 2, 3, 4, 1, 2)]
PROMPTS, TESTED = 8, 12
LETTERS = tuple("abcdefgh")


def is_letter(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(text[:1] in LETTERS) for text in completions]


def is_other(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(text[:1] not in LETTERS) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Whether answers start with anything but some letters, of samples."""
    file = tmp_path_factory.mktemp("suite") / "tested.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}*{n}="}) + "\n" for n in range(TESTED)))
    task = {"name": "digit", "prompts": str(file), "verifier": f"{__name__}.is_other", "num_samples": 4}
    return {"name": "small", "tasks": [task | {"sampling": {"max_new_tokens": 2, "temperature": 1.0}}]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}-{n}="}) + "\n" for n in range(PROMPTS)))
    return str(file)


class Killed(Exception):
    """Ends a run."""


class Seen(lightning.Callback):
    """Notes the step, the rate and the rows of each batch; ends the run at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.rates: list[tuple[int, float]] = []
        self.rows: list[set[str]] = []
        self.killed_at = killed_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.rows) == self.killed_at:
            raise Killed
        self.rates.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
        self.rows.append({example.row_id.rpartition(":")[0] for example in batch.examples})


class Run:
    """One run with both callbacks."""

    def __init__(self, folder: str, prompts: str, suite: dict[str, Any], place: Path, **given: Any) -> None:
        self.seen = Seen(given.pop("killed_at", None))
        verifier = given.pop("verifier", is_letter)
        rounds = {"prompts": prompts, "folder": str(place / "own"), "verifier": f"{__name__}.{verifier.__name__}"}
        rounds |= {"num_samples": 6, "sampling": {"max_new_tokens": 16}, "seed": 3, **given.pop("rounds", {})}
        self.rounds = SelfImprovement(**rounds)
        options = {"criteria": given.pop("criteria", {"accept": "not_worse", "patience": 3})}
        self.gate = CapabilityGate(suite, str(place / "accepted"), **options, **given.pop("gate", {}))
        self.saver = TrainingCheckpoint(str(place / "checkpoints"), every_n_steps=1, keep=99)
        self.module = SFTModule(folder, optimizer=given.pop("optimizer", ADAM), dropout=0.0)
        self.data = SFTDataModule(train=ROWS, global_batch_size=2, tokenizer=folder)
        self.resume = given.pop("resume", None)
        callbacks = [self.rounds, self.gate, self.saver, self.seen]
        settings = {"max_epochs": 4, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        self.trainer = trainer("32-true", **settings | given, callbacks=callbacks, default_root_dir=str(place))

    def fit(self) -> Run:
        weights_only = True if self.resume else None
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=self.resume, weights_only=weights_only)
        return self

    @property
    def verdicts(self) -> list[str]:
        return [entry["verdict"] for entry in self.gate.history]


@pytest.fixture
def rejections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each candidate after an accepted one is rejected; the number of accepted ones is counted here."""
    plan: list[int] = []

    def scripted(accepted: Any, candidate: Any, *args: Any, **kwargs: Any) -> Decision:
        wanted = plan[0] if plan else 0
        verdict = "reject" if kwargs["num_rejected"] < wanted else "accept"
        if verdict == "accept" and plan:
            plan.pop(0)
        return Decision(verdict, "as told", 0.0, 0.0, 0.0, 1.0, kwargs["kl"])

    monkeypatch.setattr(capability_gate, "decide", scripted)
    return plan


def test_a_poisoned_reward_leaves_the_model_as_it_was_accepted(
    folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path
) -> None:
    """The reward asks for the contrary of what is tested."""
    given: dict[str, Any] = {"rounds": MANY, "optimizer": LARGE, "max_epochs": 3}
    run = Run(folder, prompts, suite, tmp_path, **given).fit()
    assert run.verdicts == ["accept", "reject", "reject", "stop"]
    accepted = torch.load(tmp_path / "accepted/step=3.ckpt", weights_only=True)["state_dict"]
    for name, weight in trained(run.module).items():
        assert torch.equal(weight, accepted[name]), name
    assert run.trainer.global_step == 3

    # Each attempt has samples of its own, of the accepted policy, and a smaller step.
    files = [tmp_path / f"own/round-1{name}.jsonl" for name in ("", "-attempt-1", "-attempt-2")]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len({json.dumps(attempt) for attempt in rows}) == 3
    assert {row["provenance"]["model"] for attempt in rows for row in attempt} == {"step 3"}
    ways = [{str(file)} for file, attempt in zip(files, rows, strict=True) for _ in range(-(-len(attempt) // 2))]
    assert run.seen.rows == [{"memory"}] * 3 + ways
    assert sorted({rate for _, rate in run.seen.rates}) == pytest.approx([0.0075, 0.015, 0.03])
    assert run.rounds.history == []
    assert run.gate.history[0]["scores"]["digit"] == 1.0


@pytest.mark.slow
def test_without_a_gate_the_poison_works(folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path) -> None:
    free = Run(folder, prompts, suite, tmp_path, rounds=MANY, optimizer=LARGE, max_epochs=3)
    free.trainer.callbacks.remove(free.gate)
    free.fit()
    assert free.gate._meter.results(free.module, None)[0].accuracy.value < 0.5


@pytest.mark.slow
def test_rounds_that_help_are_accepted(folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path) -> None:
    (task,) = suite["tasks"]
    tested = suite | {"tasks": [task | {"verifier": f"{__name__}.is_letter"}]}
    # The datamodule's rows have other answers: of what is rare from the start a little is lost at first.
    given: dict[str, Any] = {"criteria": {"accept": "not_worse", "threshold": 0.2}, "max_epochs": 3}
    run = Run(folder, prompts, tested, tmp_path, rounds=MANY, optimizer=LARGE, **given).fit()
    assert run.verdicts == ["accept"] * 3
    assert [(record["round"], record["attempt"]) for record in run.rounds.history] == [(1, 0), (2, 0)]
    first, last = run.gate.history[0]["scores"]["digit"], run.gate.history[-1]["scores"]["digit"]
    assert last > first + 0.25


def test_a_rejected_round_leaves_no_trace(
    folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path, rejections: list[int], monkeypatch: Any
) -> None:
    """With neither other seeds nor a smaller step, what is tried again is what was rejected."""
    monkeypatch.setattr(capability_gate, "scale_learning_rates", lambda trainer, factor: None)
    monkeypatch.setattr(SelfImprovement, "attempt", property(lambda self: 0, lambda self, value: None), raising=False)
    plain = Run(folder, prompts, suite, tmp_path / "plain").fit()
    rejections += [1, 2, 1, 1]
    again = Run(folder, prompts, suite, tmp_path / "again").fit()
    assert again.verdicts == ["reject", "accept", "reject", "reject", "accept", *["reject", "accept"] * 2]
    assert len(again.seen.rows) > 2 * len(plain.seen.rows)
    (_, expected), (_, found) = final(tmp_path / "plain/checkpoints"), final(tmp_path / "again/checkpoints")
    for checkpoint in (expected, found):
        ignore_totals(checkpoint)
        for key in [key for key in checkpoint["callbacks"] if key.startswith("CapabilityGate")]:
            del checkpoint["callbacks"][key]
    assert_same(found, expected)
    for file in (tmp_path / "plain/own").iterdir():
        assert (tmp_path / "again/own" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("every", "cuts"),
    [(None, 1), pytest.param(None, 9, marks=pytest.mark.slow), pytest.param(2, 9, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_is_the_same_run(
    every: int | None, cuts: int, folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path, rejections: Any
) -> None:
    """Interrupted in any attempt of a round, and resumed from the newest checkpoint."""
    plan = [0, 2, 1]
    gate = {"gate": {"every_n_steps": every}, "rounds": {"replay": {"share": 0.5}}}
    rejections += plan
    whole = Run(folder, prompts, suite, tmp_path / "whole", **gate).fit()
    assert whole.verdicts[:6] == ["accept", "reject", "reject", "accept", "reject", "accept"]
    _, expected = final(tmp_path / "whole/checkpoints")
    count = len(whole.seen.rows)
    for killed_at in (count * (cut + 1) // (cuts + 1) for cut in range(cuts)):
        place = tmp_path / f"cut-{killed_at}"
        rejections[:] = plan
        cut = Run(folder, prompts, suite, place, killed_at=killed_at, **gate)
        with pytest.raises(Killed):
            cut.fit()
        path = max((place / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        held = torch.load(path, weights_only=True)["callbacks"]
        (decided,) = [state["history"] for key, state in held.items() if key.startswith("CapabilityGate")]
        rejections[:] = plan[sum(entry["verdict"] == "accept" for entry in decided) :]
        resumed = Run(folder, prompts, suite, place, resume=str(path), **gate).fit()
        assert resumed.gate.history == whole.gate.history
        assert resumed.rounds.history == whole.rounds.history
        _, found = final(place / "checkpoints")
        assert_same(found["state_dict"], expected["state_dict"])
        assert_same(found["optimizer_states"], expected["optimizer_states"])
        for file in (tmp_path / "whole/own").iterdir():
            assert (place / "own" / file.name).read_bytes() == file.read_bytes()


def test_rows_of_earlier_rounds_come_back_but_not_those_of_rejected_ones(
    folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path, rejections: list[int]
) -> None:
    rejections += [0, 1, 1, 0]
    Run(folder, prompts, suite, tmp_path, rounds={"replay": {"share": 1.0, "capacity": 9}, "keep": 3}).fit()
    earlier: dict[int, Any] = {}
    back = 0
    for number in (1, 2, 3):
        # The last attempt is the one that was accepted.
        for attempt in (0,) if number == 3 else (0, 1):
            again = ("attempt", attempt) if attempt else ()
            name = f"round-{number}" + (f"-attempt-{attempt}" if attempt else "")
            with (tmp_path / f"own/{name}.jsonl").open() as file:
                rows = [json.loads(line) for line in file]
            own = [row for row in rows if "round" not in row["provenance"]]
            seed = derive_seed(3, "replay", number, *again)
            drawn = naive_replay(earlier, own, number=number, seed=seed, capacity=9, share=1.0)
            assert rows == [*own, *drawn]
            back += len(drawn)
        earlier[number] = [(row, 1.0) for row in own]
    assert back > 3
    assert {file.name for file in (tmp_path / "own").glob("*.jsonl")} == {
        f"round-{name}{kind}.jsonl"
        for name in ("1", "1-attempt-1", "2", "2-attempt-1", "3")
        for kind in ("", ".replay")
    }


def test_other_seeds_are_another_attempt_where_a_round_begins_at_each_boundary(
    folder: str, prompts: str, suite: dict[str, Any], tmp_path: Path
) -> None:
    """A module that draws nothing itself can be tried again on other rows, and else it cannot."""
    criteria = {"criteria": {"on_reject": "new_seed"}}
    Run(folder, prompts, suite, tmp_path, **criteria, max_steps=1).fit()
    for given in ({"gate": {"every_n_steps": 2}}, {"rounds": {"every_n_epochs": 2}}):
        run = Run(folder, prompts, suite, tmp_path / "other", **criteria, **given)
        with pytest.raises(ValueError, match=r"^criteria.on_reject is 'new_seed', and SFTModule draws nothing"):
            run.fit()
