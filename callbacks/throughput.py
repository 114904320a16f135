"""Measures training speed, the time of each phase, and memory."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import lightning
import torch
from torch import nn

from ..core import PostTrainingModule
from ..core.timing import PhaseClock, Work
from ..distributed.collectives import gather_objects
from ..inference.telemetry import Telemetry
from ..models import base_model
from ..rl.on_policy_module import OnPolicyModule

# Dense TFLOP/s by the vendors' data sheets: bf16 or fp16, tf32, fp32. The first name that occurs as whole words in the
# driver's name of the device counts.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2500.0, 1250.0, 80.0)),
    ("B200", (2250.0, 1125.0, 75.0)),
    ("GH200", (989.4, 494.7, 67.0)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H200", (989.4, 494.7, 67.0)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100 PCIe", (756.0, 378.0, 51.0)),
    ("H100", (989.4, 494.7, 67.0)),
    ("H800", (989.4, 494.7, 67.0)),
    ("A100", (312.0, 156.0, 19.5)),
    ("A800", (312.0, 156.0, 19.5)),
    ("A10G", (70.0, 35.0, 35.0)),
    ("A10", (125.0, 62.5, 31.2)),
    ("A40", (149.7, 74.8, 37.4)),
    ("RTX A6000", (154.8, 77.4, 38.7)),
    ("RTX 6000 Ada", (364.2, 182.1, 91.1)),
    ("L40S", (362.0, 183.0, 91.6)),
    ("L40", (181.0, 90.5, 90.5)),
    ("L4", (121.0, 60.0, 30.3)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71.0, 35.6, 35.6)),
    ("V100", (125.0, 15.7, 15.7)),
    ("T4", (65.0, 8.1, 8.1)),
    ("MI300X", (1307.4, 653.7, 163.4)),
)
# Words that make another device of a name: less than the whole, or another chip.
_OTHER = re.compile(r"\b(Ti|D|SUPER|Laptop|Max-Q|MIG)\b")
_FETCH = "train_dataloader_next"  # Lightning's profiler action while it waits for a batch


def peak_flops_of(name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Returns the peak floating-point operations per second of a GPU; ``None`` if unknown.

    Args:
        name: the result of ``torch.cuda.get_device_name``.
        precision: the trainer's, such as ``bf16-mixed``.
        tf32: whether products of fp32 matrices may be computed in tf32.

    Example:
        >>> peak_flops_of("NVIDIA H200", "bf16-mixed")
        989400000000000.0
    """
    if "64" in precision or _OTHER.search(name):
        return None
    # fp32 uses the TF32 units only if the user has allowed it.
    column = 0 if "16" in precision else 1 if tf32 else 2
    # As words: an RTX A1000 is no A100.
    found = (peaks for gpu, peaks in _PEAKS if re.search(rf"(?<![a-z0-9]){gpu}(?![a-z0-9])", name, re.IGNORECASE))
    return next((1e12 * peaks[column] for peaks in found), None)


def flops_per_token(model: nn.Module, length: float) -> float:
    """Counts floating-point operations per token of a forward and backward (PaLM, arXiv:2204.02311, appendix B).

    6N + 12 L H Q T: N weights, L layers of H heads of size Q, sequences of T tokens. Attention is counted as if a token
    saw the whole sequence, and recomputation to save memory is not counted. Departures: a frozen weight has no
    gradient, so it costs 4 instead of 6; of a mixture's experts, only the ones that a token is routed to count.

    Args:
        model: a causal language model, also one with adapters.
        length: T, above 0.
    """
    config: Any = base_model(model).config.get_text_config()
    heads = config.num_attention_heads
    # Some models have heads of another size than hidden_size / heads.
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    weights = 0.0
    for name, parameter in model.named_parameters():
        stored: Any = getattr(parameter, "quant_state", None)  # of 4 bits: two weights in a byte
        # A frozen weight has no gradient of its own: 4 operations per token instead of 6.
        count = parameter.numel() if stored is None else math.prod(stored.shape)
        weights += (6 if parameter.requires_grad else 4) * count * (share if ".experts." in name else 1.0)
    return weights + float(12 * config.num_hidden_layers * heads * size) * length


class Throughput(lightning.Callback):
    """Logs speed, utilisation, savings of packing, memory, and the seconds of each phase, whenever metrics are logged.

    Values cover the batches since the last log, over all ranks: counts are summed, times are the longest of a rank. A
    batch's time is from its request to the end of its last step, without validation, exports and checkpoints.

    - ``throughput/tokens_per_second``: tokens that went forward and backward; no padding, a shared prompt once.
    - ``throughput/examples_per_second``: rows of the batches; for GRPO and PPO, prompts.
    - ``throughput/generated_tokens_per_second``: for GRPO and PPO, during generation.
    - ``throughput/mfu``: model-flops utilisation (``flops_per_token``): flops of training over the whole time.
      References, second passes without gradient and sampling take time but do not count.
    - ``throughput/padding_saved``: share of tokens saved compared with padding micro-batches to their longest sequence.
    - ``throughput/prefix_saved``: share of tokens saved compared with repeating the prompt for each completion.
    - ``memory/peak_gib``: the peak so far of a rank: of tensors on CUDA, of the process elsewhere.
    - ``time/data``, ``time/generate``, ``time/score`` (references, rewards, values), ``time/forward_backward``,
      ``time/step`` (gradients over ranks, clipping, the optimizer), ``time/other``: seconds of a batch, and
      ``time/batch``, their sum on one rank.
    - ``time/prefill``, ``time/decode``, ``generation/...``: for GRPO and PPO, the phases of ``time/generate`` and its
      counts per batch (``inference.telemetry.Telemetry``).

    On CUDA, phases are timed by events; only logging synchronises with the device.

    Args:
        peak_flops: peak floating-point operations per second of one device, above 0; if omitted, that of known GPUs,
            and no ``throughput/mfu`` on others.
        every_n_batches: batches between two logs, at least 1; the trainer's ``log_every_n_steps`` if omitted.

    Raises:
        ValueError: a number out of range, or a module that is not a ``PostTrainingModule``.

    Example::

        lightning.Trainer(callbacks=[Throughput()]).fit(module, data)
    """

    def __init__(self, peak_flops: float | None = None, every_n_batches: int | None = None) -> None:
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise ValueError(
                f"peak_flops is {peak_flops}; it must be a finite number above 0 (989e12 for an H100 in bf16)"
            )
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"every_n_batches is {every_n_batches}; it must be at least 1 (null: log_every_n_steps)")
        self.peak_flops = peak_flops
        self.every_n_batches = every_n_batches
        self._clock: PhaseClock | None = None
        self._data: Any = None  # the open phase while a batch is fetched
        self._before = self._sampled = Telemetry()  # of the engine when the batch began, and of the batches so far

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attaches the clock to the module and to the trainer's profiler."""
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"Throughput needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        self._detach(trainer, pl_module)  # a run that was rewound begins again
        self._clock = PhaseClock(pl_module.device)
        pl_module.clock = self._clock
        profiler = _profiler(trainer)
        start, stop = profiler.start, profiler.stop

        # Lightning has no hook before a batch is fetched, but it tells its profiler.
        def start_too(action_name: str) -> None:
            if action_name.endswith(_FETCH):
                self._fetch()
            start(action_name)

        def stop_too(action_name: str) -> None:
            stop(action_name)
            if action_name.endswith(_FETCH):
                self._fetched()

        profiler.start, profiler.stop = start_too, stop_too

    def _fetch(self) -> None:
        assert self._clock is not None
        self._clock.begin()
        self._data = self._clock.phase("data")
        self._data.__enter__()

    def _fetched(self) -> None:
        if self._data is not None:
            self._data.__exit__(None, None, None)
            self._data = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes what sampling has cost so far, in validation too."""
        if isinstance(pl_module, OnPolicyModule):
            self._before = Telemetry.of(pl_module.engine)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the batch, and logs the batches since the last log if a log is due."""
        assert self._clock is not None
        self._clock.end(examples=len(batch))
        if isinstance(pl_module, OnPolicyModule):
            self._sampled = self._sampled.plus(Telemetry.of(pl_module.engine).since(self._before))
        every = self.every_n_batches or int(vars(trainer)["log_every_n_steps"])
        # As Lightning counts, so that both log at once.
        if every and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0:
            assert isinstance(pl_module, PostTrainingModule)
            pl_module.log_dict(self._measure(trainer, pl_module, self._clock.take()), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Detaches the clock."""
        self._detach(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Detaches the clock."""
        self._detach(trainer, pl_module)

    def _detach(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._clock is None or not isinstance(pl_module, PostTrainingModule):
            return
        self._clock = pl_module.clock = None
        for name in ("start", "stop"):
            vars(_profiler(trainer)).pop(name, None)

    def _measure(self, trainer: lightning.Trainer, module: PostTrainingModule, local_work: Work) -> dict[str, float]:
        ranks: list[tuple[Work, float]] = gather_objects((local_work, _peak_memory(module.device)))
        works = [work for work, _ in ranks]
        # The slowest rank decides how long a phase takes.
        seconds = {name: max(work.seconds[name] for work in works) for name in local_work.seconds}
        total = max(sum(work.seconds.values()) for work in works)

        def added(name: str) -> int:
            return sum(getattr(work, name) for work in works)

        repeated, padded = added("unshared_tokens"), added("padded_tokens")
        # In the padded layout, a model repeats prompts and computes the padding.
        packed = module.layout == "packed"
        tokens = added("tokens") if packed else repeated
        values = {
            "throughput/tokens_per_second": tokens / total,
            "throughput/examples_per_second": added("examples") / total,
            "memory/peak_gib": max(memory for _, memory in ranks) / 2**30,
            "time/batch": total / local_work.batches,
        }
        values |= {f"time/{name}": value / local_work.batches for name, value in seconds.items()}

        # Without any token there is nothing to compare.
        if repeated:
            values["throughput/padding_saved"] = 1 - repeated / padded if packed else 0.0
            values["throughput/prefix_saved"] = 1 - tokens / repeated
        if generated := added("generated_tokens"):
            values["throughput/generated_tokens_per_second"] = generated / seconds["generate"]
        if isinstance(module, OnPolicyModule):
            sampled: list[Telemetry] = gather_objects(self._sampled)
            values |= Telemetry.over_ranks(sampled).metrics(local_work.batches)
            self._sampled = Telemetry()
        peak = self._peak(trainer, module.device)
        if peak is not None and repeated:
            flops = tokens * flops_per_token(module.model, added("squared_lengths") / repeated)
            values["throughput/mfu"] = flops / (total * peak * len(works))
        return values

    def _peak(self, trainer: lightning.Trainer, device: torch.device) -> float | None:
        if self.peak_flops is not None or device.type != "cuda":
            return self.peak_flops
        tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
        return peak_flops_of(torch.cuda.get_device_name(device), str(trainer.precision), tf32=tf32)


def _profiler(trainer: Any) -> Any:
    return trainer.profiler


def _peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # missing on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
