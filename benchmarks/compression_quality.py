"""Accuracy after compressed contexts on the embedded task of recall: learned compressors against others.

    python benchmarks/compression_quality.py                            # seeds 0, 1, 2: the tables
    python benchmarks/compression_quality.py --results quality.jsonl    # continues where it was stopped
    python benchmarks/compression_quality.py --results quality.jsonl --figure benchmarks/compression_quality.svg

A small decoder learns the task from scratch with the whole context in view: first many facts in little noise, then the
task that is measured. One that has not learned it is trained again from other weights. Then a compressor is trained for
each ratio, together with a copy of the decoder. No context is seen twice. All compressors are asked for every fact of
the same contexts of the test split; unlearned ones keep a part of the context for the decoder as it is. One
of them reads the question before it chooses, and has to choose again for the next. The exit status says whether the
requirements hold with every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

from rlhf_lightning import ContextCompressionModule, SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.datamodules import ContextDataModule
from rlhf_lightning.inference import AttentionEviction, LocalEngine, SamplingParams, SinkWindow, Truncation
from rlhf_lightning.models import ContextCompressor, load_causal_lm, load_tokenizer
from rlhf_lightning.rewards import exact_answer

NANO = str(Path(__file__).parents[1] / "configs/models/nano")
LEAST_KEPT = 0.90
ENOUGH, MOST_STARTS = 0.95, 4  # accuracy on validation problems of a decoder that has learned the task
RATIOS, SEGMENT = (4, 8), 32
LENGTH, FACTS = 64, 4
LAYERS, WINDOW = 3, 3
# Characters, facts, and the share of the steps: the last stage is the task that is measured.
Stages = Sequence[tuple[int, int, float]]
DECODER_STAGES: Stages = ((24, 8, 0.6), (LENGTH, FACTS, 0.4))
FULL, LEARNED, ASKED = "whole context", "learned", "eviction by the question"
OTHERS: dict[str, Any] = {
    "truncation": Truncation,
    "window with sinks": SinkWindow,
    "attention eviction": AttentionEviction,
    ASKED: partial(AttentionEviction, observed="query"),
}
GREEDY = SamplingParams(max_new_tokens=1, temperature=0.0)
Row = dict[str, Any]


# Training.


def make_start(folder: Path, seed: int) -> None:
    """Writes a decoder whose weights let it find equal things at once, where random ones learn nothing for long.

    The first layer looks back a few tokens, at first evenly, so that a value knows the key before it. In the others,
    queries and keys begin as the same projection (as Trockman & Kolter, 2023, arXiv:2305.09828, propose), so that
    tokens attend to what is like them: a question to the value after the key that it asks for. Attended tokens are
    copied: the product of output and value projections begins as a multiple of the identity.
    """
    config = SmolLM3Config(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.04,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        layer_types=["sliding_attention"] + ["full_attention"] * (LAYERS - 1),
        no_rope_layers=[1] * LAYERS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    first, *others = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        first.q_proj.weight.mul_(0.1)
        for attention in others:
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight, gain=0.55)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    model.save_pretrained(folder)
    load_tokenizer(NANO).save_pretrained(folder)


def demonstrations(contexts: int, seed: int, length: int = LENGTH, facts: int = FACTS) -> list[Row]:
    """Rows that ask for every fact of so many contexts: the first question is a row's prompt, the others follow."""
    shape = f"length={length}&facts={facts}&value=1&questions={facts}"
    asked = open_task(f"recall:demonstrations?rows={contexts * facts}&seed={seed}&{shape}")
    found = []
    for start in range(0, len(asked), facts):
        first, *others = asked[start : start + facts]
        rest = "".join(row["prompt"] + row["completion"] for row in others)
        found.append({**first, "completion": first["completion"] + rest})
    return found


def curriculum(stages: Stages, steps: int, batch: int, seed: int) -> list[list[Row]]:
    """Rows of each stage; no context comes twice."""
    return [
        demonstrations(round(steps * share) * batch, 100 * seed + number, length, facts)
        for number, (length, facts, share) in enumerate(stages)
    ]


class Progress(lightning.Callback):
    """Prints the share of right tokens now and then."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prints after every hundredth batch."""
        if (batch_idx + 1) % 100 == 0:
            accuracy = float(trainer.callback_metrics["train/mean_token_accuracy"])
            print(f"  {type(pl_module).__name__}, batch {batch_idx + 1}: {accuracy:.1%} of tokens right", flush=True)


def fit(module: Any, stages: list[list[Row]], batch: int, folder: Path, seed: int) -> None:
    """Trains on rows in their order, and exports the result."""
    lightning.seed_everything(seed, verbose=False)
    rows = [row for stage in stages for row in stage]
    data = ContextDataModule(train=rows, global_batch_size=batch, shuffle=False, streaming=True, max_length=256)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelExport(str(folder)), Progress()],
    )
    trainer.fit(module, data)


def optimizers(rate: float) -> dict[str, Any]:
    """Adam with a short memory of squares, as losses fall suddenly here; a short warm-up and a long decay."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        "lr_scheduler": partial(WarmupSchedule, warmup_steps=50, decay="linear", min_ratio=0.05),
    }


def train_decoder(place: Path, seed: int, args: argparse.Namespace) -> tuple[Path, int]:
    """Trains the decoder, from other weights again while it does not learn; returns its folder and how often."""
    for number in range(MOST_STARTS):
        start, folder = place / f"start-{number}", place / f"decoder-{number}"
        make_start(start, seed + 1000 * number)
        module = SFTModule(str(start), **optimizers(args.rate))
        fit(module, curriculum(DECODER_STAGES, args.steps, args.batch, 10 * seed + number), args.batch, folder, seed)
        if accuracy(whole(folder, questions(25, "validation"))) >= ENOUGH:
            break
    return folder, number + 1


def train_compressor(decoder: Path, ratio: int, seed: int, args: argparse.Namespace) -> Path:
    """Trains a compressor with a copy of the decoder; returns the folder of both."""
    module = ContextCompressionModule(
        str(decoder),
        ratio=ratio,
        segment_length=SEGMENT,
        encoder_rank=args.rank,
        pooling="attention",
        train_decoder=True,
        seed=seed,
        **optimizers(args.compressor_rate),
    )
    folder = decoder.parent / f"compressor-{ratio}"
    stages = curriculum(((LENGTH, FACTS, 1.0),), args.compressor_steps, args.batch, 10 * seed + ratio)
    fit(module, stages, args.batch, folder, seed)
    return folder


# Measuring.


def questions(contexts: int, split: str = "test") -> list[Row]:
    """Rows of a split, that ask for every fact of each context."""
    shape = f"length={LENGTH}&facts={FACTS}&value=1&questions={FACTS}"
    return open_task(f"recall:prompts?split={split}&rows={contexts * FACTS}&{shape}")


def answered(engine: LocalEngine, compressor: Any, rows: Sequence[Row]) -> list[int]:
    """Tells of each question whether its greedy answer after the compressed context is right.

    The mark before an answer comes with the question: it is the token that looks the answer up, so that a compressor
    that reads the question has to see it.
    """
    engine.compressor = compressor
    prompts = [f"{row['prompt']}#" for row in rows]
    groups = engine.generate(prompts, 1, GREEDY, contexts=[row["context"] for row in rows])
    texts = [f"#{group[0].text}" for group in groups]
    return [int(value or 0) for value in exact_answer(prompts, texts, [row["answer"] for row in rows])]


def whole(decoder: Path, rows: Sequence[Row]) -> list[int]:
    """Right answers with the whole context in view."""
    model = load_causal_lm(str(decoder), dtype=torch.float32, trainable=False)
    return answered(LocalEngine(model, load_tokenizer(str(decoder))), Truncation(model, ratio=1), rows)


def measure(decoder: Path, learned: dict[int, Path], rows: Sequence[Row]) -> dict[str, list[int]]:
    """Right answers of all compressors by name and ratio."""
    model, tokenizer = load_causal_lm(str(decoder), dtype=torch.float32, trainable=False), load_tokenizer(str(decoder))
    engine = LocalEngine(model, tokenizer)
    found = {FULL: whole(decoder, rows)}
    for ratio in RATIOS:
        compressor = ContextCompressor.from_pretrained(learned[ratio])
        found[named(LEARNED, ratio)] = answered(LocalEngine(compressor.model, tokenizer), compressor, rows)
        for name, make in OTHERS.items():
            found[named(name, ratio)] = answered(engine, make(model, ratio=ratio), rows)
    return found


def named(name: str, ratio: int) -> str:
    """The label of a compressor at a ratio."""
    return f"{name}, {ratio}x"


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures with one seed."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) if args.keep is None else args.keep / f"seed-{seed}"
        decoder, starts = train_decoder(place, seed, args)
        learned = {ratio: train_compressor(decoder, ratio, seed, args) for ratio in RATIOS}
        trained = time.process_time() - began
        rows = questions(args.test_contexts)
        right = measure(decoder, learned, rows)
    cut = [row["offset"] % SEGMENT == SEGMENT - 1 for row in rows]
    result = {"seed": seed, "seconds": trained, "starts": starts, "offsets": [row["offset"] for row in rows]}
    result |= {"cut": cut, "right": right}
    print(
        f"seed {seed}: {trained:.0f} s of training, {starts} starts",
        {k: accuracy(v) for k, v in right.items()},
        flush=True,
    )
    return result


# The result.


def accuracy(right: Sequence[int]) -> float:
    """The share of right answers; not a number for none."""
    return sum(right) / len(right) if right else math.nan


def by_quarter(result: dict[str, Any], label: str) -> list[float]:
    """Accuracy for facts in each quarter of the context, the first one first."""
    quarters = [min(3, 4 * offset // LENGTH) for offset in result["offsets"]]
    pairs = list(zip(quarters, result["right"][label], strict=True))
    return [accuracy([right for quarter, right in pairs if quarter == n]) for n in range(4)]


def means(results: Sequence[dict[str, Any]], label: str) -> float:
    """Accuracy of one compressor, the mean of the seeds."""
    return statistics.mean(accuracy(result["right"][label]) for result in results)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracy in Markdown: means of the seeds, and in brackets the worst seed."""
    lines = [f"| | {' | '.join(f'{ratio}x' for ratio in RATIOS)} |", "|---" * (len(RATIOS) + 1) + "|"]

    def cell(label: str) -> str:
        worst = min(accuracy(result["right"][label]) for result in results)
        return f"{means(results, label):.1%} ({worst:.1%})"

    lines.append(f"| {FULL} | {' | '.join([cell(FULL)] * len(RATIOS))} |")
    for name in (LEARNED, *OTHERS):
        lines.append(f"| {name} | {' | '.join(cell(named(name, ratio)) for ratio in RATIOS)} |")
    return "\n".join(lines)


def crowded(result: dict[str, Any], ratio: int) -> list[bool]:
    """Tells of each question whether another fact of its context begins among the same ``ratio`` tokens."""
    found = []
    for start in range(0, len(result["offsets"]), FACTS):
        groups = [offset // ratio for offset in result["offsets"][start : start + FACTS]]
        found += [groups.count(group) > 1 for group in groups]
    return found


def positions(results: Sequence[dict[str, Any]]) -> str:
    """Wrong answers in Markdown: by the quarter that the fact is in, and of facts that are hard for slots."""
    titles = ["first quarter", "second", "third", "last quarter", "two facts in a slot's tokens", "cut by a segment"]
    lines = [f"| wrong answers | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for ratio in RATIOS:
        for label in [FULL] * (ratio == RATIOS[0]) + [named(name, ratio) for name in (LEARNED, *OTHERS)]:
            shares = [statistics.mean(each) for each in zip(*(by_quarter(r, label) for r in results), strict=True)]
            for of in (partial(crowded, ratio=ratio), lambda r: r["cut"]):
                pairs = [pair for r in results for pair in zip(of(r), r["right"][label], strict=True)]
                shares.append(accuracy([right for hard, right in pairs if hard]))
            cells = ["" if math.isnan(share) else f"{1 - share:.0%}" for share in shares]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def requirements(results: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The requirements, and whether every seed meets them."""
    scores = [{label: accuracy(right) for label, right in result["right"].items()} for result in results]
    learned = named(LEARNED, RATIOS[0])
    return {
        f"{learned}: at least {LEAST_KEPT:.0%} of the accuracy with the whole context": all(
            score[learned] >= LEAST_KEPT * score[FULL] for score in scores
        ),
        "learned is better than what learns nothing and does not read the question, at each ratio": all(
            score[named(LEARNED, ratio)] > score[named(name, ratio)]
            for score in scores
            for ratio in RATIOS
            for name in OTHERS
            if name != ASKED
        ),
    }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of all compressors, and by the place of the fact: bars and lines are means, marks are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(RATIOS), sharey=True)
    names = (LEARNED, *OTHERS)
    left.axhline(means(results, FULL), color="black", lw=1.2, ls="--")
    for number, name in enumerate(names):
        for place, ratio in enumerate(RATIOS):
            label, x = named(name, ratio), place + 0.16 * (number - 2)
            left.bar(x, means(results, label), width=0.15, color=f"C{number}")
            left.plot([x] * len(results), [accuracy(r["right"][label]) for r in results], "k.", ms=4)
    left.set_xticks(range(len(RATIOS)), [f"{ratio}x" for ratio in RATIOS])
    left.set_ylabel("accuracy", fontsize=9)
    for axes, ratio in zip(others, RATIOS, strict=True):
        for number, label in enumerate([FULL, *(named(name, ratio) for name in names)]):
            line = [statistics.mean(each) for each in zip(*(by_quarter(r, label) for r in results), strict=True)]
            style = {"color": "black", "ls": "--"} if label == FULL else {"color": f"C{number - 1}"}
            axes.plot(range(1, 5), line, marker="o", ms=4, label=label.removesuffix(f", {ratio}x"), **style)
        axes.set_title(f"{ratio}x, by the quarter that the fact is in", fontsize=9)
        axes.set_xticks(range(1, 5))
    for axes in (left, *others):
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    others[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def main() -> int:
    """Runs the seeds that are missing, prints the tables, and reports which requirements hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of the decoder")
    parser.add_argument("--compressor_steps", type=int, default=450, help="of each compressor")
    parser.add_argument("--batch", type=int, default=16, help="contexts in a batch")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the decoder")
    parser.add_argument("--compressor_rate", type=float, default=1.5e-3)
    parser.add_argument("--rank", type=int, default=16, help="of the encoder")
    parser.add_argument("--test_contexts", type=int, default=100, help=f"with {FACTS} questions each")
    parser.add_argument("--results", type=Path, help="JSON lines, one per seed: read if there, continued, and written")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the models, by seed; deleted without it")
    args = parser.parse_args()

    torch.set_num_threads(1)
    lines = args.results.read_text().splitlines() if args.results and args.results.is_file() else []
    done = {entry["seed"]: entry for entry in map(json.loads, lines)}
    for seed in args.seeds:
        if seed not in done:
            done[seed] = run(seed, args)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(done[seed]) + "\n")
    results = [done[seed] for seed in args.seeds]
    print(table(results), positions(results), sep="\n\n")
    if args.figure:
        draw(results, args.figure)
    checks = requirements(results)
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
