"""Caches of ``LocalEngine`` on a random Qwen3-shaped model: speed, memory, and what 8 bits lose.

    python benchmarks/caches.py --threads 2 --rounds 3

Three tables. Calls that share a long beginning, one after another: seconds of all with each cache, and how many tokens
of prompts were not computed again. One batch of samples: new tokens per second, and bytes of keys and values. Keys and
values in 8 bits: the error of the scores of the same tokens, relative to their spread, and the share of greedy tokens
that stay the same. Medians over rounds, in which the caches take turns. The exit status says whether the requirements
hold: ``paged`` is at least 3 times as fast in the first table, and 8 bits take at most 0.35 of the memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from generation import make_model
from transformers import Qwen3ForCausalLM

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.inference.decoder import Decoder
from rlhf_lightning.inference.planes import EightBitPlane, WholePlane
from rlhf_lightning.inference.row_cache import RowCache
from rlhf_lightning.inference.stores import CACHES
from rlhf_lightning.models.own_attention import using_attention
from rlhf_lightning.sequences import register_attention

LEAST_SPEEDUP, MOST_MEMORY = 3.0, 0.35


def tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Random tokens of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (count,), generator=generator).tolist()


def calls_in_turn(model: Qwen3ForCausalLM, length: int, rounds: int) -> float:
    """Eight calls whose prompts share their first tokens; returns how many times as fast they are with pages."""
    vocabulary = int(model.config.vocab_size)
    params = SamplingParams(max_new_tokens=8, min_new_tokens=8, seed=0)
    seconds: dict[str, list[float]] = {cache: [] for cache in CACHES}
    reused: dict[str, float] = {}
    for turn in range(rounds):
        shared = tokens(length, vocabulary, 1000 + turn)
        for cache in CACHES:
            engine = LocalEngine(model, None, cache=cache)
            engine.generate([[5, 6]], 1, SamplingParams(max_new_tokens=1, seed=0))  # probes
            start = time.perf_counter()
            for call in range(8):
                engine.generate([shared + tokens(20, vocabulary, call)], 1, params)
            seconds[cache].append(time.perf_counter() - start)
            reused[cache] = engine.statistics()["reused_tokens"]
    print(f"8 calls, {length} shared tokens, 20 own, 8 new   seconds   times as fast   tokens found again")
    plain = statistics.median(seconds["dynamic"])
    for cache in CACHES:
        median = statistics.median(seconds[cache])
        print(f"{cache:<46} {median:>7.2f} {plain / median:>14.2f}x {reused[cache]:>20.0f}", flush=True)
    return plain / statistics.median(seconds["paged"])


def one_batch(model: Qwen3ForCausalLM, new: int, rounds: int) -> None:
    """Four prompts with eight samples each."""
    vocabulary = int(model.config.vocab_size)
    prompts = [tokens(60 + 15 * number, vocabulary, number) for number in range(4)]
    params = SamplingParams(max_new_tokens=new, min_new_tokens=new, seed=0)
    speeds: dict[str, list[float]] = {cache: [] for cache in CACHES}
    held: dict[str, float] = {}
    for turn in range(rounds + 1):
        for cache in CACHES:
            engine = LocalEngine(model, None, cache=cache)
            start = time.perf_counter()
            engine.generate(prompts, 8, params)
            if turn:  # the first turn warms up
                speeds[cache].append(32 * new / (time.perf_counter() - start))
            held[cache] = engine.statistics()["cache_bytes"]
    print(f"\n4 prompts x 8, {new} new tokens each          tokens per second   MiB of keys and values")
    for cache in CACHES:
        print(f"{cache:<46} {statistics.median(speeds[cache]):>10.0f} {held[cache] / 2**20:>24.1f}", flush=True)


def loss_of_eight_bits(model: Qwen3ForCausalLM, length: int) -> float:
    """Scores of 64 tokens after a prompt, over whole and rounded keys and values; returns the share of memory."""
    vocabulary = int(model.config.vocab_size)
    with torch.no_grad(), using_attention(model, register_attention()):
        decoder, scores, held = Decoder(model), [], []
        _, states = decoder.prefill([tokens(length, vocabulary, 0)])
        for plane in (WholePlane, EightBitPlane):
            cache = RowCache(plane, 1, length + 64)
            cache.admit(states, 0, length, copies=1)
            scores.append(decoder.extend([tokens(64, vocabulary, 1)], cache)[0].double())
            held.append(cache.nbytes)
    error = (scores[1] - scores[0]).square().mean().sqrt() / scores[0].std()
    same = (scores[1].argmax(-1) == scores[0].argmax(-1)).double().mean()
    print(
        f"\n8 bits, 64 tokens after {length}: memory {held[1] / held[0]:.3f}, error {error:.2e}, same greedy {same:.1%}"
    )
    return held[1] / held[0]


def main() -> int:
    """Prints the three tables, and checks the requirements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--shared", type=int, default=2048, help="tokens that the calls share")
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.layers, args.hidden, args.vocabulary)
    speedup = calls_in_turn(model, args.shared, args.rounds)
    one_batch(model, args.new_tokens, args.rounds)
    memory = loss_of_eight_bits(model, args.shared)
    checks = {
        f"calls with a shared beginning are {speedup:.2f} times as fast with pages, at least {LEAST_SPEEDUP}": (
            speedup >= LEAST_SPEEDUP
        ),
        f"8 bits take {memory:.2f} of the memory, at most {MOST_MEMORY}": memory <= MOST_MEMORY,
    }
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
