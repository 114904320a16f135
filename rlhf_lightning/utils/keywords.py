"""Suggests replacements for keyword arguments that are misspelt or belong to other trainers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

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
    "max_new_tokens": "max_completion_length",
    "vf_coef": "value.coef",
    "importance_sampling_correction": "off_policy.correction",
    "use_bias_correction_kl": "kl.bias_correction",
}


def advise(name: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'beta'?"``, ``"; use ..."`` for an option of another trainer, or an empty text.

    Example:
        >>> advise("betta", ["beta", "gamma"])
        "; did you mean 'beta'?"
        >>> advise("epsilon", ["loss.epsilon", "gamma"])
        "; did you mean 'loss.epsilon'?"
    """
    last = name.rpartition(".")[2]
    names = list(allowed)
    if last in INSTEAD:
        return f"; use {INSTEAD[last]}"
    in_groups = [other for other in names if other.endswith(f".{name}")]
    near = in_groups[:1] or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
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
        raise TypeError(f"{cls.__name__} has no option {name!r}{advise(name, options_of(cls) | _in_groups(cls))}")


def options_of(cls: type) -> set[str]:
    """Collects the names of ``keyword_parameters``."""
    return set(keyword_parameters(cls))


def keyword_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Collects the arguments of a class's ``__init__``, and of those to which it passes its ``**kwargs``."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        # A class that does not pass keywords on ends the search.
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: parameter for name, parameter in found.items() if name != "self"}


def _in_groups(cls: type) -> set[str]:
    """Collects the options in groups: arguments whose default is a dataclass."""
    groups = {name: p.default for name, p in keyword_parameters(cls).items() if is_dataclass(p.default)}
    return {f"{name}.{field.name}" for name, group in groups.items() for field in fields(group)}
