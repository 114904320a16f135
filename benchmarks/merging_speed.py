"""Time and peak memory of TIES on disk, relative to reading the inputs and writing the output once, and to mergekit.

    python benchmarks/merging.py --speed                          # three models of 1.5 GB and their base
    python benchmarks/merging.py --speed --variants               # mergekit with options as well
    python benchmarks/merging.py --speed --mergekit PYTHON        # of another Python, with the extra `merge-parity`

The floor reads the four inputs and writes as many bytes as the output has, flushed to disk, in parts of 4 MiB. Inputs
are in the page cache before each run, the floor's and the merges' alike, which is the harder case: reading costs least
then. Every run is a process of its own; sides alternate, and medians are printed. mergekit runs as it comes, or with
each option that makes it faster or smaller on a CPU: shards that are written by threads of their own, and small shards.
Memory is the peak of all resident pages, and of private ones alone, without those of mapped files. The exit status says
whether the requirements hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("base", "a", "b", "c")
DENSITY = 0.2
PART = 1 << 22
# The requirements: GB above torch, times the floor, and times and shares of mergekit's.
MOST_MEMORY, MOST_TIME, LEAST_SPEED, MOST_SHARE = 0.5, 2.5, 2.0, 0.5


def make_models(folder: Path, size: float) -> None:
    """Writes a base and three models of ``size`` GB in fp32, with the tensors of a Llama of 1,024 features."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    per_layer, embeddings = 4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024, 2 * 32_000 * 1024
    layers = max(1, round((size * 1e9 / 4 - embeddings) / per_layer))
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    for number, name in enumerate(NAMES):
        start, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
        state = {key: 0.02 * torch.randn(shape, generator=start) for key, shape in shapes.items()}
        if name != "base":
            for weight in state.values():
                weight.add_(torch.randn(weight.shape, generator=noise), alpha=1e-3)
        config.save_pretrained(folder / name)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})


def read_all(folder: Path) -> int:
    """Reads the weights of all models; returns their bytes."""
    buffer, total = bytearray(PART), 0
    for name in NAMES:
        with (folder / name / "model.safetensors").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def run_floor(folder: Path) -> float:
    """Reads the inputs and writes as many bytes as the output has, flushed to disk."""
    size = (folder / "base" / "model.safetensors").stat().st_size
    part, place = os.urandom(PART), folder / "floor"
    started = time.perf_counter()
    read_all(folder)
    with place.open("wb", buffering=0) as file:
        for _ in range(size // PART):
            file.write(part)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    place.unlink()
    return seconds


def run_ours(folder: Path, preset: str) -> float:
    """Merges with this package."""
    from rlhf_lightning.merging import merge

    started = time.perf_counter()
    merge(
        "ties",
        base=folder / "base",
        models=[folder / name for name in NAMES[1:]],
        output=folder / "ours",
        density=DENSITY,
        preset=preset,
    )
    return time.perf_counter() - started


def run_mergekit(folder: Path, **more: Any) -> float:
    """Merges with mergekit.

    Args:
        folder: of the models.
        more: options that differ from its defaults.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parameters = {"weight": 1.0, "density": DENSITY}
    config = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": parameters} for name in NAMES[1:]],
        "dtype": "float32",
    }
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, **more)
    started = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(config), str(folder / "theirs"), options=options)
    for path in (folder / "theirs").glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def run_torch(folder: Path) -> float:
    """Imports torch and nothing else: the memory that others are compared with."""
    import torch  # noqa: F401

    return 0.0


class PrivateMemory:
    """Follows the memory of this process that belongs to no file, in a thread."""

    def __init__(self) -> None:
        self.peak_gb = 0.0
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.peak_gb = max(self.peak_gb, status_gb("RssAnon"))
            time.sleep(0.02)


def status_gb(name: str) -> float:
    """Returns a number of this process's status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def report(name: str, folder: Path) -> None:
    """Runs one side in this process; prints its seconds and its memory."""
    private = PrivateMemory()
    seconds = RUNS[name](folder)
    # Not getrusage's maximum, which a process inherits from the one that started it.
    peak, private_gb = status_gb("VmHWM"), max(private.peak_gb, status_gb("RssAnon"))
    found = {"seconds": seconds, "peak_gb": peak, "private_gb": private_gb}
    print("RESULT " + json.dumps(found))


RUNS = {
    "torch": run_torch,
    "floor": run_floor,
    "ours, paper": lambda folder: run_ours(folder, "paper"),
    "ours, mergekit": lambda folder: run_ours(folder, "mergekit"),
    "mergekit": run_mergekit,
    "mergekit, async": lambda folder: run_mergekit(folder, async_write=True, write_threads=2),
    "mergekit, small": lambda folder: run_mergekit(folder, out_shard_size=50_000_000),
}


def measure(name: str, folder: Path, python: str, threads: int) -> dict[str, float]:
    """Runs one side in a process of its own."""
    read_all(folder)
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--run", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for output in ("ours", "theirs"):
        shutil.rmtree(folder / output, ignore_errors=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")


def compare(names: Sequence[str], size: float, repeats: int, threads: int, python: str, folder: Path | None) -> bool:
    """Measures all sides in turn, prints the medians, and tells whether the requirements hold."""
    with tempfile.TemporaryDirectory(prefix="merging") as made:
        place = folder or Path(made)
        if not (place / NAMES[-1] / "model.safetensors").is_file():
            make_models(place, size)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                side = python if name.startswith("mergekit") else sys.executable
                found[name].append(measure(name, place, side, threads))
                print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)

    middle = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in found.items()}
    floor, torch = middle["floor"]["seconds"], middle["torch"]
    print(f"{'':16s} {'seconds':>8s} {'x floor':>8s} {'GB above torch':>15s} {'private':>8s}")
    for name in names[1:]:
        seconds, (peak, private) = (
            middle[name]["seconds"],
            (middle[name][k] - torch[k] for k in ("peak_gb", "private_gb")),
        )
        print(f"{name:16s} {seconds:8.1f} {seconds / floor:8.2f} {peak:15.2f} {private:8.2f}")
    checks = requirements(middle)
    for text, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    return all(checks.values())


def requirements(middle: dict[str, dict[str, float]]) -> dict[str, bool]:
    """The requirements with the medians, and whether they are met."""
    ours, floor, torch = middle["ours, paper"], middle["floor"], middle["torch"]
    memory, time_ratio = ours["peak_gb"] - torch["peak_gb"], ours["seconds"] / floor["seconds"]
    found = {
        f"peak memory is {memory:.2f} GB above the interpreter with torch, at most {MOST_MEMORY} GB": (
            memory <= MOST_MEMORY
        ),
        f"a merge takes {time_ratio:.2f} times as long as the floor, at most {MOST_TIME}": time_ratio <= MOST_TIME,
    }
    if "mergekit" in middle:
        # The same convention; at its best in each of the two.
        same, theirs = middle["ours, mergekit"], [middle[name] for name in middle if name.startswith("mergekit")]
        faster = min(side["seconds"] for side in theirs) / same["seconds"]
        smaller = same["peak_gb"] / min(side["peak_gb"] for side in theirs)
        found |= {
            f"it is {faster:.2f} times as fast as mergekit, at least {LEAST_SPEED}": faster >= LEAST_SPEED,
            f"it takes {smaller:.2f} of mergekit's memory, at most {MOST_SHARE}": smaller <= MOST_SHARE,
        }
    return found


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--speed", action="store_true", help="this benchmark")
    parser.add_argument("--size", type=float, default=1.5, help="of a model, in GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mergekit", default=sys.executable, help="a Python that has mergekit; this one by default")
    parser.add_argument("--no_mergekit", action="store_true", help="leave mergekit out")
    parser.add_argument("--variants", action="store_true", help="mergekit with options that help it, too")
    parser.add_argument("--folder", type=Path, help="of the models, which are made there if they are missing")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        report(given.run, given.folder)
        return 0
    names = [name for name in RUNS if not name.startswith("mergekit") or not given.no_mergekit]
    if not given.variants:
        names = [name for name in names if not name.startswith("mergekit,")]
    return 0 if compare(names, given.size, given.repeats, given.threads, given.mergekit, given.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
