"""Counts what compressed contexts cost: entries of the cache, memory of the prefill, time.

    python benchmarks/compression.py                    # a context of 4,096 tokens
    python benchmarks/compression.py --tokens 1024      # a shorter one

The model is small and untrained, and its context random: costs do not depend on the weights. The whole context is
computed in one pass; learned compressors read it in segments and keep their summaries; the others compute the whole
context and keep a part of it. ``cache`` is what keys and values take after it, ``prefill`` the most memory that is
allocated at once on the way, beyond the weights, as torch's profiler records every allocation. Times are CPU time of
one core: the prefill, and each token of an answer. Accuracy is no part of this. The exit status says whether the
requirements hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_lightning.inference import AttentionEviction, LocalEngine, SamplingParams, SinkWindow, Truncation
from rlhf_lightning.models import CompressorOptions, ContextCompressor
from rlhf_lightning.sequences import register_attention

MOST = 0.20  # of the whole context's, for the learned compressor at ratio 8
RATIOS, SEGMENT, NEW_TOKENS = (4, 8), 128, 64
FULL, LEARNED = "whole context", "learned"
OTHERS: dict[str, Any] = {
    "truncation": Truncation,
    "window with sinks": SinkWindow,
    "attention eviction": AttentionEviction,
}
Row = dict[str, float]


def make_model(positions: int) -> Any:
    """Four layers of width 128, with random weights; no token ends an answer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=register_attention()).eval()


def compressors(model: Any) -> dict[str, Any]:
    """All compressors by name and ratio; functions that make them."""
    found: dict[str, Any] = {FULL: partial(Truncation, model, ratio=1)}
    for ratio in RATIOS:
        options = CompressorOptions(ratio=ratio, segment_length=SEGMENT, encoder_rank=16)
        found[f"{LEARNED}, {ratio}x"] = partial(ContextCompressor, model, options)
        found |= {f"{name}, {ratio}x": partial(make, model, ratio=ratio) for name, make in OTHERS.items()}
    # The summaries of four segments are compressed by four again.
    twice = CompressorOptions(ratio=4, segment_length=SEGMENT, encoder_rank=16, condense_every=4)
    found[f"{LEARNED}, 4x and 4x"] = partial(ContextCompressor, model, twice)
    return found


def most_allocated(events: Sequence[dict[str, Any]]) -> int:
    """The most bytes at once, from the allocations of a trace."""
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        # Memory allocated before the trace may be freed in it.
        held = max(0, held + int(event["args"]["Bytes"]))
        most = max(most, held)
    return most


def costs(make: Any, model: Any, context: Sequence[int]) -> Row:
    """Megabytes and CPU time of one compressor and context."""
    compressor = make()
    compressor.compress([context[:SEGMENT]])
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        [compressed] = compressor.compress([context])
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    start = time.process_time()
    compressor.compress([context])
    return {
        "cache": compressed.nbytes / 1e6,
        "prefill": most_allocated(events) / 1e6,
        "seconds": time.process_time() - start,
        "token": 1000 * min(_seconds_per_token(model, compressed) for _ in range(3)),
    }


def _seconds_per_token(model: Any, compressed: Any) -> float:
    """The difference between a long and a short answer, per token."""
    engine, spent = LocalEngine(model, None), []
    for count in (1, 1 + NEW_TOKENS):
        start = time.process_time()
        engine.generate([[5]], 1, SamplingParams(max_new_tokens=count, temperature=0.0), contexts=[compressed])
        spent.append(time.process_time() - start)
    return (spent[1] - spent[0]) / NEW_TOKENS


def table(spent: dict[str, Row]) -> str:
    """The figures in Markdown."""
    lines = ["| compressor | cache, MB | prefill, MB | prefill, s | ms per token |", "|---" * 5 + "|"]
    for name, row in spent.items():
        shown = f"{row['cache']:.2f} | {row['prefill']:.2f} | {row['seconds']:.2f} | {row['token']:.2f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def requirements(spent: dict[str, Row]) -> dict[str, bool]:
    """The requirements, and whether they are met."""
    shares = {what: spent[f"{LEARNED}, 8x"][what] / spent[FULL][what] for what in ("cache", "prefill")}
    return {
        f"{what} of the learned compressor at 8x: {share:.3f} of the whole context's, at most {MOST}": share <= MOST
        for what, share in shares.items()
    }


def main() -> int:
    """Measures all compressors, and prints the table and which requirements hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the context")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(2 * args.tokens)
    context = torch.randint(3, 100, (args.tokens,)).tolist()
    spent = {name: costs(make, model, context) for name, make in compressors(model).items()}
    print(table(spent))
    checks = requirements(spent)
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
