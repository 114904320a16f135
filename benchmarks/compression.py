"""Compares compressors of contexts on the embedded recall task, and checks requirements.

    python benchmarks/compression.py                               # seeds 0, 1, 2
    python benchmarks/compression.py --seeds 0 --ratios 4 8        # some of it
    python benchmarks/compression.py --only costs                  # memory and time at 4,096 tokens

Runs configs/pipelines/recall.yaml, which trains a model with the whole context in view and then a compressor of each
ratio for it; stages that are finished are not repeated. Every compressor is measured on the same held-out rows:
accuracy of greedy answers, in all and by the quarter of the context in which the fact lies. Costs are those of an
untrained model of the same sizes, each in a process of its own. The exit status says whether all requirements hold.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PIPELINE = "configs/pipelines/recall.yaml"
NANO = "configs/models/nano"
# Requirements for every seed, and for the costs.
LEAST_FULL = 0.90
LEAST_SHARE = 0.90  # of the full context's accuracy, for the learned compressor at ratio 4
MOST_CACHE = 0.20  # of the full context's, at ratio 8
TOKENS, NEW_TOKENS = 4096, 64
LEARNED, FULL = "learned", "full context"
# Options by name; all take a ratio. Those that see the question are listed last and compared with nothing.
TRAINING_FREE: dict[str, dict[str, Any]] = {
    "truncation": {"class_path": "Truncation"},
    "window with sinks": {"class_path": "SinkWindow", "init_args": {"sinks": 4}},
    "eviction": {"class_path": "AttentionEviction"},
    "eviction, last 32": {"class_path": "AttentionEviction", "init_args": {"window": 32}},
    "summary by a rule": {"class_path": "TextSummary", "init_args": {"prompt": "{context}"}},
    "eviction by question": {"class_path": "AttentionEviction", "init_args": {"observed": "query"}},
}
SEES_QUESTION = ("eviction by question",)


class FactWriter:
    """An engine that summarises a context by a rule: its facts, without noise; what no model writes better.

    Contexts begin with a fact then, and not with noise: otherwise they are like those of the task.
    """

    def generate(self, prompts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[Any]]:
        """Writes the facts of each prompt, in their order."""
        from rlhf_lightning.inference import Completion

        facts = ["".join(re.findall("[a-z]+[A-Z]+", prompt)) for prompt in prompts]
        return [[Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop")] for text in facts]


def build(name: str, ratio: int, model: Any, tokenizer: Any, folder: Path | None = None) -> Any:
    """Builds a compressor; the learned one from its folder, or untrained."""
    from rlhf_lightning.inference import TextSummary
    from rlhf_lightning.inference.specs import build_compressor

    if name == LEARNED and folder is not None:
        return build_compressor(str(folder), model, tokenizer)
    if name == LEARNED:
        from rlhf_lightning.models import CompressorOptions, ContextCompressor

        return ContextCompressor(model, CompressorOptions(ratio=ratio, segment_length=128))
    if name == FULL:
        return build_compressor({"class_path": "Truncation", "init_args": {"ratio": 1}}, model, tokenizer)
    spec = TRAINING_FREE[name]
    options = {"ratio": ratio, **spec.get("init_args", {})}
    if spec["class_path"] == "TextSummary":
        return TextSummary(model, tokenizer, engine=FactWriter(), **options)  # type: ignore[arg-type]
    return build_compressor({"class_path": spec["class_path"], "init_args": options}, model, tokenizer)


def accuracies(engine: Any, compressor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of greedy answers after compressed contexts, in all and by the quarter in which the fact lies."""
    from rlhf_lightning.data.text_tokens import encode, prompt_tokens
    from rlhf_lightning.inference import SamplingParams
    from rlhf_lightning.rewards import exact_answer

    contexts = [prompt_tokens(engine.tokenizer, row["context"]) for row in rows]
    prompts = [encode(engine.tokenizer, row["prompt"], continues=True) for row in rows]
    compressed = compressor.compress(contexts, prompts)
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0)
    samples = [group[0].text for group in engine.generate(prompts, 1, greedy, contexts=compressed)]
    rewards = exact_answer([row["prompt"] for row in rows], samples, answer=[row["answer"] for row in rows])
    found: dict[str, float] = {
        "accuracy": statistics.mean(map(float, rewards)),  # type: ignore[arg-type]
        "entries": statistics.mean(context.size for context in compressed),
    }
    for quarter in range(4):
        own = [
            float(reward or 0.0)
            for row, reward in zip(rows, rewards, strict=True)
            if 4 * row["offset"] // len(row["context"]) == quarter
        ]
        found[f"quarter {quarter + 1}"] = statistics.mean(own)
    return found


def quality(run_dir: Path, seed: int, ratios: Sequence[int], num_rows: int) -> dict[str, dict[str, float]]:
    """Trains, and measures all compressors on the same rows: figures by name and ratio."""
    from rlhf_lightning.data.tasks import open_task
    from rlhf_lightning.inference import LocalEngine

    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", "--config", PIPELINE, "--run_dir", str(run_dir)]
    subprocess.run([*command, f"seed={seed}"], check=True)
    engine = LocalEngine.from_pretrained(run_dir / "full" / "model")
    rows = open_task(f"recall:prompts?split=test&rows={num_rows}")
    found = {FULL: accuracies(engine, build(FULL, 1, engine.model, engine.tokenizer), rows)}
    for ratio in ratios:
        for name in (LEARNED, *TRAINING_FREE):
            folder = run_dir / f"compressor_{ratio}" / "model"
            compressor = build(name, ratio, engine.model, engine.tokenizer, folder)
            found[f"{name} {ratio}x"] = accuracies(engine, compressor, rows)
            print(f"seed {seed}, {name} {ratio}x: {found[f'{name} {ratio}x']['accuracy']:.1%}", file=sys.stderr)
    return found


def resident(name: str) -> int:
    """Bytes of this process in memory, now (``VmRSS``) or at most (``VmHWM``)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def costs_of(name: str, ratio: int) -> dict[str, float]:
    """Memory and seconds of one context of ``TOKENS`` tokens, in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_lightning.inference import LocalEngine, SamplingParams
    from rlhf_lightning.models import load_tokenizer
    from rlhf_lightning.models.loading import locate
    from rlhf_lightning.sequences import register_attention

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(locate(NANO, what="model"))
    # Positions for the context and what follows; no token ends an answer.
    config.max_position_embeddings, config.eos_token_id = 2 * TOKENS, None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention()).eval()
    tokenizer = load_tokenizer(NANO)
    compressor = build(name, ratio, model, tokenizer)
    context = torch.randint(4, config.vocab_size, (TOKENS,)).tolist()
    compressor.compress([context[:64]], [[5]])

    # Linux: the peak begins again at what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    [compressed] = compressor.compress([context], [[5]])
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    engine = LocalEngine(model, None)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    engine.generate([[5]], 1, SamplingParams(max_new_tokens=2, temperature=0.0), contexts=[compressed])
    earlier = engine.statistics()
    engine.generate([[5]], 1, sampling, contexts=[compressed])
    done = engine.statistics()
    return {
        "cache_mb": compressed.nbytes / 1e6,
        "prefill_mb": peak / 1e6,
        "prefill_seconds": seconds,
        "token_ms": 1000 * (done["decode_seconds"] - earlier["decode_seconds"]) / (NEW_TOKENS - 1),
    }


def costs(ratios: Sequence[int]) -> dict[str, dict[str, float]]:
    """Costs of all compressors by name and ratio, each measured in a process of its own."""
    pairs = [(FULL, 1)] + [(name, ratio) for ratio in ratios for name in (LEARNED, *TRAINING_FREE)]
    found = {}
    for name, ratio in pairs:
        if name == "summary by a rule":  # the context is what its engine reads
            continue
        command = [sys.executable, __file__, "--child", name, str(ratio)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name if name == FULL else f"{name} {ratio}x"] = json.loads(printed.splitlines()[-1])
    return found


def requirements(seeds: Sequence[dict[str, dict[str, float]]], spent: dict[str, dict[str, float]]) -> dict[str, bool]:
    """The requirements, and whether they are met, by every seed."""
    checks: dict[str, bool] = {}
    if seeds:
        checks[f"full context: at least {LEAST_FULL:.0%}"] = all(s[FULL]["accuracy"] >= LEAST_FULL for s in seeds)
    if seeds and f"{LEARNED} 4x" in seeds[0]:
        share = f"learned at 4x: at least {LEAST_SHARE:.0%} of the full context's accuracy"
        checks[share] = all(seed[f"{LEARNED} 4x"]["accuracy"] >= LEAST_SHARE * seed[FULL]["accuracy"] for seed in seeds)
    rivals = [name for name in TRAINING_FREE if name not in SEES_QUESTION]
    for ratio in (4, 8):
        if seeds and f"{LEARNED} {ratio}x" in seeds[0]:
            checks[f"learned at {ratio}x: better than all that neither learn nor see the question"] = all(
                seed[f"{LEARNED} {ratio}x"]["accuracy"] > max(seed[f"{name} {ratio}x"]["accuracy"] for name in rivals)
                for seed in seeds
            )
    for name in (LEARNED, *TRAINING_FREE):
        if (cost := spent.get(f"{name} 8x")) is not None:
            held = cost["cache_mb"] <= MOST_CACHE * spent[FULL]["cache_mb"]
            checks[f"{name} at 8x: cache at most {MOST_CACHE} of the full context's"] = held
    if f"{LEARNED} 8x" in spent:
        held = spent[f"{LEARNED} 8x"]["prefill_mb"] <= MOST_CACHE * spent[FULL]["prefill_mb"]
        checks[f"learned at 8x: prefill memory at most {MOST_CACHE} of the full context's"] = held
    return checks


def show(title: str, figures: dict[str, dict[str, float]], write: Callable[[str, float], str]) -> None:
    """Prints figures as a table."""
    table = Table(title=title, title_justify="left")
    columns = list(next(iter(figures.values())))
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in figures.items():
        table.add_row(name, *(write(column, row[column]) for column in columns))
    Console(width=140).print(table)


def mean_of(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Averages figures over seeds."""
    return {
        name: {column: statistics.mean(seed[name][column] for seed in seeds) for column in row}
        for name, row in seeds[0].items()
    }


def main() -> int:
    """Runs all seeds, prints the tables, and reports which requirements hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/compression"))
    parser.add_argument("--only", choices=["quality", "costs"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(costs_of(args.child[0], int(args.child[1]))))
        return 0

    spent = {} if args.only == "quality" else costs(args.ratios)
    seeds = (
        []
        if args.only == "costs"
        else [quality(args.run_dir / f"seed-{seed}", seed, args.ratios, args.rows) for seed in args.seeds]
    )
    args.run_dir.mkdir(parents=True, exist_ok=True)
    (args.run_dir / "compression.json").write_text(json.dumps({"quality": seeds, "costs": spent}, indent=2))
    if seeds:
        title = f"accuracy on {args.rows} held-out rows, mean of {len(seeds)} seeds; quarters: where the fact lies"
        show(title, mean_of(seeds), lambda column, value: f"{value:.1f}" if column == "entries" else f"{value:.1%}")
    if spent:
        show(f"one context of {TOKENS} tokens, one core", spent, lambda column, value: f"{value:.2f}")
    checks = requirements(seeds, spent)
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
