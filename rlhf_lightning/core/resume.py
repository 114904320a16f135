"""Exact resume: what a checkpoint holds beside weights and optimizer, and what it leaves out.

A resumed run is the run that was not interrupted: the random states of torch, CUDA, numpy and python are saved for each
rank and come back where training goes on. Where an adapter is trained, a checkpoint holds the adapter and what else is
trained; the frozen weights are loaded from where they came, after a look at whether they are still the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from peft import PeftModel
from torch import Tensor, nn

from ..distributed.collectives import gather_objects
from ..models.reference import ADAPTER_COPY
from .micro_batching import MicroBatchedModule

_KEY = "post_training"  # of what is ours in a checkpoint
# What a config says about how a model was loaded, and not about what it computes.
_NOT_THE_MODEL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "use_cache"}
_EDGE = 32  # values of each weight that a fingerprint looks at


class ResumableModule(MicroBatchedModule):
    """A module whose checkpoints are small, and continue, on CPUs bit for bit.

    At another number of ranks a resumed run cannot be the same one to the bit: rank r takes the random state of rank r,
    and ranks that were not there before draw theirs from that of rank 0.
    """

    model: Any
    model_source: str
    quantization: Literal["nf4", "fp4", "int8"] | None

    def __init__(self, *, micro_batch_tokens: int, share_prefix: bool) -> None:
        super().__init__(micro_batch_tokens=micro_batch_tokens, share_prefix=share_prefix)
        self._base: dict[str, str] = {}
        self.random_before_validation: dict[str, Any] | None = None  # while one is due or runs
        self._loaded_random: dict[str, Any] | None = None
        self._redo_random = False
        self._was_stopped = False
        self.step_before_batch = 0  # optimizer steps before the batch that is being trained on
        self._loaded_metrics: dict[str, Tensor] = {}

    # Random states.

    def on_train_start(self) -> None:
        """Puts back the random states of a checkpoint: whatever setting up has drawn does not count.

        In a new run every rank but the first draws from a random state of its own.
        """
        self._redo_random = self._loaded_random is not None
        if self._loaded_random is not None:
            set_random_state(self._loaded_random, self.device)
        elif self.global_rank > 0:  # ranks that share a seed would drop the same units, each of its own rows
            own, derived = random_state(self.device), _derived_state(random_state(self.device), self.global_rank)
            set_random_state(own | {name: derived[name] for name in ("torch", "cuda")}, self.device)
        if self._was_stopped:  # by early stopping or a guard, just before the checkpoint was made
            self._was_stopped, self.trainer.should_stop = False, True
        # What callbacks monitor and nobody has measured again yet.
        self.trainer.callback_metrics.update({k: v.to(self.device) for k, v in self._loaded_metrics.items()})
        self._loaded_metrics = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Puts them back once more in the middle of an epoch, where a loader that begins anew may have drawn."""
        self.step_before_batch = self.trainer.global_step
        if self._loaded_random is None:
            return
        if self._redo_random and batch_idx > 0:
            set_random_state(self._loaded_random, self.device)
        self._loaded_random, self._redo_random = None, False
        # Lightning counts the last batch twice where a run is resumed at the end of an epoch; what is logged from there
        # on would be a step late.
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def on_validation_epoch_start(self) -> None:
        """Takes note that what validation draws belongs to the run."""
        self._redo_random = False

    # Checkpoints.

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold every weight: not under an adapter, where ``on_load_checkpoint`` checks it."""
        if self._strict_loading is not None:
            return self._strict_loading
        return self.model is not None and not adapted_models(self)

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self._strict_loading = strict_loading

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the random states, and takes out the frozen weights under an adapter."""
        adapted, trainer = bool(adapted_models(self)), self._trainer
        checkpoint[_KEY] = {
            # A validation that has not ended will be run again.
            "random": gather_objects(self.random_before_validation or random_state(self.device)),
            "adapter": adapted,
            "base": self._base,
            "should_stop": trainer is not None and bool(trainer.should_stop) and not is_out_of_time(trainer),
            "metrics": {} if trainer is None else {k: v.cpu() for k, v in trainer.callback_metrics.items()},
        }
        # A sharded checkpoint is a folder that torch fills by the names that are in the module.
        sharded = getattr(getattr(trainer, "strategy", None), "_save_distributed_checkpoint", False)
        if adapted and not sharded:
            left_out = rebuildable_names(self)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in left_out}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is one of this model, and keeps the random states until training starts."""
        self.configure_model()
        state = checkpoint.get(_KEY, {})
        adapted = bool(adapted_models(self))
        self._check_kind(state.get("adapter", adapted), adapted)
        self._check_base(state.get("base", {}))
        if checkpoint.get("state_dict"):
            self._check_weights(checkpoint["state_dict"])
        states = state.get("random")
        if states and self._trainer is not None and self._trainer.state.fn == "fit":
            self._was_stopped = state.get("should_stop", False)
            self._loaded_metrics = state.get("metrics", {})
            rank = self.global_rank
            self._loaded_random = states[rank] if rank < len(states) else _derived_state(states[0], rank)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights like torch's; the model is built first, and under an adapter, frozen ones may be missing."""
        if self.model is None and state_dict:
            self.configure_model()  # strategies that fork hand a trained state to a module that has built nothing
        left_out = rebuildable_names(self)
        if not left_out:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        keys: Any = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing, extra = ([name for name in names if name not in left_out] for names in keys)
        if strict and (missing or extra):
            raise RuntimeError(f"the state dict lacks {missing or 'nothing'} and has {extra or 'nothing'} too many")
        return type(keys)(missing, extra)

    def remember_base(self) -> None:
        """Takes note of the frozen weights under an adapter, as they were loaded."""
        if isinstance(self.model, PeftModel):
            self._base = base_fingerprint(self.model, self.quantization)

    def _check_kind(self, then: bool, now: bool) -> None:
        if then and not now:
            raise ValueError(
                "the checkpoint holds a LoRA adapter alone, and this run trains all weights: set lora to what it was "
                "made with, or start a new run from the exported model"
            )
        if now and not then:
            raise ValueError(
                "the checkpoint holds a whole model, and this run trains a LoRA adapter: leave lora out, or start a "
                "new run from the exported model"
            )

    def _check_base(self, then: dict[str, str]) -> None:
        now = self._base
        if not then or not now:
            return
        if then["quantization"] != now["quantization"]:
            raise ValueError(
                f"the checkpoint's adapter was trained on weights with quantization={then['quantization']}, and this "
                f"run has quantization={now['quantization']}: put back what it was, or start a new run"
            )
        same_weights = then["weights"] == now["weights"] or then["dtype"] != now["dtype"]  # rounded, they differ
        if then["config"] != now["config"] or not same_weights:
            raise ValueError(
                f"the weights in {self.model_source} are not those that the checkpoint's adapter was trained on: "
                "restore them, or start a new run"
            )

    def _check_weights(self, stored: dict[str, Any]) -> None:
        """Compares names and shapes, so that what is wrong is said in a line and not in a list of all weights."""
        left_out = rebuildable_names(self)
        expected = {name: tensor for name, tensor in self.state_dict().items() if name not in left_out}
        wrong = None
        if missing := [name for name in expected if name not in stored]:
            wrong = f"{len(missing)} of this model's weights are not in it, the first {missing[0]!r}"
        elif extra := [name for name in stored if name not in expected and name not in left_out]:
            wrong = f"{len(extra)} of its weights are not in this model, the first {extra[0]!r}"
        else:
            for name, tensor in expected.items():
                shapes = [list(getattr(value, "shape", ())) for value in (stored[name], tensor)]
                if shapes[0] != shapes[1]:
                    wrong = f"{name!r} has the shape {shapes[0]} there and {shapes[1]} here"
                    break
        if wrong is not None:
            raise ValueError(
                f"the checkpoint does not fit {type(self).__name__}: {wrong}: use the model and the options that it "
                "was made with, or start a new run"
            )

    # Precision.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts like torch's, but keeps adapters in fp32 where they are in it.

        Lightning's ``bf16-true`` and ``16-true`` cast every weight; the steps of an adapter are often below what half
        a precision can tell apart, and fp32 copies of so few weights cost nothing. Sharded weights know their dtype
        from here on, so what has been cast could not be put back.
        """
        exact = [p for p in _adapter_parameters(self) if p.dtype == torch.float32]
        kept = {id(tensor) for p in exact for tensor in (p, p.grad) if tensor is not None}

        def apply(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            half = changed.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(changed.device) if half and id(tensor) in kept else changed

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]


def is_out_of_time(trainer: Any) -> bool:
    """Whether ``max_time`` has stopped a run; given more, it continues."""
    left = (timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer))
    return any(seconds is not None and seconds <= 0 for seconds in left)


def random_state(device: torch.device) -> dict[str, Any]:
    """The random states of this process, of types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _derived_state(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """A random state for a rank that was not there when the checkpoint was made."""
    digest = blake2b(state["torch"].numpy().tobytes() + rank.to_bytes(4, "big"), digest_size=4).digest()
    seed = int.from_bytes(digest, "big")
    generator, cuda = torch.Generator().manual_seed(seed), state["cuda"]
    if cuda is not None:
        cuda = torch.Generator("cuda").manual_seed(seed).get_state()
    kind, keys, position, has_gauss, gauss = np.random.RandomState(seed).get_state(legacy=True)
    numpy_state = (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss))
    python = random.Random(seed).getstate()
    return {"torch": generator.get_state(), "cuda": cuda, "numpy": numpy_state, "python": python}


# What can be loaded again from where it came.


def adapted_models(module: nn.Module) -> dict[str, PeftModel]:
    """Every model under a module that has an adapter, by name (the policy, and a critic of its own)."""
    return {name: part for name, part in module.named_modules() if isinstance(part, PeftModel)}


def rebuildable_names(module: nn.Module) -> set[str]:
    """Names in a module's state dict that belong to the frozen part of models with adapters.

    That is all of such a model's state but what is trained: quantised weights with their constants, too, and the copy
    of the adapter that serves as the reference.
    """
    names: set[str] = set()
    for prefix, model in adapted_models(module).items():
        trained = {
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
        }
        start = f"{prefix}." if prefix else ""
        names |= {f"{start}{name}" for name in model.state_dict() if name not in trained}
    return names


def base_fingerprint(model: PeftModel, quantization: str | None) -> dict[str, str]:
    """A cheap digest of the weights under an adapter: the config, and both ends of every frozen weight."""
    base: Any = model.get_base_model()
    config = _plain_config(base.config.to_dict())
    digest, dtypes = blake2b(digest_size=16), set()
    for name, weight in _frozen_parameters(model):
        flat = weight.detach().reshape(-1)
        ends = torch.cat([flat[:_EDGE], flat[-_EDGE:]]).cpu()
        dtypes.add(str(weight.dtype))
        digest.update(f"{name}:{tuple(weight.shape)}".encode() + ends.view(torch.uint8).numpy().tobytes())
    return {
        "config": blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16).hexdigest(),
        "weights": digest.hexdigest(),
        "dtype": ",".join(sorted(dtypes)),
        "quantization": str(quantization),
    }


def _plain_config(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: _plain_config(v) for k, v in config.items() if k not in _NOT_THE_MODEL and "attn_impl" not in str(k)}


def _frozen_parameters(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and f".{ADAPTER_COPY}." not in name and not parameter.is_meta:
            # Named as in the model without adapters, whichever layers this one adapts.
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for model in adapted_models(module).values():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or f".{ADAPTER_COPY}." in name:
                yield parameter
