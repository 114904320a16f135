"""Rounds inside fit: which rows are trained on when, where they come from, and that a resumed run is the same run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.callbacks import SelfImprovement, TrainingCheckpoint, self_improvement
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule
from rlhf_lightning.evaluation.answers import read_prompts
from rlhf_lightning.inference import LocalEngine, SamplingParams, derive_seed
from rlhf_lightning.models import load_causal_lm, load_tokenizer

from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from .test_weight_average import assert_close, trained

EVEN = f"{__name__}.first_is_even"
NEVER = f"{__name__}.never_right"
ADAM = partial(torch.optim.AdamW, lr=0.01)
ROWS = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in range(6)]
PAIRS = [{"prompt": f"{a}+{a}=", "chosen": str(2 * a), "rejected": "no"} for a in range(6)]
PROMPTS = 8


def first_is_even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


def never_right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}-{n}="}) + "\n" for n in range(PROMPTS)))
    return str(file)


class Seen(lightning.Callback):
    """Notes the rows of each batch."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([example.row_id for example in batch.examples])


def run(
    folder: str, place: Path, rounds: SelfImprovement, *callbacks: Any, resume: str | None = None, **settings: Any
) -> Any:
    options = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "default_root_dir": str(place)}
    options |= {"callbacks": [rounds, *callbacks], **settings}
    if rounds.rows == "pairs":
        module: Any = DPOModule(folder, optimizer=ADAM)
        data: Any = PreferenceDataModule(train=PAIRS, global_batch_size=2, tokenizer=folder)
    else:
        module = SFTModule(folder, optimizer=ADAM)
        data = SFTDataModule(train=ROWS, global_batch_size=2, tokenizer=folder)
    saver = TrainingCheckpoint(str(place / "checkpoints"), every_n_steps=1, keep=99)
    options["callbacks"] = [*options["callbacks"], saver]
    trainer("32-true", **options).fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return module


def improvement(prompts: str, place: Path, **given: Any) -> SelfImprovement:
    options: dict[str, Any] = {"verifier": EVEN, "num_samples": 6, "sampling": {"max_new_tokens": 16}, "seed": 3}
    return SelfImprovement(prompts, str(place / "own"), **options | given)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rounds_train_on_what_the_policy_of_their_start_has_sampled(folder, prompts, tmp_path):
    seen, rounds = Seen(), improvement(prompts, tmp_path)
    run(folder, tmp_path, rounds, seen, max_epochs=3)
    first, second = (tmp_path / f"own/round-{n}.jsonl" for n in (1, 2))
    counts = [6, len(lines(first)), len(lines(second))]
    steps = [-(-count // 2) for count in counts]
    epochs = [seen.rows[: steps[0]], seen.rows[steps[0] : -steps[2]], seen.rows[-steps[2] :]]
    assert len(seen.rows) == sum(steps)
    for rows, expected in zip(
        epochs,
        (
            {f"memory:{n}" for n in range(1, 7)},
            {f"{first}:{n}" for n in range(1, counts[1] + 1)},
            {f"{second}:{n}" for n in range(1, counts[2] + 1)},
        ),
        strict=True,
    ):
        assert {row for batch in rows for row in batch} == expected

    # Rows are the best samples of the policy at that step, drawn by hand from its checkpoint.
    for number, file, step in ((1, first, steps[0]), (2, second, steps[0] + steps[1])):
        state = torch.load(tmp_path / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]
        model = load_causal_lm(folder, dtype=torch.float32)
        model.load_state_dict({n.removeprefix("model."): w for n, w in state.items()}, strict=False)
        engine = LocalEngine(model.eval(), load_tokenizer(folder))
        expected = []
        for n, example in enumerate(read_prompts(prompts, engine.tokenizer)):
            seeds = [derive_seed(derive_seed(3, "round", number), n, s) for s in range(6)]
            (group,) = engine.generate(
                [example.root.tokens.tolist()], 6, SamplingParams(max_new_tokens=16), seeds=[seeds]
            )
            right = [s for s in group if s.finish_reason == "stop" and s.text and ord(s.text[0]) % 2 == 0]
            expected += [(example.fields["prompt"], sample.text) for sample in right[:1]]
        found = lines(file)
        assert [(row["prompt"], row["completion"]) for row in found] == expected
        assert {row["provenance"]["model"] for row in found} == {f"step {step}"}
        assert rounds.history[number - 1]["rows"] == len(found)
        assert rounds.history[number - 1]["samples"] == 6 * PROMPTS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["demonstrations", "pairs"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_is_the_same_run(kind, every, folder, prompts, tmp_path):
    given = {"rows": kind, "every_n_epochs": every, "prompts_per_round": 5}
    settings = {"max_steps": 12 if every == 1 else 18, "max_epochs": -1}
    whole = run(folder, tmp_path / "whole", rounds := improvement(prompts, tmp_path / "whole", **given), **settings)
    assert len(rounds.history) >= 2
    for stopped in range(2, 11):
        place = tmp_path / f"cut-{stopped}"
        cut = improvement(prompts, place, **given)
        run(folder, place, cut, max_steps=stopped, max_epochs=-1)
        again = improvement(prompts, place, **given)
        resumed = run(folder, place, again, resume=str(place / f"checkpoints/step={stopped}.ckpt"), **settings)
        assert_close(trained(resumed), trained(whole), 0.0)
        assert again.history == rounds.history
        for file in (tmp_path / "whole/own").iterdir():
            assert (place / "own" / file.name).read_bytes() == file.read_bytes()


class Ends(lightning.Callback):
    """Notes the steps that end an epoch."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.is_last_batch:
            self.steps.append(trainer.global_step)


def test_a_run_that_is_resumed_between_two_rounds_knows_their_ends(folder, prompts, tmp_path):
    """Their rows are not as many as those of the epoch that it was stopped in."""
    settings = {"max_epochs": 3}
    run(folder, tmp_path, improvement(prompts, tmp_path), ends := Ends(), **settings)
    assert len(ends.steps) == 3
    for number, step in enumerate(ends.steps[:2]):
        checkpoint = str(tmp_path / f"checkpoints/step={step}.ckpt")
        place = tmp_path / f"again-{number}"
        run(folder, place, improvement(prompts, tmp_path), again := Ends(), resume=checkpoint, **settings)
        assert again.steps == ends.steps[number + 1 :]


def test_pairs_and_seed_rows(folder, prompts, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    rounds = improvement(prompts, tmp_path, rows="pairs", seed_rows=str(seeds), seed_ratio=0.5)
    run(folder, tmp_path, rounds, max_epochs=2)
    rows = lines(tmp_path / "own/round-1.jsonl")
    own = [row for row in rows if "model" in row["provenance"]]
    assert all(ord(row["chosen"][0]) % 2 == 0 and ord(row["rejected"][0]) % 2 == 1 for row in own)
    assert len(rows) - len(own) == min(6, len(own))


def test_rows_of_earlier_rounds_come_back(folder, prompts, tmp_path):
    rounds = improvement(prompts, tmp_path, replay={"share": 1.0, "priority": "frontier", "max_age": 1})
    run(folder, tmp_path, rounds, max_epochs=4)
    files = [lines(tmp_path / f"own/round-{n}.jsonl") for n in (1, 2, 3)]
    again = [[row["provenance"]["round"] for row in rows if "round" in row["provenance"]] for rows in files]
    assert not again[0]
    assert {*again[1]} == {1}
    assert {*again[2]} == {2}
    assert [record["replayed"] for record in rounds.history] == [len(places) for places in again]
    for earlier, rows in pairwise(files):
        # As they were, of the policy that drew them.
        before = [row for row in earlier if "round" not in row["provenance"]]
        for row in rows:
            if row["provenance"].pop("round", None):
                assert row in before


def test_a_resumed_run_needs_the_rows_that_were_kept(folder, prompts, tmp_path):
    run(folder, tmp_path, improvement(prompts, tmp_path), max_steps=4, max_epochs=-1)
    again, resume = improvement(prompts, tmp_path, replay={}), str(tmp_path / "checkpoints/step=4.ckpt")
    with pytest.raises(ValueError, match=r"the rows of round 1 are not in .*round-1\.replay\.jsonl'"):
        run(folder, tmp_path, again, resume=resume, max_steps=6, max_epochs=-1)


def test_a_round_without_a_row_keeps_those_before(folder, prompts, tmp_path):
    seen, rounds = Seen(), improvement(prompts, tmp_path, verifier=NEVER)
    run(folder, tmp_path, rounds, seen, max_epochs=2)
    assert [record["rows"] for record in rounds.history] == [0]
    assert not (tmp_path / "own").exists()
    assert len(seen.rows) == 6
    assert {row for batch in seen.rows[3:] for row in batch} == {f"memory:{n}" for n in range(1, 7)}


def test_rows_that_a_resumed_run_needs(folder, prompts, tmp_path):
    run(folder, tmp_path, improvement(prompts, tmp_path), max_steps=4, max_epochs=-1)
    (tmp_path / "own/round-1.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the rows of round 1 are not in .*round-1\.jsonl'"):
        run(
            folder,
            tmp_path,
            improvement(prompts, tmp_path),
            resume=str(tmp_path / "checkpoints/step=4.ckpt"),
            max_steps=6,
            max_epochs=-1,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "pair"}, "rows is 'pair'; it must be one of demonstrations, pairs, unpaired, spin; did you mean"),
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"prompts_per_round": 0}, "prompts_per_round is 0"),
        ({"rows": "pairs", "num_samples": 1}, "num_samples is 1, and a pair is made of two samples"),
        ({"sampling": {"temperature": 0.0}}, "num_samples is 4 at sampling.temperature 0, where all are equal"),
        ({"seed_ratio": 0.5}, "seed_rows is None and seed_ratio 0.5: give both, or neither"),
        ({"replay": {"capacity": 0}}, "replay.capacity is 0; it must be a whole number of at least 1"),
        (
            {"replay": {"rejected": True}},
            "replay.rejected is True, and a gate takes rejected rounds back",
        ),
        ({"replay": {"rows": "x"}}, "replay.rows is 'x', and the callback gives it: leave it out"),
        ({"sampling": {"seed": 1}}, "sampling.seed is 1: write seed"),
        ({"verifier": "nowhere.right"}, "verifier 'nowhere.right' cannot be imported"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SelfImprovement("p.jsonl", str(tmp_path), **options)


def test_a_module_without_its_rows(folder, prompts, tmp_path):
    module = SFTModule(folder, optimizer=ADAM)
    loader = torch.utils.data.DataLoader([1, 2])
    fit = trainer("32-true", callbacks=[improvement(prompts, tmp_path)], default_root_dir=str(tmp_path), max_steps=1)
    with pytest.raises(ValueError, match=r"the trainer has NoneType: call trainer\.fit"):
        fit.fit(module, loader)


def test_precomputed_rows_cannot_be_replaced(folder, prompts, tmp_path):
    module = DPOModule(folder, optimizer=ADAM, reference="precomputed")
    data = PreferenceDataModule(train=PAIRS, global_batch_size=2, tokenizer=folder)
    rounds = improvement(prompts, tmp_path, rows="pairs")
    fit = trainer("32-true", callbacks=[rounds], default_root_dir=str(tmp_path), max_epochs=2)
    with pytest.raises(ValueError, match=r"'precomputed', which has log-probs .*: use reference='frozen'$"):
        fit.fit(module, datamodule=data)


def test_a_run_leaves_its_datamodule_as_it_was_and_another_begins_anew(folder, prompts, tmp_path):
    rounds, data = improvement(prompts, tmp_path), SFTDataModule(train=ROWS, global_batch_size=2, tokenizer=folder)

    class Kill(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise InterruptedError

    own = {f"memory:{n}" for n in range(1, 7)}
    for callbacks in ([], [Kill()], []):
        seen = Seen()
        run = trainer("32-true", callbacks=[rounds, seen, *callbacks], default_root_dir=str(tmp_path), max_epochs=2)
        with pytest.raises(InterruptedError) if callbacks else nullcontext():
            run.fit(SFTModule(folder, optimizer=ADAM), datamodule=data)
        assert {row for batch in seen.rows[:3] for row in batch} == own
        assert {row for batch in seen.rows[3:] for row in batch}.isdisjoint(own)
        assert [record["round"] for record in rounds.history] == [1]
        assert "train_dataloader" not in vars(data)
        assert {example.row_id for example in data._store("train")} == own


def test_a_rank_that_fails_raises_after_it_has_told_the_others(prompts, tmp_path, monkeypatch):
    rounds, told, others = improvement(prompts, tmp_path), [], []
    monkeypatch.setattr(rounds, "_of_round", lambda *_: ["first", "second"])
    monkeypatch.setattr(self_improvement, "gather_objects", lambda found: told.append(found) or [found, *others])
    trainer = SimpleNamespace(global_rank=0, world_size=2)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no connection")

    monkeypatch.setattr(rounds, "_sample", fail)
    with pytest.raises(RuntimeError, match="no connection"):
        rounds._make(trainer, None)
    assert told == [({}, "no connection")]
    others.append(told[0])
    monkeypatch.setattr(rounds, "_sample", lambda *_: ["scored"])
    with pytest.raises(ValueError, match="round 0 failed on another rank: no connection"):
        rounds._make(trainer, None)
