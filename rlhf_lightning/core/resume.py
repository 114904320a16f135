"""Exact resume: random states in checkpoints, and small checkpoints of adapters.

A resumed run equals the uninterrupted one: the random states of torch, CUDA, numpy and python are saved per rank and
restored when training continues. Of a model with an adapter, a checkpoint holds only trained weights; the frozen ones
are loaded from their source, after a check that they have not changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from peft import PeftModel
from torch import Tensor, nn

from ..distributed.collectives import gather_objects
from ..models.reference import ADAPTER_COPY

_KEY = "post_training"  # key of this module's state in a checkpoint
# Keys of a config that describe how a model was loaded, not what it computes.
_NOT_THE_MODEL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "use_cache"}
_EDGE = 32  # values at either end of each weight that a fingerprint reads


class ResumeState:
    """Saves and restores what a run needs besides its weights to continue exactly; on CPUs bit for bit.

    With another number of ranks, a resumed run is not bit-identical: rank r takes the random state of rank r, and
    additional ranks derive theirs from that of rank 0.

    Args:
        module: a ``PostTrainingModule``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.base: dict[str, str] = {}  # fingerprint of the frozen weights of an adapted model, as loaded
        self.random_before_validation: dict[str, Any] | None = None  # set while a validation is due or runs
        self._loaded_random: dict[str, Any] | None = None
        self._redo_random = False
        self._was_stopped = False
        self.step_before_batch = 0  # optimizer steps before the batch that is being trained on
        self._loaded_metrics: dict[str, Tensor] = {}

    # Random states.

    def begin_training(self) -> None:
        """Restores the random states of a checkpoint, after setup has drawn from them.

        In a new run every rank except rank 0 derives a random state of its own.
        """
        module = self.module
        self._redo_random = self._loaded_random is not None
        if self._loaded_random is not None:
            set_random_state(self._loaded_random, module.device)
        elif module.global_rank > 0:  # with a shared seed, all ranks would drop the same units
            own = random_state(module.device)
            derived = _derived_state(own, module.global_rank)
            set_random_state(own | {name: derived[name] for name in ("torch", "cuda")}, module.device)
        if self._was_stopped:  # by early stopping or a guard, just before the checkpoint was made
            self._was_stopped, module.trainer.should_stop = False, True
        # Monitored metrics that have not been logged again yet.
        module.trainer.callback_metrics.update(self._loaded_metrics)
        self._loaded_metrics = {}

    def begin_batch(self, batch_idx: int) -> None:
        """Restores random states once more in mid-epoch, since restarting a data loader may draw from them."""
        self.step_before_batch = self.module.trainer.global_step
        if self._loaded_random is None:
            return
        if self._redo_random and batch_idx > 0:
            set_random_state(self._loaded_random, self.module.device)
        self._loaded_random, self._redo_random = None, False
        # Lightning counts the last batch twice when a run is resumed at the end of an epoch, which would shift the
        # logged steps by one.
        loop = self.module.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def draw_anew(self, number: int) -> None:
        """Replaces the random states that were loaded by others that are derived from them.

        Args:
            number: another one gives other states, at least 0.
        """
        assert self._loaded_random is not None
        self._loaded_random = _derived_state(self._loaded_random, number)

    def begin_validation(self) -> None:
        """Cancels the second restore: random numbers that validation draws belong to the run."""
        self._redo_random = False

    # Checkpoints.

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the random states, and removes the frozen weights of models with an adapter."""
        adapted, trainer = bool(adapted_models(self.module)), self.module._trainer
        checkpoint[_KEY] = {
            # A validation that has not ended will be run again.
            "random": gather_objects(self.random_before_validation or random_state(self.module.device)),
            "adapter": adapted,
            "base": self.base,
            "should_stop": trainer is not None and bool(trainer.should_stop) and not is_out_of_time(trainer),
            "metrics": {} if trainer is None else {k: v.cpu() for k, v in trainer.callback_metrics.items()},
        }
        # A distributed checkpoint is a folder that torch fills by the names in the module.
        sharded = getattr(getattr(trainer, "strategy", None), "_save_distributed_checkpoint", False)
        if adapted and not sharded:
            left_out = rebuildable_names(self.module)
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in left_out}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits this model, and keeps the random states until training starts."""
        self.module.configure_model()
        state = checkpoint.get(_KEY, {})
        adapted = bool(adapted_models(self.module))
        self._check_kind(state.get("adapter", adapted), adapted)
        self._check_base(state.get("base", {}))
        if self.module._trainer is not None and self.module._trainer.state.fn == "fit":
            self._check_groups(checkpoint.get("hyper_parameters", {}))
        if checkpoint.get("state_dict"):
            self._check_weights(checkpoint["state_dict"])
        states = state.get("random")
        if states and self.module._trainer is not None and self.module._trainer.state.fn == "fit":
            self._was_stopped = state.get("should_stop", False)
            self._loaded_metrics = state.get("metrics", {})
            rank = self.module.global_rank
            self._loaded_random = states[rank] if rank < len(states) else _derived_state(states[0], rank)

    def load_weights(self, load: Callable[..., Any], state_dict: Mapping[str, Any], *, strict: bool) -> Any:
        """Loads weights by torch's ``load(state_dict, strict=...)``; frozen weights of an adapted model may be missing.

        Raises:
            RuntimeError: names are missing or unknown, and ``strict`` is true.
        """
        left_out = rebuildable_names(self.module)
        if not left_out:
            return load(state_dict, strict=strict)
        keys = load(state_dict, strict=False)
        missing, extra = ([name for name in names if name not in left_out] for names in keys)
        if strict and (missing or extra):
            raise RuntimeError(f"the state dict lacks {missing or 'nothing'} and has {extra or 'nothing'} too many")
        return type(keys)(missing, extra)

    def remember_base(self) -> None:
        """Stores a fingerprint of the frozen weights of an adapted model, as loaded."""
        if isinstance(self.module.model, PeftModel):
            self.base = base_fingerprint(self.module.model, self.module.quantization)

    def _check_kind(self, then: bool, now: bool) -> None:
        if then and not now:
            raise ValueError(
                "the checkpoint holds a LoRA adapter alone, and this run trains all weights: set lora to what it was "
                "made with, or start a new run from the exported model"
            )
        if now and not then:
            raise ValueError(
                "the checkpoint holds a whole model, and this run trains a LoRA adapter: remove lora, or start a "
                "new run from the exported model"
            )

    def _check_base(self, then: dict[str, str]) -> None:
        now = self.base
        if not then or not now:
            return
        if then["quantization"] != now["quantization"]:
            raise ValueError(
                f"the checkpoint's adapter was trained on weights with quantization={then['quantization']}, and this "
                f"run has quantization={now['quantization']}: restore the old value, or start a new run"
            )
        same_weights = then["weights"] == now["weights"] or then["dtype"] != now["dtype"]  # rounded, they differ
        if then["config"] != now["config"] or not same_weights:
            raise ValueError(
                f"the weights in {self.module.model_source} are not the base that the checkpoint's adapter was trained "
                "on: restore them, or start a new run"
            )

    def _check_groups(self, then: Mapping[str, Any]) -> None:
        """Refuses other groups of the optimizer: it would find the moments of other parameters, and their rates."""
        for name in ("lr_ratios", "layer_lr_decay"):
            if then.get(name) != getattr(self.module, name):
                raise ValueError(
                    f"the checkpoint's optimizer was made with {name}={then.get(name)!r}, and this run has {name}="
                    f"{getattr(self.module, name)!r}: restore the old value, or start a new run from the exported model"
                )

    def _check_weights(self, stored: dict[str, Any]) -> None:
        """Compares names and shapes, to report a mismatch in one line and not as a list of all weights."""
        left_out = rebuildable_names(self.module)
        expected = {name: tensor for name, tensor in self.module.state_dict().items() if name not in left_out}
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
                f"the checkpoint does not fit {type(self.module).__name__}: {wrong}: use the model and the options "
                "that it was made with, or start a new run"
            )


def is_out_of_time(trainer: Any) -> bool:
    """Returns whether ``max_time`` has stopped a run; with more time it can continue."""
    left = (timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer))
    return any(seconds is not None and seconds <= 0 for seconds in left)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the random states of this process, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets the random states that ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _derived_state(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Derives a random state for a rank that did not exist when the checkpoint was saved."""
    digest = blake2b(state["torch"].numpy().tobytes() + rank.to_bytes(4, "big"), digest_size=4).digest()
    seed = int.from_bytes(digest, "big")
    generator, cuda = torch.Generator().manual_seed(seed), state["cuda"]
    if cuda is not None:
        cuda = torch.Generator("cuda").manual_seed(seed).get_state()
    kind, keys, position, has_gauss, gauss = np.random.RandomState(seed).get_state(legacy=True)
    numpy_state = (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss))
    python = random.Random(seed).getstate()
    return {"torch": generator.get_state(), "cuda": cuda, "numpy": numpy_state, "python": python}


# Frozen weights, which are loaded again from their source.


def adapted_models(module: nn.Module) -> dict[str, PeftModel]:
    """Returns every submodel with an adapter, by name (the policy, and a critic with its own backbone)."""
    return {name: part for name, part in module.named_modules() if isinstance(part, PeftModel)}


def rebuildable_names(module: nn.Module) -> set[str]:
    """Returns the names in a module's state dict that belong to the frozen part of models with adapters.

    These are all of such a model's state that is not trained, including quantised weights with their constants and the
    copy of the adapter that serves as the reference.
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
    """Computes a cheap digest of an adapter's base model: its config, and both ends of every frozen weight."""
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
            # The name in the model without adapters, so that it does not depend on the adapted layers.
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
