"""Host memory of loading and training on one rank, and sharded over several with ``strategy: fsdp2``.

    python benchmarks/sharding.py                      # 1 rank, then 2
    python benchmarks/sharding.py --ranks 4 --layers 24

Reports resident memory above that of the process before loading, so that libraries do not count. All of a rank's
memory is on the host here; on GPUs only rank 0 holds weights on the host, and only while it loads.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

MIB = 1 << 20


def resident(field: str) -> float:
    """``VmRSS`` (current) or ``VmHWM`` (peak since the last reset) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def reset_peak() -> None:
    """Resets ``VmHWM``."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def worker(folder: str, strategy: str, tokens: int) -> None:
    """Trains two steps on this rank, and records its memory."""
    import lightning
    import numpy as np
    import torch

    from rlhf_lightning import SFTModule
    from rlhf_lightning.sequences import Example, ExampleBatch, Segment

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    figures: dict[str, float] = {}

    class Meter(lightning.Callback):
        def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
            reset_peak()
            figures["before"] = resident("VmRSS")

        def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            figures["load"] = resident("VmHWM") - figures["before"]
            figures["loaded"] = resident("VmRSS") - figures["before"]
            reset_peak()

        def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            figures["train"] = resident("VmHWM") - figures["before"]

    # Every rank gets its share of the same two rows.
    rng = np.random.default_rng(0)
    completion = rng.integers(3, 1000, size=tokens)
    rows = [Example(f"row:{n}", Segment([1, 2], children=(Segment(completion, np.ones(tokens)),))) for n in range(2)]
    batch = ExampleBatch(rows[rank::world])

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=2,
        callbacks=[Meter()],
        use_distributed_sampler=False,
        enable_model_summary=False,
        **options,
    )

    # The token budget is one row per micro-batch.
    torch.set_num_threads(1)
    trainer.fit(SFTModule(folder, micro_batch_tokens=tokens + 2), torch.utils.data.DataLoader([batch], batch_size=None))
    (Path(folder) / f"{strategy}-{rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def build(folder: Path, layers: int, width: int, vocabulary: int) -> float:
    """Writes a random model; returns its size in fp32, in MiB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = max(1, width // 64)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    size: float = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    return size


def measure(folder: str, strategy: str, ranks: int, tokens: int) -> list[dict[str, float]]:
    """Runs the worker on every rank; returns the measurements of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--worker", folder, "--strategy", strategy, "--tokens", str(tokens)]
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    # Otherwise glibc keeps the freed buffers of gathered layers, which a GPU's allocator would not count.
    env["MALLOC_MMAP_THRESHOLD_"] = "262144"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads((Path(folder) / f"{strategy}-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def main() -> None:
    """Measures and prints memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.strategy, given.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = build(Path(folder), given.layers, given.width, given.vocabulary)
        print(f"model: {size:.0f} MiB in fp32")
        for strategy, ranks in (("auto", 1), ("ddp", given.ranks), ("fsdp2", given.ranks)):
            rows = measure(folder, strategy, ranks, given.tokens)
            load, loaded = (sum(row[name] for row in rows) for name in ("load", "loaded"))
            train = max(row["train"] for row in rows)
            print(
                f"{strategy:>5} x{ranks}: loading {load:.0f} MiB on all ranks ({load / size:.2f} copies), "
                f"{loaded:.0f} afterwards; training at most {train:.0f} MiB a rank ({train / size:.2f} copies)"
            )


if __name__ == "__main__":
    main()
