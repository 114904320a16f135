from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger

from rlhf_lightning import DPOModule, GRPOModule, SFTModule
from rlhf_lightning.callbacks import Throughput, throughput
from rlhf_lightning.callbacks.throughput import flops_per_token, peak_flops_of
from rlhf_lightning.core import timing
from rlhf_lightning.core.timing import PHASES, PhaseClock, Work
from rlhf_lightning.sequences import Example, ExampleBatch, plan_micro_batches

from ..helpers import save_tiny_model, tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import pairs
from ..rl.fixed_rollouts import FixedGRPO, fixed_completions, options, prompts

CPU = torch.device("cpu")


class Kept(Logger):
    """Keeps what it is given."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def fit(
    module: Any,
    callback: Throughput,
    batches: Any,
    *,
    before: Sequence[lightning.Callback] = (),
    after: Sequence[lightning.Callback] = (),
    val: Any = None,
    **given: Any,
) -> Kept:
    kept = Kept()
    run = trainer("32-true", max_epochs=1, logger=kept, num_sanity_val_steps=0, **{"log_every_n_steps": 2, **given})
    run.callbacks += [*before, callback, *after]
    run.fit(module, batches, val)
    assert module.clock is None
    assert not {"start", "stop"} & vars(run.profiler).keys()
    return kept


# The clock.


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def busy(clock: PhaseClock, hands: Any) -> None:
    """A batch of 1 + 2 + ... + 64 seconds, one of them in each place."""
    clock.begin()
    hands.now += 1  # other
    with clock.phase("data"):
        hands.now += 2
    with clock.phase("forward_backward"):
        hands.now += 4
        with clock.phase("score"):
            hands.now += 8
            with clock.phase("generate"):
                hands.now += 16
        hands.now += 32
    hands.now += 64
    clock.end(examples=3)


BUSY = {"data": 2, "generate": 16, "score": 8, "forward_backward": 36, "step": 0, "other": 65}


def test_phases_are_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    monkeypatch.setattr(timing.time, "perf_counter", hands)
    clock = PhaseClock(CPU)
    for _ in range(2):
        busy(clock, hands)
        with clock.phase("score"):  # a validation, say
            hands.now += 1000
    work = clock.take()
    assert work.seconds == {name: 2 * value for name, value in BUSY.items()}
    assert (work.batches, work.examples) == (2, 6)
    assert clock.take() == Work()


def test_a_batch_that_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    monkeypatch.setattr(timing.time, "perf_counter", hands)
    clock = PhaseClock(CPU)
    busy(clock, hands)
    clock.begin()  # the loader had nothing left
    hands.now += 1000
    busy(clock, hands)
    assert clock.take().seconds == {name: 2 * value for name, value in BUSY.items()}


def test_an_exception_leaves_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    monkeypatch.setattr(timing.time, "perf_counter", hands)
    clock = PhaseClock(CPU)
    clock.begin()
    with pytest.raises(KeyError), clock.phase("score"):
        raise KeyError
    hands.now += 3
    clock.end(examples=0)
    assert clock.take().seconds["other"] == 3


@pytest.mark.parametrize("most_marks", [1, 10_000])
def test_events_on_cuda(monkeypatch: pytest.MonkeyPatch, most_marks: int) -> None:
    hands, waits = Hands(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda"
            self.at = hands.now

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, other: Any) -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(timing, "_MOST_MARKS", most_marks)
    clock = PhaseClock(torch.device("cuda"))
    busy(clock, hands)
    busy(clock, hands)
    assert clock.take().seconds == {name: 2 * value for name, value in BUSY.items()}
    # The device is waited for where sums are read, at the last event alone.
    assert waits == ([254] if most_marks > 1 else [127, 254])


# Floating-point operations.


def test_flops_of_a_token() -> None:
    model = tiny_model("llama")  # width 32, 2 layers, 4 heads of 8, 2 of keys and values, 48 between
    weights = sum(p.numel() for p in model.parameters())
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert weights - 2 * layer - 32 == model.config.vocab_size * 32 * (1 if model.config.tie_word_embeddings else 2)
    assert flops_per_token(model, 10.0) == 6 * weights + 12 * 2 * 4 * 8 * 10
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    trained = model.lm_head.weight.numel()
    assert flops_per_token(model, 10.0) == 4 * (weights - trained) + 6 * trained + 12 * 2 * 4 * 8 * 10


def test_flops_of_a_mixture() -> None:
    model = tiny_model("qwen3_moe")  # 4 experts of 16 between, 2 for a token
    weights = sum(p.numel() for p in model.parameters())
    idle = 2 * 2 * 3 * 32 * 16
    assert flops_per_token(model, 1.0) == 6 * (weights - idle) + 12 * 2 * 4 * 8


def test_flops_of_packed_weights() -> None:
    model = tiny_model("llama")
    plain = flops_per_token(model, 1.0)
    weight = model.model.layers[0].mlp.up_proj.weight
    half = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1))
    half.quant_state = SimpleNamespace(shape=weight.shape)  # type: ignore[attr-defined]
    model.model.layers[0].mlp.up_proj.weight = half
    assert flops_per_token(model, 1.0) == plain


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H100 80GB HBM3", "bf16-true", False, 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", False, 756e12),
        ("NVIDIA GH200 480GB", "32-true", True, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5e12),
        ("NVIDIA A10G", "bf16-mixed", False, 70e12),
        ("NVIDIA L40S", "bf16-mixed", False, 362e12),
        ("NVIDIA L4", "bf16-mixed", False, 121e12),
        ("NVIDIA H100", "64-true", False, None),
        ("Radeon", "bf16-mixed", False, None),
        ("Tesla V100-SXM2-16GB", "16-mixed", False, 125e12),
        ("NVIDIA A100 80GB PCIe", "bf16-mixed", False, 312e12),
        ("NVIDIA RTX A1000", "bf16-mixed", False, None),
        ("NVIDIA RTX A4000", "bf16-mixed", False, None),
        ("NVIDIA T400 4GB", "16-mixed", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", False, None),
    ],
)
def test_peaks(name: str, precision: str, tf32: bool, expected: float | None) -> None:
    assert peak_flops_of(name, precision, tf32=tf32) == expected


# Runs.


def lengths(rows: Sequence[Example]) -> list[list[int]]:
    return [[sum(len(segment.tokens) for segment in path) for path in row.root.paths()] for row in rows]


@pytest.mark.parametrize("share", [True, False])
def test_counts_of_a_run(folder: str, share: bool) -> None:
    rows = pairs(24)
    batches = [rows[:5], rows[5:12], rows[12:17], rows[17:24], []]
    module = DPOModule(folder, micro_batch_tokens=60, share_prefix=share)
    kept = fit(module, Throughput(peak_flops=1e9), Batches(*map(ExampleBatch, batches)))
    assert [step for step, row in kept.rows if "throughput/mfu" in row] == [1, 3]
    per_weight = 6 * sum(p.numel() for p in module.model.parameters())
    for number, (_, row) in enumerate(kept.rows):
        seconds = 2 * row["time/batch"]
        mine = batches[2 * number : 2 * number + 2]
        flat = [n for batch in mine for row_lengths in lengths(batch) for n in row_lengths]
        repeated = sum(flat)
        # No prompt occurs twice: what is shared is that of a pair.
        tokens = repeated - share * sum(len(row.root.tokens) for batch in mine for row in batch)
        padded = 0
        for batch in mine:
            for micro in plan_micro_batches(batch, budget=60, share_prefix=share):
                found = [n for row_lengths in lengths([batch[m] for m in micro]) for n in row_lengths]
                padded += len(found) * max(found)
        assert row["throughput/tokens_per_second"] * seconds == pytest.approx(tokens, rel=1e-5)
        assert row["throughput/examples_per_second"] * seconds == pytest.approx(12, rel=1e-5)
        assert row["throughput/prefix_saved"] == pytest.approx(1 - tokens / repeated, abs=1e-6)
        assert row["throughput/padding_saved"] == pytest.approx(1 - repeated / padded, abs=1e-6)
        # 2 layers of 4 heads of 8; a token sees the sequence it is in.
        flops = tokens * (per_weight + 12 * 2 * 4 * 8 * sum(n * n for n in flat) / repeated)
        assert row["throughput/mfu"] * seconds * 1e9 == pytest.approx(flops, rel=1e-5)
        assert "throughput/generated_tokens_per_second" not in row
        assert 0.05 < row["memory/peak_gib"] < 64
        assert row["time/generate"] == 0 < row["time/score"]  # of the reference


def test_padded(folder: str) -> None:
    rows = pairs(6)
    kept = fit(DPOModule(folder, layout="padded"), Throughput(), Batches(ExampleBatch(rows)), log_every_n_steps=1)
    [(_, row)] = kept.rows
    assert row["throughput/tokens_per_second"] * row["time/batch"] == pytest.approx(sum(map(sum, lengths(rows))))
    assert row["throughput/prefix_saved"] == row["throughput/padding_saved"] == 0
    assert "throughput/mfu" not in row  # nothing says what a CPU can do


class SlowBatches(Batches):
    """A loader that takes its time and remembers when it was asked."""

    asked: list[float]

    def __iter__(self) -> Iterator[ExampleBatch]:
        self.asked = []
        for batch in self.batches:
            self.asked.append(time.perf_counter())
            time.sleep(0.03)
            yield batch


class Slow(FixedGRPO):
    """Samples for 50 ms, scores samples for 20 ms, steps for 40 ms."""

    def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> Any:
        time.sleep(0.05)
        return super().generate(prompts, seeds)

    def prepare(self, rollouts: Any) -> Any:
        time.sleep(0.02)
        return super().prepare(rollouts)

    def _clip(self, scale: float) -> torch.Tensor:
        time.sleep(0.04)
        return super()._clip(scale)

    def validation_step(self, batch: ExampleBatch, batch_idx: int) -> None:
        time.sleep(0.1)
        super().validation_step(batch, batch_idx)


class Ends(lightning.Callback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.at.append(time.perf_counter())


def test_phases_of_a_run_add_up(folder: str) -> None:
    rows = prompts(6)
    batches, ends = SlowBatches(*[ExampleBatch(rows)] * 4), Ends()
    val = Batches(ExampleBatch(rows))
    module = Slow(folder, **options(num_generations=3, micro_batch_tokens=40))
    kept = fit(module, Throughput(), batches, before=[ends], val=val, val_check_interval=1)
    logged = [row for _, row in kept.rows if "time/batch" in row]
    walls = [end - begin for begin, end in zip(batches.asked, ends.at, strict=True)]
    assert len(logged) == 2
    for row, wall in zip(logged, (sum(walls[:2]) / 2, sum(walls[2:]) / 2), strict=True):
        seconds = {name: row[f"time/{name}"] for name in (*PHASES, "other")}
        assert sum(seconds.values()) == pytest.approx(row["time/batch"], rel=1e-5)
        assert row["time/batch"] == pytest.approx(wall, rel=0.05)
        for name, least in (("data", 0.03), ("generate", 0.05), ("score", 0.02), ("step", 0.04)):
            assert seconds[name] > least
        assert seconds["forward_backward"] > 0.001
    # Unnamed work, metrics and logging, is small compared with it even here.
    assert logged[1]["time/other"] < 0.3 * logged[1]["time/batch"]
    tokens = 2 * sum(len(sample.token_ids) for row in rows for sample in fixed_completions(row.row_id, 3))
    speed = logged[1]["throughput/generated_tokens_per_second"]
    assert speed * 2 * logged[1]["time/generate"] == pytest.approx(tokens, rel=1e-5)


class Sampling(GRPOModule):
    """Remembers what it samples in training and in validation."""

    def rollout(self, prompts: Sequence[Example], stage: str = "train", attempt: int = 0) -> Any:
        found = super().rollout(prompts, stage, attempt)
        self.lengths: dict[str, list[int]] = {**getattr(self, "lengths", {})}
        tokens = sum(len(sample.token_ids) for sample in found.samples)
        self.lengths[stage] = [*self.lengths.get(stage, []), tokens]
        return found


@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_phases_and_counts_of_sampling(folder: str, speculation: str | None) -> None:
    rows = prompts(4)
    given = options(num_generations=3, **{"sampling.speculation": speculation})
    module = Sampling(folder, **given)
    batches, val = Batches(*[ExampleBatch(rows)] * 4), Batches(ExampleBatch(rows))
    kept = fit(module, Throughput(), batches, val=val, val_check_interval=1)
    logged = [row for _, row in kept.rows if "time/batch" in row]
    sampled = module.lengths["train"]
    # Means over two batches; validation samples as much again, and does not count.
    assert [row["generation/new_tokens"] for row in logged] == [sum(sampled[:2]) / 2, sum(sampled[2:]) / 2]
    assert len(module.lengths["val"]) == 4
    distinct = {tuple(row.root.tokens.tolist()) for row in rows}
    for row in logged:
        assert row["generation/prompt_tokens"] == sum(map(len, distinct))
        assert 0 < row["time/prefill"] + row["time/decode"] < row["time/generate"]
        assert "generation/expansions" not in row
        if speculation is None:
            assert "generation/acceptance_rate" not in row
    if speculation:
        assert all(0 <= row.get("generation/acceptance_rate", 0) <= 1 for row in logged)


@pytest.mark.parametrize("every", [1, 3])
def test_an_interval_of_its_own(folder: str, every: int) -> None:
    batches = Batches(*[ExampleBatch(pairs(2))] * 6)
    seen: list[int] = []

    class Seen(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append("time/batch" in trainer.logged_metrics or "time/batch" in trainer.callback_metrics)

    fit(SFTModule(folder), Throughput(every_n_batches=every), batches, after=[Seen()], log_every_n_steps=1)
    assert seen == [n + 1 >= every for n in range(6)]


def test_an_exception_ends_it(folder: str) -> None:
    class Broken(SFTModule):
        def loss(self, rows: Any, normalizers: Any) -> torch.Tensor:
            raise RuntimeError("broken")

    module = Broken(folder)
    run = trainer("32-true", max_epochs=1)
    run.callbacks.append(Throughput())
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(module, Batches(ExampleBatch(pairs(2))))
    assert module.clock is None
    assert not {"start", "stop"} & vars(run.profiler).keys()


def test_two_ranks(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = DPOModule(folder)
    module.configure_model()
    first = Work({"data": 1.0, "generate": 4.0, "score": 0.0, "forward_backward": 2.0, "step": 1.0, "other": 0.0})
    first.batches, first.examples, first.tokens, first.unshared_tokens, first.padded_tokens = 2, 8, 600, 800, 1000
    first.squared_lengths, first.generated_tokens = 8000, 40
    second = Work({"data": 3.0, "generate": 2.0, "score": 0.0, "forward_backward": 2.0, "step": 3.0, "other": 0.0})
    second.batches, second.examples, second.tokens, second.unshared_tokens, second.padded_tokens = 2, 4, 200, 200, 600
    second.squared_lengths, second.generated_tokens = 4000, 20
    monkeypatch.setattr(throughput, "gather_objects", lambda own: [(first, 2**30), (second, 3 * 2**30)])
    run: Any = SimpleNamespace(precision="32-true")
    found = Throughput(peak_flops=1e6)._measure(run, module, first)
    assert found.pop("throughput/mfu") == pytest.approx(800 * flops_per_token(module.model, 12.0) / (10 * 1e6 * 2))
    assert found == pytest.approx(
        {
            "throughput/tokens_per_second": 80.0,
            "throughput/examples_per_second": 1.2,
            "throughput/generated_tokens_per_second": 15.0,
            "throughput/padding_saved": 1 - 1000 / 1600,
            "throughput/prefix_saved": 0.2,
            "memory/peak_gib": 3.0,
            "time/batch": 5.0,
            "time/data": 1.5,
            "time/generate": 2.0,
            "time/score": 0.0,
            "time/forward_backward": 1.0,
            "time/step": 1.5,
            "time/other": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peak_flops": 0.0}, "peak_flops is 0.0; it must be a finite number above 0"),
        ({"peak_flops": float("nan")}, "peak_flops is nan"),
        ({"every_n_batches": 0}, "every_n_batches is 0; it must be at least 1"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Throughput(**given)


def test_a_module_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Throughput needs a PostTrainingModule; it was given a LightningModule"):
        Throughput().on_train_start(None, lightning.LightningModule())  # type: ignore[arg-type]
