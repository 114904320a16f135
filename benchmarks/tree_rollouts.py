"""Times one optimizer step of GRPO on a search tree against the same step on its flattened completions.

    python benchmarks/tree_rollouts.py                          # branching 4, depth 4
    python benchmarks/tree_rollouts.py --branching 2 --depth 6 --device cuda

Both steps have the same loss and gradient; ``share_prefix=False`` repeats prompt and steps for each completion. The
exit status says whether the tree is at least twice as fast, and costs at most 1.1 times its share of the tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning import GRPOModule
from rlhf_lightning.rl.branches import Branch, TreeCompletion
from rlhf_lightning.rl.rollouts import Rollouts
from rlhf_lightning.sequences import Example, Segment, example_cost

LEAST_SPEEDUP, MOST_OVERHEAD = 2.0, 1.1


def completions(branching: int, depth: int, tokens: int) -> list[TreeCompletion]:
    """A full tree of random steps."""
    rng = np.random.default_rng(0)

    def below(parent: Branch | None, left: int) -> list[TreeCompletion]:
        found = []
        for _ in range(branching):
            ids = tuple(rng.integers(3, 4000, size=tokens).tolist())
            branch = Branch(ids, (-1.0,) * tokens, parent)
            if left > 1:
                found += below(branch, left - 1)
            else:
                line = [token for part in branch.line for token in part.token_ids]
                found.append(TreeCompletion(line, "", [-1.0] * len(line), "stop", branch=branch))
        return found

    return below(None, depth)


def lengths(completions: Sequence[str], completion_ids: Sequence[list[int]]) -> list[float]:
    """A reward: whether the last token is even."""
    return [float(ids[-1] % 2) for ids in completion_ids]


def main() -> int:
    """Prints times and shares, and checks the requirements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branching", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of a step, and of the prompt")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=2048,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    group = completions(args.branching, args.depth, args.tokens)
    prompt = Example("rows:0", Segment(np.arange(3, 3 + args.tokens)))
    rewards = torch.tensor([[float(c.token_ids[-1] % 2)] for c in group], dtype=torch.float64, device=args.device)
    results: dict[bool, tuple[float, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        for share in (True, False):
            module: Any = GRPOModule(folder, rewards=[lengths], micro_batch_tokens=1 << 20, share_prefix=share)
            module._tokenizer = object()  # nothing is decoded
            module.configure_model()
            module.to(args.device)
            trees, _ = module.prepare(Rollouts([prompt], [group], rewards))
            times = []
            for _ in range(args.repeats + 1):
                module.zero_grad()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for tree in trees:
                    batch = module.micro_batching.pack([tree])
                    module.loss(module.grad_rows(batch), module.normalizers(trees)).backward()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            cost = sum(example_cost(tree, share_prefix=share) for tree in trees)
            results[share] = statistics.median(times[1:]), cost
            print(f"{'tree' if share else 'flattened':10} {cost:7} tokens  {1000 * results[share][0]:8.1f} ms")
    (tree, unique), (flat, all_) = results[True], results[False]
    overhead = (tree / flat) / (unique / all_)
    shares = f"{unique / all_:.3f} of the tokens, {tree / flat:.3f} of the time"
    print(f"{flat / tree:.2f} times as fast; {shares}: {overhead:.2f} times the share")
    checks = {f"at least {LEAST_SPEEDUP:g}x": flat / tree >= LEAST_SPEEDUP}
    checks[f"at most {MOST_OVERHEAD:g} times the share"] = overhead <= MOST_OVERHEAD
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
