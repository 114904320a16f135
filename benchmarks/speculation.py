"""Speculative decoding compared with plain decoding, with models that are trained on the embedded task first.

    python benchmarks/speculation.py --threads 1 --cpu-time

A model of 16 layers and a draft of 2, an eighth of its weights, learn the solutions of sums, half of them twice in a
row: some minutes. Then both ways generate the same samples in turn: at temperature 1, greedily, and greedily where the
problem has been solved before, so that lookups find what follows. Per kind of draft and number of rows, the table has
new tokens per second, the median over rounds of the ratio, the share of drafts that were accepted, and the share of
forwards that checked any: where plain steps are faster, speculation stays off. Samples are compared as well; they must
be the same.
``--cpu-time`` counts the process's CPU seconds instead of wall-clock time, for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.inference import Completion, LocalEngine, SamplingParams

EOS = 1
CHARACTERS = "0123456789+=?#\n"
BREAK = 2 + CHARACTERS.index("\n")
LEAST_AT_ONE_ROW, LEAST_AT_MORE = 1.5, 0.97


class Workload(NamedTuple):
    """A workload of the generation, and its draft."""

    name: str
    kind: str
    params: SamplingParams
    again: bool = False


def encode(text: str) -> list[int]:
    """Token ids of a text of the task."""
    return [2 + CHARACTERS.index(character) for character in text]


def make_model(layers: int, hidden: int) -> LlamaForCausalLM:
    """A random model with the task's characters as its tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, steps: int, rate: float) -> float:
    """Trains a model on solutions, in batches of 16; every other batch has each row twice. Returns the last loss."""
    rows = open_task("sums:demonstrations?rows=8000&careless=0&terms=8")
    prompts = [encode(row["prompt"] + "\n") for row in rows]
    solved = [[*prompt, *encode(row["completion"])] for prompt, row in zip(prompts, rows, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 50) * (1 - n / steps))
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for step in range(steps):
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        texts = [[*(solved[n] + [BREAK] if step % 2 else []), *solved[n], EOS] for n in chosen]
        tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, texts)), batch_first=True, padding_value=-100)
        # A problem is given: its numbers cannot be learnt.
        labels = tokens.clone()
        for row, number in enumerate(chosen):
            labels[row, : len(prompts[number])] = -100
        loss = model(input_ids=tokens.clamp(min=0), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().requires_grad_(False)
    return loss.item()


def ask(rows: int, again: bool) -> list[list[int]]:
    """Problems that were not trained on, or each after its solution."""
    problems = open_task(f"sums:demonstrations?rows={rows}&careless=0&terms=8&split=test")
    prompts = [encode(row["prompt"] + "\n") for row in problems]
    if not again:
        return prompts
    return [
        [*prompt, *encode(row["completion"]), BREAK, *prompt] for prompt, row in zip(prompts, problems, strict=True)
    ]


def compare(
    target: LlamaForCausalLM, spec: Any, work: Workload, rows: int, rounds: int, clock: Callable[[], float]
) -> float:
    """Prints one line; returns the median ratio."""
    prompts = ask(rows * (rounds + 2), work.again)
    engines = {"plain": LocalEngine(target, None), "speculative": LocalEngine(target, None, speculation=spec)}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 2):
        samples: dict[str, list[list[Completion]]] = {}
        for name in engines if turn % 2 else reversed(engines):
            start = clock()
            samples[name] = engines[name].generate(prompts[rows * turn : rows * (turn + 1)], 1, work.params)
            if turn > 1:  # the first turns probe, and measure what rounds take
                speeds[name].append(sum(len(sample.token_ids) for (sample,) in samples[name]) / (clock() - start))
        if [s.token_ids for (s,) in samples["plain"]] != [s.token_ids for (s,) in samples["speculative"]]:
            print(f"{work.name}, {rows} rows: samples differ where two tokens are equally likely up to rounding")
    ratio = statistics.median(fast / slow for fast, slow in zip(speeds["speculative"], speeds["plain"], strict=True))
    counts = engines["speculative"].statistics()["speculation"]
    checks = counts["rounds"] / max(1, counts["rounds"] + counts["plain_steps"])
    print(
        f"{work.name:<34} {rows:>4} {statistics.median(speeds['plain']):>9.0f}"
        f" {statistics.median(speeds['speculative']):>12.0f} {ratio:>7.2f}x {counts['acceptance_rate']:>9.0%}"
        f" {checks:>8.0%}",
        flush=True,
    )
    return ratio


def main() -> None:
    """Trains, compares, and exits with an error where a requirement is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600, help="of training the model; its draft takes twice as many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter

    target, draft = make_model(16, 96), make_model(2, 96)
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (target, draft)]
    losses = train(target, args.steps, 2e-3), train(draft, 2 * args.steps, 3e-3)
    print(f"weights {sizes[0]:,} and {sizes[1]:,}, losses {losses[0]:.3f} and {losses[1]:.3f}\n")
    works = (
        Workload("draft, temperature 1", "draft", SamplingParams(max_new_tokens=120, seed=0)),
        Workload("draft, greedy", "draft", SamplingParams(max_new_tokens=120, temperature=0)),
        Workload("lookup, solved before", "ngram", SamplingParams(max_new_tokens=120, temperature=0), again=True),
        Workload("lookup, temperature 1", "ngram", SamplingParams(max_new_tokens=120, seed=0)),
        Workload("first 4 layers, temperature 1", "early_exit", SamplingParams(max_new_tokens=120, seed=0)),
    )
    specs: dict[str, Any] = {"draft": {"draft": draft}, "ngram": "ngram", "early_exit": {"early_exit": 4}}
    print("                                   rows  tokens/s  speculative   ratio  accepted   checks")
    missed = []
    for work in works:
        for rows in args.rows:
            ratio = compare(target, specs[work.kind], work, rows, args.rounds, clock)
            demanding = work.name in ("draft, temperature 1", "draft, greedy", "lookup, solved before")
            least = LEAST_AT_ONE_ROW if rows == 1 and demanding else LEAST_AT_MORE
            missed += [f"{work.name}, {rows} rows: {ratio:.2f}x < {least}x"] if ratio < least else []
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
