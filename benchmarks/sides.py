"""Compares our side with a peer, at its default and its best setting; every run is a separate process."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Figures = dict[str, float]
FIGURES = ("seconds", "tokens_per_s", "peak_mib")  # printed by every run, perhaps with others
OURS = "ours"
# glibc gives the buffers of a step back and pages them in again in the next one, which can take most of a step where
# logits are large; both sides are told to keep them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12)}


def run_child(script: str, arguments: Sequence[str], threads: int, timeout: float | None = None) -> Figures:
    """Runs a script as a child and reads the ``RESULT {...}`` line that it prints.

    Raises:
        RuntimeError: with the end of its error output, if it printed none.
        subprocess.TimeoutExpired: it took more than ``timeout`` seconds.
    """
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root} | KEEP_MEMORY
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=timeout)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def wait_for(device: str) -> None:
    """Waits until all work launched on a device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_mib(device: str) -> float:
    """Peak memory of this process: on the device, or on a CPU the largest resident set."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(measure: Callable[[str, int], Figures], settings: Sequence[str], pairs: int, title: str) -> None:
    """Finds the peer's fastest setting, then alternates it and its first setting with ours, and prints ratios.

    Args:
        measure: runs a side (``ours`` or a setting), given the number of the repetition.
        settings: the peer's, the one that it comes with first. Each is run once to find the fastest, in tokens
            per second; one that the peer refuses is skipped, with its reason.
        pairs: how often ours and the two settings are then run, in turn; ratios are medians over these.
        title: the printed table's first line.
    """

    def measured(side: str, number: int) -> Figures:
        figures = measure(side, number)
        print(f"  {side:12s} {figures}", flush=True)
        return figures

    # One run of each setting is enough to find the fastest, since they differ by tens of per cent.
    searched: dict[str, Figures] = {}
    for setting in settings:
        try:
            searched[setting] = measured(setting, 0)
        except RuntimeError as error:
            print(f"  {setting:12s} refused: {str(error).strip().splitlines()[-1]}", flush=True)
    best = max(searched, key=lambda side: searched[side]["tokens_per_s"], default="")
    smallest = min(searched, key=lambda side: searched[side]["peak_mib"], default="")

    # The search does not count: the machine may have been in another state.
    sides = [OURS, *dict.fromkeys(side for side in (*settings[:1], best) if side in searched)]
    results: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(pairs):
        for side in sides:
            results[side].append(measured(side, number))

    print(f"\n{title}; medians of {pairs}")
    for side in sides:
        median = {key: statistics.median(r[key] for r in results[side]) for key in FIGURES}
        line = f"{side:12s} {median['seconds']:7.2f} s {median['tokens_per_s']:7.0f} tokens/s"
        line += f" {median['peak_mib']:6.0f} MiB"
        if side != OURS:
            both = list(zip(results[OURS], results[side], strict=True))
            speed = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in both)
            memory = statistics.median(a["peak_mib"] / b["peak_mib"] for a, b in both)
            place = " and ".join(["as it comes"] * (side == settings[0]) + ["at its best"] * (side == best))
            line += f"   {place}: ours {speed:.2f}x as fast, {memory:.2f}x the memory"
        print(line, flush=True)
    if smallest:
        print(f"the peer's smallest setting, {smallest}, one run: {searched[smallest]}", flush=True)
