"""Sampling: ``LocalEngine`` compared with ``transformers.generate``, on a random Qwen3-shaped model.

    python benchmarks/generation.py --threads 2 --rounds 5

Both sample from the same distribution (temperature 1, nothing filtered). Four workloads: every completion runs to its
limit; completions end at random, so that a few are much longer than most, as in reinforcement learning; the same with
more prompts; and best-of-n, where both sides choose the sample with most even tokens, ours with ``BestOfN``: the exit
status says whether it is at least twice as fast. transformers gets all prompts in one left-padded batch with
``num_return_sequences``. Rounds alternate between the two, and the medians over rounds of new tokens per second and of
their ratio are printed.
``--cpu-time`` counts the process's CPU seconds instead of wall-clock time, for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlhf_lightning.inference import BestOfN, LocalEngine, SamplingParams
from rlhf_lightning.inference.candidates import Candidate, Scores

EOS = 1
LEAST_SPEEDUP = 2.0


class Workload(NamedTuple):
    """Number of prompts and samples, and the lengths of completions."""

    name: str
    prompts: int
    samples: int
    max_new_tokens: int
    mean_length: int | None
    best: bool = False


def make_model(layers: int, hidden: int, vocabulary: int) -> Qwen3ForCausalLM:
    """A random model with tied embeddings, heads of 64 and grouped queries."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def end_at_random(model: Qwen3ForCausalLM, mean_length: int) -> Callable[[], None]:
    """Raises the end token's logit so that about one token in ``mean_length`` ends a completion; returns an undo."""
    # The other scores of a random model differ little: their sum of exponentials is about the size of the vocabulary.
    raised = torch.log(torch.tensor(model.config.vocab_size / mean_length)).item()

    def raise_score(module: torch.nn.Module, args: tuple[Tensor, ...], scores: Tensor) -> None:
        scores[..., EOS] = raised

    return model.lm_head.register_forward_hook(raise_score).remove


def with_transformers(model: Qwen3ForCausalLM, prompts: list[list[int]], work: Workload, floor: int) -> int:
    """Samples in one left-padded batch; returns the number of new tokens up to each end."""
    width = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            num_return_sequences=work.samples,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.max_new_tokens,
            min_new_tokens=floor,
        )[:, width:]
    if work.best:
        groups = output.view(len(prompts), work.samples, -1)
        chosen = [max(group.tolist(), key=even) for group in groups]
        assert len(chosen) == len(prompts)
    return int((output != 0).sum())


def even(ids: Sequence[int]) -> float:
    """A reward: the share of even tokens."""
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


class EvenTokens:
    """A scorer by it."""

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores whole samples."""
        return Scores([even(candidate.token_ids) for candidate in candidates], [0] * len(candidates))


def with_engine(model: Qwen3ForCausalLM, prompts: list[list[int]], work: Workload, floor: int, seed: int) -> int:
    """Samples with the engine; returns the number of new tokens."""
    params = SamplingParams(max_new_tokens=work.max_new_tokens, min_new_tokens=floor, seed=seed)
    engine = LocalEngine(model, None)
    if work.best:
        found = BestOfN(engine, scorer=EvenTokens(), n=work.samples).search(
            prompts, seeds=range(len(prompts)), sampling=params
        )
        return sum(result.tokens for result in found)
    groups = engine.generate(prompts, work.samples, params)
    return sum(len(sample.token_ids) for group in groups for sample in group)


def compare(
    model: Qwen3ForCausalLM, work: Workload, rounds: int, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Runs a workload with both in turn; returns the peer's tokens per second, ours, and the median ratio."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(60, 120, (work.prompts,), generator=generator).tolist()
    prompts = [torch.randint(2, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    undo = (lambda: None) if work.mean_length is None else end_at_random(model, work.mean_length)
    floor = work.max_new_tokens if work.mean_length is None else 0
    speeds: dict[str, list[float]] = {"transformers": [], "engine": []}
    for turn in range(rounds + 1):
        for name, run in (
            ("transformers", lambda: with_transformers(model, prompts, work, floor)),
            ("engine", lambda turn=turn: with_engine(model, prompts, work, floor, turn)),
        ):
            start = clock()
            tokens = run()
            if turn:  # the first turn warms up
                speeds[name].append(tokens / (clock() - start))
    undo()
    ratio = statistics.median(b / a for a, b in zip(speeds["transformers"], speeds["engine"], strict=True))
    peer, ours = (statistics.median(values) for values in speeds.values())
    return peer, ours, ratio


def main() -> int:
    """Prints one line per workload, and checks best-of-n."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--new-tokens", type=int, default=64, help="limit where lengths are equal, mean where not")
    parser.add_argument("--workloads", type=int, nargs="*", default=[0, 1, 2, 3], help="which of the four")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    new = args.new_tokens
    workloads = [
        Workload(f"4 prompts x 8, {new} tokens each", 4, 8, new, None),
        Workload(f"4 prompts x 8, mean {new}, at most {8 * new}", 4, 8, 8 * new, new),
        Workload(f"16 prompts x 8, mean {new}, at most {8 * new}", 16, 8, 8 * new, new),
        Workload(f"best of 8 for 4 prompts, {new} tokens each", 4, 8, new, None, best=True),
    ]
    model = make_model(args.layers, args.hidden, args.vocabulary)
    print(f"{'new tokens per second':<38} {'transformers':>12} {'LocalEngine':>12} {'ratio':>8}")
    for index in args.workloads:
        work = workloads[index]
        peer, ours, ratio = compare(model, work, args.rounds, clock)
        print(f"{work.name:<38} {peer:>12.0f} {ours:>12.0f} {ratio:>7.2f}x", flush=True)
        if work.best and ratio < LEAST_SPEEDUP:
            print(f"NO   best-of-n is at least {LEAST_SPEEDUP:g} times as fast")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
