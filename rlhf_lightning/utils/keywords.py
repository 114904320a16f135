"""Suggests replacements for keyword arguments that are misspelt or belong to other trainers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

_BATCH = "the datamodule's global_batch_size (and the module's micro_batch_tokens for memory)"
# Options of other trainers, and their equivalents here.
INSTEAD = {
    "lr": "optimizer (in Python optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5); in YAML optimizer.init_args.lr)",
    "learning_rate": "optimizer (in Python optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5); in YAML "
    "optimizer.init_args.lr)",
    "weight_decay": "optimizer (an argument of torch.optim.AdamW)",
    "warmup_ratio": "lr_scheduler (warmup_steps of rlhf_lightning.core.WarmupSchedule)",
    "batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "gradient_accumulation_steps": "nothing: global_batch_size is one step, micro_batch_tokens splits it",
    "max_seq_length": "the datamodule's max_length",
    "max_prompt_length": "the datamodule's max_length",
    "num_train_epochs": "the trainer's max_epochs",
    "ref_model": "reference",
    "peft_config": "lora",
    "lora_config": "lora",
    "load_in_4bit": "quantization='nf4'",
    "bf16": "the trainer's precision='bf16-mixed'",
    "fp16": "the trainer's precision='16-mixed'",
    "reward_funcs": "rewards",
    "train_dataset": "train",
    "eval_dataset": "val",
    "dataset": "train",
}


def advise(name: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'beta'?"``, ``"; use ..."`` for an option of another trainer, or an empty text.

    Example:
        >>> advise("betta", ["beta", "gamma"])
        "; did you mean 'beta'?"
    """
    last = name.rpartition(".")[2]
    names = list(allowed)
    if last in INSTEAD:
        return f"; use {INSTEAD[last]}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unknown(cls: type, unknown: Iterable[str]) -> None:
    """Refuses keyword arguments that no ``__init__`` of a class takes; Python's error would name a parent class.

    Args:
        cls: the class.
        unknown: the names that are left for its last parent.

    Raises:
        TypeError: there is one; the message suggests another.
    """
    for name in unknown:
        raise TypeError(f"{cls.__name__} has no option {name!r}{advise(name, options_of(cls))}")


def options_of(cls: type) -> set[str]:
    """Collects the arguments of a class's ``__init__``, and of those to which it passes its ``**kwargs``."""
    found: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        # A class that does not pass keywords on ends the search.
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found - {"self"}
