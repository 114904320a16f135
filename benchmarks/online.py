"""An iteration of GRPO beside TRL's: sample, score, one optimizer step; same model, prompts, lengths, reward, threads.

Each side runs in a process of its own; pairs of processes alternate, and the median of the pairwise ratios is printed.
Both sample at temperature 1 without filters, keep no reference policy (TRL's default) and make one update on the
whole batch. Two workloads: ``equal``, where no completion may end before its limit, and ``tail``, where the model ends
its completions at random, so that a few are much longer than most; lengths are the same in distribution then, and
speeds are compared per sampled token. ``trl-split`` makes its gradient from a quarter of the completions at a time.
Peak memory is the process's largest resident set, libraries included.

    python benchmarks/online.py                      # needs: pip install trl==1.16.0
    python benchmarks/online.py --workloads tail --pairs 5 --sides trl
    python benchmarks/online.py --sides ppo          # seconds of our PPO: TRL has none any more

For our side it also says, of one profiled iteration of ``equal``, how much of the time was spent in matrix products,
and how fast the machine multiplies matrices of the model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training import HIDDEN, LAYERS, random_prompts, write_model

EOS = 1
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear")


class Workload(NamedTuple):
    """How long completions are."""

    limit: int
    mean_length: int | None  # None: every completion runs to the limit


WORKLOADS = {"equal": Workload(64, None), "tail": Workload(512, 64)}


def end_at_random(folder: str, mean_length: int) -> None:
    """Changes a model's weights so that about one token in ``mean_length`` ends a completion.

    The first component of every embedding becomes 1 and stays about the same through the layers, whatever the context
    is. Since embeddings are tied, what the end's token has in addition there raises its score by a constant.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    context = torch.randint(2, len(weight), (8, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight[:, 0] = 1.0
        output = model(context, output_hidden_states=True)
        now = output.logits.log_softmax(-1)[..., EOS].mean()
        weight[EOS, 0] += (-math.log(mean_length) - now) / output.hidden_states[-1][..., 0].mean()
    model.save_pretrained(folder)


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Clock:
    """Seconds and sampled tokens of each iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.peak = 0.0

    def reward(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """The reward function, which also counts."""
        self.tokens.append(sum(map(len, completion_ids)))
        return reward(completion_ids)

    def begin(self) -> None:
        """Before an iteration."""
        self.start = time.perf_counter()

    def end(self) -> None:
        """After an iteration."""
        self.times.append(time.perf_counter() - self.start)
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(arguments: argparse.Namespace, prompts: list[dict[str, str]], work: Workload, clock: Clock) -> dict[str, Any]:
    """Trains with our GRPO or PPO; with the profiler on in the last iteration, says how much of it was products."""
    import lightning
    from torch.profiler import ProfilerActivity, profile

    from rlhf_lightning.datamodules import PromptDataModule
    from rlhf_lightning.modules import GRPOModule, PPOModule

    profiler = profile(activities=[ProfilerActivity.CPU])
    last = arguments.steps  # one more than counts

    class Timing(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if number == last:
                profiler.__enter__()
            else:
                clock.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if number == last:
                profiler.__exit__(None, None, None)
            else:
                clock.end()

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Timing()],
    )
    options: dict[str, Any] = {
        "rewards": [clock.reward],
        "num_generations": arguments.samples,
        "max_completion_length": work.limit,
        "min_completion_length": 0 if work.mean_length else work.limit,
    }
    kind: Any = PPOModule if arguments.side == "ppo" else GRPOModule
    train = prompts + prompts[: arguments.prompts if arguments.profile else 0]
    trainer.fit(
        kind(arguments.folder, **options),
        PromptDataModule(train=train, global_batch_size=arguments.prompts, shuffle=False),
    )
    if not arguments.profile:
        return {}
    clock.tokens.pop()
    events = profiler.key_averages()
    seconds = {event.key: event.self_cpu_time_total for event in events}
    return {"products": sum(seconds.get(name, 0.0) for name in PRODUCTS) / sum(seconds.values())}


def theirs(arguments: argparse.Namespace, prompts: list[dict[str, str]], work: Workload, clock: Clock) -> None:
    """Trains with TRL's GRPO."""
    import transformers
    import trl
    from datasets import Dataset

    class Timing(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    parts = 4 if arguments.side == "trl-split" else 1
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.prompts * arguments.samples // parts,
        gradient_accumulation_steps=parts,
        num_generations=arguments.samples,
        max_completion_length=work.limit,
        generation_kwargs={} if work.mean_length else {"min_new_tokens": work.limit},
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32),
        reward_funcs=clock.reward,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=transformers.AutoTokenizer.from_pretrained(arguments.folder),
        callbacks=[Timing()],
    ).train()


def child(arguments: argparse.Namespace) -> None:
    """Runs one side and prints a line of JSON; the first iteration does not count."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    work = WORKLOADS[arguments.workloads[0]]
    asked = random_prompts(arguments.prompts * arguments.steps, "gsm8k", 1)
    prompts = [{"prompt": prompt} for prompt, _ in asked]
    clock, found = Clock(), {}
    if arguments.side.startswith("trl"):
        theirs(arguments, prompts, work, clock)
    else:
        found = ours(arguments, prompts, work, clock)
    # Lengths differ from iteration to iteration: what is compared is the whole.
    seconds, tokens = sum(clock.times[1:]), sum(clock.tokens[1:])
    found |= {
        "seconds": seconds / len(clock.times[1:]),
        "tokens": tokens / len(clock.times[1:]),
        "peak_mib": clock.peak,
    }
    print("RESULT " + json.dumps(found))


def measure(arguments: argparse.Namespace, workload: str, side: str, seed: int, profiled: bool) -> dict[str, float]:
    """Runs one side in a process of its own."""
    command = [sys.executable, __file__, "--workloads", workload, "--side", side, "--seed", str(seed)]
    for name in ("folder", "steps", "threads", "prompts", "samples"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--profile"] if profiled else []
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")


def product_rate() -> float:
    """GFLOP per second of a product of 2,048 tokens with a weight of the model's feed-forward layer."""
    tokens, weight = torch.randn(2048, HIDDEN), torch.randn(1024, HIDDEN)
    best = math.inf
    for _ in range(30):
        start = time.perf_counter()
        tokens @ weight.T
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * HIDDEN * 1024 / best / 1e9


def compare(arguments: argparse.Namespace, workload: str) -> None:
    """Alternates the sides on one workload and prints medians and pairwise ratios."""
    sides = ["ours", *arguments.sides]
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(arguments.pairs):
        for side in sides:
            # A profile of hundreds of short decoding steps takes longer to add up than the run itself.
            profiled = number == arguments.pairs - 1 and workload == "equal" and not side.startswith("trl")
            results[side].append(measure(arguments, workload, side, number, profiled))
            print(f"  {side:10s} {results[side][-1]}", flush=True)
    shape = f"{arguments.prompts} prompts x {arguments.samples}, at most {WORKLOADS[workload].limit} tokens"
    print(f"\n{workload}: {shape}; medians of {arguments.pairs}")
    for side in sides:
        median = {key: statistics.median(r[key] for r in results[side]) for key in ("seconds", "tokens", "peak_mib")}
        line = f"{side:10s} {median['seconds']:6.2f} s/iteration {median['tokens']:6.0f} sampled tokens"
        line += f" {median['peak_mib']:5.0f} MiB"
        if "products" in results[side][-1]:
            line += f"   {results[side][-1]['products']:.0%} of the time in matrix products"
        if side.startswith("trl"):
            both = list(zip(results["ours"], results[side], strict=True))
            speed = statistics.median((b["seconds"] / b["tokens"]) / (a["seconds"] / a["tokens"]) for a, b in both)
            memory = statistics.median(a["peak_mib"] / b["peak_mib"] for a, b in both)
            line += f"   ours: {speed:.2f}x the tokens per second, {memory:.2f}x the memory"
        print(line, flush=True)


def main() -> None:
    """Prints a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--sides", nargs="*", default=["trl", "trl-split"], help="beside ours: trl, trl-split, ppo")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="iterations per run, the first not counted")
    parser.add_argument("--prompts", type=int, default=4, help="per iteration")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--threads", type=int, default=2)
    for hidden in ("--side", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        child(arguments)
        return
    torch.set_num_threads(arguments.threads)
    print(f"matrix products run at {product_rate():.0f} GFLOP/s; the model has {LAYERS} layers of {HIDDEN}")
    for workload in arguments.workloads:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder))
            if WORKLOADS[workload].mean_length:
                end_at_random(folder, WORKLOADS[workload].mean_length or 1)
            arguments.folder = folder
            compare(arguments, workload)


if __name__ == "__main__":
    main()
