"""Training speed and memory compared with TRL: the same rows, model, batch and threads.

TRL runs *as it comes*, with the whole batch on the device at once, and *at its best*: each number of rows per device
(8, 4, 2, 1, gradients accumulated to the same batch; for SFT also packed) is tried once, and the fastest is compared.
Both run without gradient checkpointing and truncation, in the precision of ``--precision``; ours with its defaults.
Each run is a separate process; ours and the two settings alternate, and medians of the pairwise ratios are printed.
Peak memory is the process's largest resident set, libraries included. A batch is eight rows: eight pairs, or the halves
of four for KTO. With ``--ranked 4`` every prompt has four completions in order of merit, two prompts to a batch: pairs
are all six of them, as in Ouyang et al. (2022), and single rows all four. With ``--ranked 1`` no two single rows have
the same prompt.

    python benchmarks/training.py dpo            # needs: pip install trl==1.16.0
    python benchmarks/training.py reward --lengths chat --ranked 4 --pairs 5
    python benchmarks/training.py simpo --lengths summaries  # also: sft, kto
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sides import compare, peak_mib, run_child, wait_for


class Shape(NamedTuple):
    """Sizes of a model."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


# Qwen3's shape: the size of all reported figures, one with 1.5 billion weights for GPUs, and one for rehearsals.
SHAPES = {
    "small": Shape(vocab=32768, hidden=384, intermediate=1024, layers=8, heads=6, kv_heads=2, head_dim=64),
    "1.5b": Shape(vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_dim=128),
    "tiny": Shape(vocab=512, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=16),
}
BATCH, PROMPTS = 8, 2
BLOCK, BLOCKS = 1024, 2  # packed blocks hold about as many tokens as a batch of rows, without padding
Row = dict[str, Any]
Asked = tuple[str, list[str]]  # a prompt and its completions, the best one first

# Median, spread of the logarithm, least and most tokens: of prompts, then of completions.
LENGTHS = {
    "gsm8k": ((58, 0.35, 20, 180), (105, 0.40, 30, 320)),  # GSM8K's problems and solutions
    "summaries": ((300, 0.40, 80, 512), (36, 0.20, 24, 48)),  # posts and summaries: Stiennon et al. (2020)
    "chat": ((150, 0.90, 10, 1000), (150, 0.70, 10, 800)),  # both with the long tails of conversations
}


@dataclass(frozen=True)
class Peer:
    """A trainer of TRL, with its specific options."""

    trainer: str
    config: str
    module: str = "trl"
    model: str = "AutoModelForCausalLM"
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: {"max_length": None})
    packed: bool = False
    per_device: int | None = None  # rows on the device at once; None: the whole batch


@dataclass(frozen=True)
class Method:
    """A module and datamodule of ours, the rows that they train on, and the peers to compare with."""

    module: str
    datamodule: str
    rows: Callable[[list[Asked]], list[Row]]
    peers: dict[str, Peer]


def by_rows(peer: Peer) -> dict[str, Peer]:
    """A trainer with whole batches on the device, and with fewer rows at a time, which pads less."""
    return {"trl": peer, **{f"trl-{rows}": replace(peer, per_device=rows) for rows in (4, 2, 1)}}


def pairs(asked: list[Asked]) -> list[Row]:
    """Makes all pairs of a prompt's completions."""
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for prompt, answers in asked
        for better, worse in combinations(answers, 2)
    ]


def demonstrations(asked: list[Asked]) -> list[Row]:
    """Takes only the best completions."""
    return [{"prompt": prompt, "completion": answers[0]} for prompt, answers in asked]


def verdicts(asked: list[Asked]) -> list[Row]:
    """Labels the better half of a prompt's completions desirable; single ones alternate."""
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
    "dpo": Method("DPOModule", "PreferenceDataModule", pairs, by_rows(Peer("DPOTrainer", "DPOConfig"))),
    "sft": Method(
        "SFTModule",
        "SFTDataModule",
        demonstrations,
        by_rows(Peer("SFTTrainer", "SFTConfig"))
        | {
            f"trl-packed-{blocks}": Peer(
                "SFTTrainer",
                "SFTConfig",
                options={"packing": True, "max_length": BLOCK},
                packed=True,
                per_device=blocks,
            )
            for blocks in (BLOCKS, 1)
        },
    ),
    "reward": Method(
        "RewardModule",
        "PreferenceDataModule",
        pairs,
        by_rows(
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
        by_rows(
            Peer(
                "CPOTrainer",
                "CPOConfig",
                module="trl.experimental.cpo",
                # Without a length it would cut at 512; alpha would add the loss of CPO.
                options={"max_length": 2048, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
            )
        ),
    ),
    "kto": Method("KTOModule", "UnpairedDataModule", verdicts, by_rows(Peer("KTOTrainer", "KTOConfig"))),
}


def random_prompts(count: int, lengths: str, ranked: int, vocab: int = SHAPES["small"].vocab) -> list[Asked]:
    """Draws prompts and completions of random words."""
    prompt, completion = LENGTHS[lengths]
    rng = np.random.default_rng(0)

    def text(median: float, spread: float, least: int, most: int) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), spread), least, most))
        return " ".join(f"w{n}" for n in rng.integers(10, vocab - 10, size=length))

    return [(text(*prompt), [text(*completion) for _ in range(ranked)]) for _ in range(count)]


def write_model(folder: Path, shape: Shape = SHAPES["small"], device: str = "cpu") -> None:
    """Writes a random model, in bf16 on a GPU, and a tokenizer of whole words, one token each."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, shape.vocab)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def ours(method: Method, data: list[Row], batch: int, arguments: argparse.Namespace) -> list[float]:
    """Trains with our module; returns the seconds of each step."""
    import lightning

    times: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            wait_for(arguments.device)
            times.append(time.perf_counter() - self.start)

    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if arguments.precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    module = getattr(import_module("rlhf_lightning.modules"), method.module)
    datamodule = getattr(import_module("rlhf_lightning.datamodules"), method.datamodule)
    trainer.fit(
        module(arguments.folder, micro_batch_tokens=arguments.micro_batch_tokens),
        datamodule(train=data, global_batch_size=batch, shuffle=False),
    )
    return times


def theirs(peer: Peer, data: list[Row], batch: int, arguments: argparse.Namespace) -> list[float]:
    """Trains with TRL's trainer; returns the seconds of each step."""
    import torch
    import transformers
    from datasets import Dataset

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wait_for(arguments.device)
            times.append(time.perf_counter() - self.start)

    # The same global batch as ours, with gradients accumulated where a setting has fewer rows on the device.
    model = getattr(transformers, peer.model).from_pretrained(
        arguments.folder, dtype=torch.float32, **peer.model_options
    )
    whole = BLOCKS if peer.packed else batch
    per_device = min(peer.per_device or whole, whole)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": whole // per_device,
        "use_cpu": arguments.device == "cpu",
        "use_liger_kernel": arguments.liger,
        "bf16": arguments.precision == "bf16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }

    trl = import_module(peer.module)
    # TRL joins the texts of prompt and completion; without a blank two words would merge.
    spaced = [
        {name: f" {v}" if name in ("completion", "chosen", "rejected") else v for name, v in row.items()}
        for row in data
    ]
    getattr(trl, peer.trainer)(
        model=model,
        args=getattr(trl, peer.config)(**options | peer.options),
        train_dataset=Dataset.from_list(spaced),
        processing_class=transformers.AutoTokenizer.from_pretrained(arguments.folder),
        callbacks=[Clock()],
    ).train()
    return times


def num_tokens(row: Row) -> int:
    """Number of tokens of a row, each completion's end included, the prompt counted once."""
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
    batch = arguments.batch if arguments.ranked <= 2 else PROMPTS * each
    count = batch // each * arguments.steps * (4 if packed else 1)
    vocab = SHAPES[arguments.shape].vocab
    data = method.rows(random_prompts(count, arguments.lengths, arguments.ranked, vocab))
    times = ours(method, data, batch, arguments) if peer is None else theirs(peer, data, batch, arguments)
    tokens = BLOCKS * BLOCK if packed else statistics.mean(map(num_tokens, data)) * batch
    seconds = statistics.median(times[2:])
    figures = {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_mib": peak_mib(arguments.device)}
    print("RESULT " + json.dumps(figures))


def main() -> None:
    """Compares ours with TRL's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per run, the first two not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", choices=LENGTHS, default="gsm8k")
    parser.add_argument("--ranked", type=int, default=2, help="completions per prompt")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: mixed, on both sides")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=8192, help="ours: a memory knob, as it comes by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step; two prompts where more are ranked")
    parser.add_argument("--liger", action="store_true", help="the peer's fused kernels, for CUDA")
    parser.add_argument("--settings", nargs="*", help="which of the peer's to try (default: all)")
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
        write_model(Path(folder), SHAPES[arguments.shape], arguments.device)
        names = ("steps", "threads", "lengths", "ranked", "precision", "micro_batch_tokens", "device", "shape", "batch")
        shared = [f"--{name}={getattr(arguments, name)}" for name in names] + ["--liger"] * arguments.liger
        settings = list(METHODS[arguments.method].peers) if arguments.settings is None else arguments.settings
        compare(
            lambda side, _: run_child(
                __file__, [arguments.method, "--side", side, "--folder", folder, *shared], arguments.threads
            ),
            settings,
            arguments.pairs,
            f"{arguments.method}, a step, {arguments.precision}, lengths of {arguments.lengths}",
        )


if __name__ == "__main__":
    main()
