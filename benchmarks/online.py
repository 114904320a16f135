"""An iteration of GRPO compared with TRL's: sample, score, one optimizer step; same model, prompts, reward, threads.

TRL runs *as it comes*, with all completions on the device at once, and *at its best*: its gradient from all, a quarter,
an eighth or a thirty-second of the completions at a time, each tried once, and the fastest compared. Each run is a
separate process; ours and the two settings alternate, and medians of the pairwise ratios are printed.
Both sample at temperature 1 without filters, keep no reference policy (TRL's default) and make one update on the
whole batch. Two workloads: ``equal``, where no completion may end before its limit, and ``tail``, where the model ends
its completions at random, so that a few are much longer than most; lengths are the same in distribution then, and
speeds are compared per sampled token.
Peak memory is the process's largest resident set, libraries included.

    python benchmarks/online.py                      # needs: pip install trl==1.16.0
    python benchmarks/online.py --workloads tail --pairs 5 --settings trl
    python benchmarks/online.py --ours ppo --settings    # seconds of our PPO: TRL has none any more

For our side it also prints the share of matrix products in one profiled iteration of ``equal``, and how fast the
machine multiplies matrices of the model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sides import OURS, Figures, compare, peak_mib, run_child, wait_for
from training import SHAPES, random_prompts, write_model

EOS = 1
SHARED = (
    "steps",
    "threads",
    "prompts",
    "samples",
    "ours",
    "device",
    "shape",
    "limit",
    "precision",
)  # options passed to a child
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear")


class Workload(NamedTuple):
    """Lengths of completions."""

    limit: int
    mean_length: int | None  # None: every completion runs to the limit


# TRL's settings, by the number of parts in which its gradient is computed; the default one first.
SETTINGS = {"trl": 1, "trl-4": 4, "trl-8": 8, "trl-32": 32}
WORKLOADS = {"equal": Workload(64, None), "tail": Workload(512, 64)}


def workload_of(arguments: argparse.Namespace, name: str) -> Workload:
    """Returns a workload, with the limit of the arguments."""
    work = WORKLOADS[name]
    return work._replace(limit=arguments.limit or work.limit)


def end_at_random(folder: str, mean_length: int) -> None:
    """Changes a model's weights so that about one token in ``mean_length`` ends a completion.

    The first component of every embedding becomes 1 and stays about the same through the layers, whatever the context
    is. Since embeddings are tied, an addition to the end token's there raises its logit by a constant.
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
    """Records seconds and sampled tokens of each iteration."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.peak = 0.0

    def reward(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """The reward function, which also counts tokens."""
        self.tokens.append(sum(map(len, completion_ids)))
        return reward(completion_ids)

    def begin(self) -> None:
        """Starts an iteration."""
        self.start = time.perf_counter()

    def end(self) -> None:
        """Ends an iteration."""
        wait_for(self.device)
        self.times.append(time.perf_counter() - self.start)
        self.peak = peak_mib(self.device)


def ours(arguments: argparse.Namespace, prompts: list[dict[str, str]], work: Workload, clock: Clock) -> dict[str, Any]:
    """Trains with our GRPO or PPO; profiling the last iteration gives the share of matrix products."""
    import lightning
    from torch.profiler import ProfilerActivity, profile

    from rlhf_lightning.datamodules import PromptDataModule
    from rlhf_lightning.modules import GRPOModule, PPOModule

    profiler = profile(activities=[ProfilerActivity.CPU])
    last = arguments.steps  # an extra iteration, which is not timed

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
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if arguments.precision == "bf16" else "32-true",
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
        "sampling": {"min_new_tokens": 0 if work.mean_length else work.limit},
    }

    # The profiled iteration comes last, on the first prompts again.
    kind: Any = PPOModule if arguments.ours == "ppo" else GRPOModule
    train = prompts + prompts[: arguments.prompts if arguments.profile else 0]
    trainer.fit(
        kind(arguments.folder, **options),
        PromptDataModule(train=train, global_batch_size=arguments.prompts, shuffle=False),
    )

    # Tokens of the profiled iteration do not count.
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

    # The same batch as ours, with the gradient accumulated over ``parts``.
    parts = SETTINGS[arguments.side]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.prompts * arguments.samples // parts,
        gradient_accumulation_steps=parts,
        num_generations=arguments.samples,
        max_completion_length=work.limit,
        generation_kwargs={} if work.mean_length else {"min_new_tokens": work.limit},
        shuffle_dataset=False,
        use_cpu=arguments.device == "cpu",
        bf16=arguments.precision == "bf16",
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
    work = workload_of(arguments, arguments.workloads[0])
    asked = random_prompts(arguments.prompts * arguments.steps, "gsm8k", 1, SHAPES[arguments.shape].vocab)
    prompts = [{"prompt": prompt} for prompt, _ in asked]
    clock, found = Clock(arguments.device), {}
    if arguments.side in SETTINGS:
        theirs(arguments, prompts, work, clock)
    else:
        found = ours(arguments, prompts, work, clock)
    # Lengths differ between iterations: compare totals.
    seconds, tokens = sum(clock.times[1:]), sum(clock.tokens[1:])
    found |= {
        "seconds": seconds / len(clock.times[1:]),
        "tokens_per_s": tokens / seconds,
        "peak_mib": clock.peak,
    }
    print("RESULT " + json.dumps(found))


def product_rate() -> float:
    """GFLOP/s of a product of 2,048 tokens with a weight of the model's feed-forward layer."""
    shape = SHAPES["small"]
    tokens, weight = torch.randn(2048, shape.hidden), torch.randn(shape.intermediate, shape.hidden)
    best = math.inf
    for _ in range(30):
        start = time.perf_counter()
        tokens @ weight.T
        best = min(best, time.perf_counter() - start)
    return 2 * len(tokens) * weight.numel() / best / 1e9


def measure(arguments: argparse.Namespace, workload: str, side: str, number: int) -> Figures:
    """Runs one side in a separate process."""
    command = ["--workloads", workload, "--side", side, "--seed", str(number)]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("folder", *SHARED)]
    # Summarizing a profile of hundreds of short decoding steps takes longer than the run itself.
    on_cpu = arguments.device == "cpu"
    if side == OURS and number == arguments.pairs - 1 and workload == "equal" and on_cpu:
        command.append("--profile")
    return run_child(__file__, command, arguments.threads)


def main() -> None:
    """Prints a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="of TRL's to try")
    parser.add_argument("--ours", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="iterations per run, the first not counted")
    parser.add_argument("--prompts", type=int, default=4, help="per iteration")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--limit", type=int, default=0, help="tokens of a completion at most (0: the workload's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: mixed, on both sides")
    for hidden in ("--side", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    # A child measures one side.
    if arguments.side:
        child(arguments)
        return

    torch.set_num_threads(arguments.threads)
    print(f"matrix products of the small model's feed-forward layer run at {product_rate():.0f} GFLOP/s on this CPU")
    for workload in arguments.workloads:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), SHAPES[arguments.shape], arguments.device)
            if WORKLOADS[workload].mean_length:
                end_at_random(folder, WORKLOADS[workload].mean_length or 1)
            arguments.folder = folder
            limit = workload_of(arguments, workload).limit
            shape = f"{arguments.prompts} prompts x {arguments.samples}, at most {limit} tokens"
            compare(
                partial(measure, arguments, workload),
                arguments.settings,
                arguments.pairs,
                f"{arguments.ours}, an iteration, {workload}: {shape}; sampled tokens",
            )


if __name__ == "__main__":
    main()
