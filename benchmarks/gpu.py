"""Checks on one GPU, in at most eight minutes: equality with the CPU, and speed and memory compared with TRL.

    python benchmarks/gpu.py                   # needs CUDA; TRL and Liger are measured where they are installed
    python benchmarks/gpu.py --rehearse        # the same code on a CPU, with a tiny model: shows that it runs, no speed
    python benchmarks/gpu.py --parts equality speed --minutes 5

Parts, each within its share of the time; parts that do not fit are reported:

- ``equality``: loss and gradient of the first step of all eight methods, in fp32 and bf16, with the attention ``auto``,
  ``blocks`` and ``flex``, as relative distances from the same step in fp32 on the CPU.
- ``tests``: ``tests/gpu``.
- ``attention``: the kernels ``blocks``, ``cascade`` and ``flex``, forward and backward of one layer, on five forests:
  the first call, whose shapes are new, and the best later one, peak memory, and the distance from blocks in fp32.
- ``head``: the fused head, also with the entropy, and cross-entropy of full logits: the same, at three sizes.
- ``decoding``: tokens per second and time of a step by the engine's cache, and with ``top_p``.
- ``copies``: copies either way, waits and launches of a micro-batch of SFT and DPO, by torch's profiler.
- ``speed``: steps of SFT and DPO and an iteration of GRPO on a random model with 1.5 billion weights in bf16, and
  tokens sampled from it: ours, TRL's, TRL's with Liger. Time, peak allocated memory, and *utilisation*: the products
  that a step needs (6 per weight and token, 8 with a reference; a prompt's tokens count once) over the measured rate
  of bf16 products of the card in the same time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_sections
import torch
from gpu_sections import ON_CARD, REHEARSED, Left, Row
from sides import OURS, Figures, run_child
from training import SHAPES, Shape, write_model
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
EIGHT = ("sft", "reward", "process", "dpo", "simpo", "kto", "grpo", "ppo")
SHARES = {  # of the time
    "equality": 0.19,
    "tests": 0.15,
    "attention": 0.1,
    "head": 0.06,
    "decoding": 0.12,
    "copies": 0.08,
    "speed": 0.3,
}


class Scale(NamedTuple):
    """Sizes of the measurements."""

    device: str
    shape: str
    batch: int
    steps: int
    prompts: int
    samples: int
    limit: int
    precision: str


CARD = Scale("cuda", "1.5b", batch=16, steps=6, prompts=8, samples=8, limit=128, precision="bf16")
REHEARSAL = Scale("cpu", "tiny", batch=2, steps=3, prompts=2, samples=2, limit=4, precision="fp32")


def num_weights(shape: Shape) -> int:
    """Number of weights that a token is multiplied with, in the blocks and the (tied) head."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + shape.vocab * shape.hidden


def product_rate(device: str, size: int) -> float:
    """FLOP/s of a product of two square matrices in bf16, best of ten."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def first_step(name: str, folder: str, device: str, precision: str, attention: str) -> tuple[float, dict[str, Any]]:
    """The loss and the gradient of a method's first step in ``fit`` on a device."""
    import lightning

    from rlhf_lightning.sequences import ExampleBatch
    from tests.invariance.harness import Batches
    from tests.invariance.methods import METHODS

    torch.manual_seed(0)
    method = METHODS[name]
    options = {"max_grad_norm": None, **method.options, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    module = method.module(folder, attention=attention, **options)

    # Gradients are copied before the optimizer step, when they are complete.
    gradients: dict[str, Any] = {}

    class Taken(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_pre_hook(lambda *_: self.take(pl_module))

        def take(self, pl_module: Any) -> None:
            for key, weight in pl_module.named_parameters():
                if weight.grad is not None:
                    gradients.setdefault(key, weight.grad.detach().double().cpu())

    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Taken()],
    )
    trainer.fit(module, Batches(ExampleBatch(method.rows(6))))  # type: ignore[arg-type]
    return float(trainer.callback_metrics["train/loss"]), gradients


def relative_distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The norm of the difference of two gradients, relative to the expected one."""
    size = sum(float(weight.square().sum()) for weight in expected.values()) ** 0.5
    return sum(float((found[key] - weight).square().sum()) for key, weight in expected.items()) ** 0.5 / size


def equality(scale: Scale, folder: Path, left: Left) -> list[Row]:
    """Compares every method's first step with that in fp32 on the CPU."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    from tests.helpers import save_tiny_model

    model = str(
        save_tiny_model(folder / "equal", "llama", hidden_size=64, intermediate_size=96, initializer_range=0.05)
    )
    # FlexAttention has no backward pass on CPUs: a rehearsal skips it.
    attentions = ("auto", "blocks", "flex") if scale.device == "cuda" else ("auto",)
    rows = []
    for name in EIGHT:
        if left() < 0:
            rows.append(Row(f"equality, {name}", OURS, "no time left"))
            continue
        loss, exact = first_step(name, model, "cpu", "32-true", "blocks")
        for attention in attentions:
            found = []
            for precision in ("32-true", "bf16-mixed"):
                other, gradients = first_step(name, model, scale.device, precision, attention)
                far = relative_distance(gradients, exact)
                found.append(f"{precision}: loss {abs(other - loss):.1e}, gradient {far:.1e} apart")
            rows.append(Row(f"equality, {name}", attention, "; ".join(found)))
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def tests(scale: Scale, folder: Path, left: Left) -> list[Row]:
    """Runs ``tests/gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if scale.device == "cpu":
        command.append("--collect-only")
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(1, left()), check=False)
    except subprocess.TimeoutExpired:
        return [Row("tests/gpu", OURS, "did not end in its time")]
    if scale.device == "cuda":
        print(done.stdout[-6000:], flush=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    return [Row("tests/gpu", OURS, lines[-1])]


def large_model(scale: Scale, folder: Path) -> Path:
    """The folder of the model that is measured, written when it is first asked for."""
    if not (folder / "large").is_dir():
        write_model(folder / "large", SHAPES[scale.shape], scale.device)
    return folder / "large"


def section(name: str, scale: Scale, folder: Path, left: Left) -> list[Row]:
    """Runs a section of ``gpu_sections``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    pieces = ON_CARD if scale.device == "cuda" else REHEARSED
    needed = [large_model(scale, folder)] if name in ("decoding", "copies") else []
    rows = list(getattr(gpu_sections, name)(scale.device, pieces, *needed, left))
    if scale.device == "cuda":
        torch.cuda.empty_cache()  # for the processes of other parts
    return rows


def sides_of(what: str, scale: Scale) -> dict[str, list[str]]:
    """The sides to measure, with options of the script: TRL on a GPU if installed, also fused if Liger is installed."""
    found: dict[str, list[str]] = {OURS: []}
    if scale.device == "cuda" and importlib.util.find_spec("trl"):
        found |= {"trl": [], "trl-4": []} if what != "grpo" else {"trl": []}
        if importlib.util.find_spec("liger_kernel") and what != "grpo":
            found["trl, Liger"] = ["--liger"]
    return found


def speed(scale: Scale, folder: Path, left: Left) -> list[Row]:
    """Measures training and sampling; each run is a separate process."""
    shape = SHAPES[scale.shape]
    rate = product_rate(scale.device, 8192 if scale.device == "cuda" else 256)
    rows = [Row("products in bf16", scale.device, f"{rate / 1e12:.2f} TFLOP/s")]
    shared = [f"--folder={large_model(scale, folder)}", f"--steps={scale.steps}", f"--device={scale.device}"]
    shared += [f"--shape={scale.shape}", f"--precision={scale.precision}"]
    train = [*shared, f"--batch={scale.batch}"]
    online = [*shared, "--workloads=equal", f"--prompts={scale.prompts}", f"--samples={scale.samples}"]
    online += [f"--limit={scale.limit}"]

    def measured(what: str, side: str, script: str, arguments: list[str], products: float) -> None:
        if left() < 10:
            rows.append(Row(what, side, "no time left"))
            return
        try:
            figures = run_child(str(HERE / script), arguments, threads=2, timeout=left())
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            rows.append(Row(what, side, f"failed: {str(error).strip().splitlines()[-1][:200]}"))
        else:
            rows.append(Row(what, side, described(figures, products * num_weights(shape) / rate)))
        print(*rows[-1], sep=" | ", flush=True)

    # Ours first: if time runs out, only comparisons are lost.
    measured("sampling", "engine / transformers.generate", "gpu.py", ["--child", json.dumps([*scale, str(folder)])], 0)
    for what, products in (("sft", 6.0), ("dpo", 8.0)):
        for side, options in sides_of(what, scale).items():
            name = side.partition(",")[0]
            measured(what, side, "training.py", [what, "--side", name, *options, *train], products)
    for side in sides_of("grpo", scale):
        measured("grpo", side, "online.py", ["--side", side, *online], 0)
    return rows


def described(figures: Figures, seconds_per_token: float) -> str:
    """Formats the figures of a run for a table."""
    if "ratio" in figures:
        return f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['ratio']:.2f}x transformers.generate"
    found = f"{figures['seconds']:.3f} s, {figures['tokens_per_s']:,.0f} tokens/s, {figures['peak_mib']:,.0f} MiB"
    if seconds_per_token:
        found += f", utilisation {figures['tokens_per_s'] * seconds_per_token:.1%}"
    return found


def sampled(scale: Scale, folder: str) -> None:
    """Samples with the engine and with transformers, and prints a line of JSON."""
    import generation
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "large", dtype=dtype).to(scale.device).eval()
    work = generation.Workload("equal", scale.prompts, scale.samples, scale.limit, None)
    _, ours, ratio = generation.compare(model, work, 1, time.perf_counter)
    print("RESULT " + json.dumps({"tokens_per_s": ours, "ratio": ratio}))


PARTS: dict[str, Callable[[Scale, Path, Left], list[Row]]] = {
    "equality": equality,
    "tests": tests,
    **{name: partial(section, name) for name in ("attention", "head", "decoding", "copies")},
    "speed": speed,
}


def main() -> int:
    """Runs the parts and prints one table; returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        *scale, folder = json.loads(arguments.child)
        sampled(Scale(*scale), folder)
        return 0
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device was found: --rehearse runs the same code on a CPU")
    scale = REHEARSAL if arguments.rehearse else CARD
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU (a rehearsal: its speeds mean nothing)"

    sys.path.insert(0, str(ROOT))  # for ``tests``
    start, rows, failed = time.monotonic(), [Row("device", name, f"torch {torch.__version__}")], False
    total = sum(SHARES[part] for part in arguments.parts)
    end = start
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            # A part that ends early leaves its time to the next.
            end += 60 * arguments.minutes * SHARES[part] / total
            try:
                rows += PARTS[part](scale, Path(folder), partial(remaining, end))
            except Exception as error:  # a failing part must not keep the others from running
                traceback.print_exc()
                rows.append(Row(part, OURS, f"failed: {error}"))
                failed = True

    print(f"\n{time.monotonic() - start:.0f} s")
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        print(f"{row.what:<{widths[0]}} | {row.side:<{widths[1]}} | {row.found}")
    return int(failed or any("failed" in row.found for row in rows))


def remaining(end: float) -> float:
    """Seconds until a deadline."""
    return end - time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
