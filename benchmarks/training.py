"""Training speed and memory beside TRL: one process after another on the same rows, model, batch and threads.

Each side runs in a process of its own; pairs of processes alternate, and the median of the pairwise ratios is printed.
Peak memory is the process's largest resident set, libraries included. The peer runs as it is fastest: without gradient
checkpointing, in full precision, without truncation. ``trl-split`` accumulates the same batch from a quarter of its
rows at a time, which pads less. A batch is eight rows: eight pairs, or the halves of four for KTO. With ``--ranked 4``
every prompt has four completions in order of merit, two prompts to a batch: pairs are all six of them, as in Ouyang et
al. (2022), and single rows all four. With ``--ranked 1`` no two single rows have the same prompt.

    python benchmarks/training.py dpo            # needs: pip install trl==1.16.0
    python benchmarks/training.py reward --lengths chat --ranked 4 --pairs 5
    python benchmarks/training.py simpo --lengths summaries --sides trl  # also: sft, kto
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, HIDDEN, LAYERS, BATCH, PROMPTS = 32768, 384, 8, 8, 2
BLOCK, BLOCKS = 1024, 2  # packed blocks hold about as many tokens as a batch of rows, without padding
Row = dict[str, Any]
Asked = tuple[str, list[str]]  # a prompt and its completions, the best one first

# Median, spread of the logarithm, least and most tokens: of prompts, then of completions.
LENGTHS = {
    "gsm8k": ((58, 0.35, 20, 180), (105, 0.40, 30, 320)),  # those of GSM8K's problems and solutions
    "summaries": ((300, 0.40, 80, 512), (36, 0.20, 24, 48)),  # posts and summaries: Stiennon et al. (2020)
    "chat": ((150, 0.90, 10, 1000), (150, 0.70, 10, 800)),  # both with the long tails of conversations
}


@dataclass(frozen=True)
class Peer:
    """One of TRL's trainers, with the options in which it differs from the others."""

    trainer: str
    config: str
    module: str = "trl"
    model: str = "AutoModelForCausalLM"
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: {"max_length": None})
    packed: bool = False
    accumulated: int = 1  # the batch comes in so many parts


@dataclass(frozen=True)
class Method:
    """A module and datamodule of ours, what its rows look like, and who else trains on them."""

    module: str
    datamodule: str
    rows: Callable[[list[Asked]], list[Row]]
    peers: dict[str, Peer]


def with_split(peer: Peer) -> dict[str, Peer]:
    """A trainer on whole batches, and on a quarter at a time."""
    return {"trl": peer, "trl-split": replace(peer, accumulated=4)}


def pairs(asked: list[Asked]) -> list[Row]:
    """All pairs of a prompt's completions."""
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for prompt, answers in asked
        for better, worse in combinations(answers, 2)
    ]


def demonstrations(asked: list[Asked]) -> list[Row]:
    """The best completions alone."""
    return [{"prompt": prompt, "completion": answers[0]} for prompt, answers in asked]


def verdicts(asked: list[Asked]) -> list[Row]:
    """All completions, of which the better half is desirable; single ones are so in turn."""
    return [
        {
            "prompt": prompt,
            "completion": answer,
            "label": place < len(answers) / 2 and (len(answers) > 1 or number % 2 == 0),
        }
        for number, (prompt, answers) in enumerate(asked)
        for place, answer in enumerate(answers)
    ]


METHODS = {
    "dpo": Method("DPOModule", "PreferenceDataModule", pairs, with_split(Peer("DPOTrainer", "DPOConfig"))),
    "sft": Method(
        "SFTModule",
        "SFTDataModule",
        demonstrations,
        {
            "trl": Peer("SFTTrainer", "SFTConfig"),
            "trl-packed": Peer(
                "SFTTrainer",
                "SFTConfig",
                options={"per_device_train_batch_size": BLOCKS, "packing": True, "max_length": BLOCK},
                packed=True,
            ),
        },
    ),
    "reward": Method(
        "RewardModule",
        "PreferenceDataModule",
        pairs,
        with_split(
            Peer(
                "RewardTrainer",
                "RewardConfig",
                model="AutoModelForSequenceClassification",
                model_options={"num_labels": 1},
            )
        ),
    ),
    "simpo": Method(
        "SimPOModule",
        "PreferenceDataModule",
        pairs,
        with_split(
            Peer(
                "CPOTrainer",
                "CPOConfig",
                module="trl.experimental.cpo",
                # Without a length it would cut at 512; alpha would add the loss of CPO.
                options={"max_length": 2048, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
            )
        ),
    ),
    "kto": Method("KTOModule", "UnpairedDataModule", verdicts, with_split(Peer("KTOTrainer", "KTOConfig"))),
}


def random_prompts(count: int, lengths: str, ranked: int) -> list[Asked]:
    """Random words: prompts and their completions."""
    prompt, completion = LENGTHS[lengths]
    rng = np.random.default_rng(0)

    def text(median: float, spread: float, least: int, most: int) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), spread), least, most))
        return " ".join(f"w{n}" for n in rng.integers(10, VOCAB - 10, size=length))

    return [(text(*prompt), [text(*completion) for _ in range(ranked)]) for _ in range(count)]


def write_model(folder: Path) -> None:
    """A Qwen3-shaped random model and a tokenizer of whole words, one token each."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, VOCAB)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def ours(method: Method, folder: str, data: list[Row], steps: int, batch: int, budget: int) -> list[float]:
    """Seconds of each step."""
    import lightning

    times: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            times.append(time.perf_counter() - self.start)

    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    module = getattr(import_module("rlhf_lightning.modules"), method.module)
    datamodule = getattr(import_module("rlhf_lightning.datamodules"), method.datamodule)
    trainer.fit(
        module(folder, micro_batch_tokens=budget), datamodule(train=data, global_batch_size=batch, shuffle=False)
    )
    return times


def theirs(peer: Peer, folder: str, data: list[Row], steps: int, batch: int) -> list[float]:
    """Seconds of each step of TRL's trainer."""
    import torch
    import transformers
    from datasets import Dataset

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)

    model = getattr(transformers, peer.model).from_pretrained(folder, dtype=torch.float32, **peer.model_options)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": batch // peer.accumulated,
        "gradient_accumulation_steps": peer.accumulated,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    trl = import_module(peer.module)
    # TRL joins the texts of prompt and completion; without a blank their words would be one.
    spaced = [
        {name: f" {v}" if name in ("completion", "chosen", "rejected") else v for name, v in row.items()}
        for row in data
    ]
    getattr(trl, peer.trainer)(
        model=model,
        args=getattr(trl, peer.config)(**options | peer.options),
        train_dataset=Dataset.from_list(spaced),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    ).train()
    return times


def num_tokens(row: Row) -> int:
    """The tokens of a row, each completion's end included, a prompt counted once."""
    texts = [value for value in row.values() if isinstance(value, str)]
    return sum(len(text.split()) for text in texts) + len(texts) - 1


def child(arguments: argparse.Namespace) -> None:
    """Runs one side and prints a line of JSON."""
    import torch

    torch.set_num_threads(arguments.threads)
    method = METHODS[arguments.method]
    peer = method.peers.get(arguments.side)
    packed = peer is not None and peer.packed
    each = len(method.rows([("", [""] * arguments.ranked)]))  # rows of a prompt
    batch = BATCH if arguments.ranked <= 2 else PROMPTS * each
    count = batch // each * arguments.steps * (4 if packed else 1)
    data = method.rows(random_prompts(count, arguments.lengths, arguments.ranked))
    if peer is None:
        times = ours(method, arguments.folder, data, arguments.steps, batch, arguments.micro_batch_tokens)
    else:
        times = theirs(peer, arguments.folder, data, arguments.steps, batch)
    tokens = BLOCKS * BLOCK if packed else statistics.mean(map(num_tokens, data)) * batch
    seconds = statistics.median(times[2:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_mib": peak}))


def measure(arguments: argparse.Namespace, side: str) -> dict[str, float]:
    """Runs one side in a process of its own."""
    command = [sys.executable, __file__, arguments.method, "--side", side, "--folder", arguments.folder]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads), "--lengths", arguments.lengths]
    command += ["--ranked", str(arguments.ranked), "--micro_batch_tokens", str(arguments.micro_batch_tokens)]
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    """Alternates the sides and prints medians and pairwise ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per run, the first two not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", choices=LENGTHS, default="gsm8k")
    parser.add_argument("--ranked", type=int, default=2, help="completions per prompt")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=8192, help="ours: a memory knob, as it comes by default"
    )
    parser.add_argument("--sides", nargs="*", help="which peers (default: all)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranked < 1 or not METHODS[arguments.method].rows([("", [""] * arguments.ranked)]):
        parser.error(
            f"--ranked {arguments.ranked} gives {arguments.method} no rows: pairs need 2 completions, others 1"
        )
    if arguments.side:
        child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        arguments.folder = folder
        sides = ["ours", *(METHODS[arguments.method].peers if arguments.sides is None else arguments.sides)]
        results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(arguments.pairs):
            for side in sides:
                results[side].append(measure(arguments, side))
                print(f"  {side:12s} {results[side][-1]}", flush=True)
    print(f"\n{arguments.method}, medians of {arguments.pairs}:")
    for side in sides:
        median = {key: statistics.median(r[key] for r in results[side]) for key in results[side][0]}
        line = f"{side:12s} {median['seconds']:.2f} s/step {median['tokens_per_s']:.0f} tokens/s"
        line += f" {median['peak_mib']:.0f} MiB"
        if side != "ours":
            both = list(zip(results["ours"], results[side], strict=True))
            speed = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in both)
            memory = statistics.median(a["peak_mib"] / b["peak_mib"] for a, b in both)
            line += f"   ours: {speed:.2f}x as fast, {memory:.2f}x the memory"
        print(line)


if __name__ == "__main__":
    main()
