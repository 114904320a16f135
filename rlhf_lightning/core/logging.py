"""Logging helpers: no repeated values of earlier steps, hooks of manual optimization, hyper-parameters of a run."""

from __future__ import annotations

from collections.abc import Container, Mapping
from copy import deepcopy
from typing import Any

import lightning
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook
from torch import Tensor

_STEP = "training_step"
_PLAIN = (str, int, float, bool, type(None))


def forget_others(trainer: lightning.Trainer, names: Container[str]) -> None:
    """Resets logged values of earlier training steps that this step does not log again.

    Lightning keeps every value logged within an epoch and passes it to the loggers with each step until it is logged
    again. A metric that a batch does not define (rewards of rejected completions in a batch without any) would repeat
    its last value, and a resumed run, which has none to repeat, would log differently from an uninterrupted one.
    Monitored values (``trainer.callback_metrics``) are kept.

    Args:
        trainer: trainer in the middle of a training step.
        names: names that the step logs.
    """
    results: Any = trainer._results
    for result in (results or {}).values():
        if result.meta.fx == _STEP and result.meta.name.startswith("train/") and result.meta.name not in names:
            result.reset()


def log_values(module: Any, stage: str, values: Mapping[str, Tensor], suffix: str = "") -> None:
    """Logs values of a training step or of a validation or test epoch as ``<stage>/<name><suffix>``.

    Args:
        module: a ``PostTrainingModule``; its ``progress_metrics`` are shown in the progress bar.
        stage: ``train``, ``val`` or ``test``.
        values: values by name, the same on every rank.
        suffix: the end of all names, with several data loaders.
    """
    shown = {f"{stage}/{name}{suffix}": value.detach().float() for name, value in values.items()}
    bar = {f"{stage}/{name}{suffix}" for name in module.progress_metrics}
    if stage == "train":
        forget_others(module.trainer, shown)
    for name, value in shown.items():
        module.log(
            name,
            value,
            prog_bar=name in bar,
            on_step=stage == "train",
            on_epoch=stage != "train",
            batch_size=1,
            add_dataloader_idx=not suffix,
        )


def call_hooks(trainer: lightning.Trainer, name: str, *args: Any) -> None:
    """Calls a hook of the callbacks and of the module that Lightning skips in manual optimization."""
    _call_callback_hooks(trainer, name, *args)
    _call_lightning_module_hook(trainer, name, *args)


def log_settings(module: Any) -> None:
    """Logs the settings of optimizer, schedule and data; Lightning logs only the module's hyper-parameters."""
    trainer = module.trainer
    settings: dict[str, Any] = {}
    for optimizer in trainer.optimizers:
        options = {name: _plain(value) for name, value in optimizer.defaults.items()}
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        settings["optimizer"] = {"name": type(optimizer).__name__, **options, "lr": max(rates)}

    # Schedules keep their options as public attributes.
    for config in trainer.lr_scheduler_configs:
        options = {k: v for k, v in vars(config.scheduler).items() if isinstance(v, _PLAIN) and not k.startswith("_")}
        settings["lr_scheduler"] = {"name": type(config.scheduler).__name__, "interval": config.interval, **options}
        settings["lr_scheduler"].pop("last_epoch", None)

    # The options of the data, and the number of ranks, which decides how batches are split.
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        settings["data"] = {"name": type(datamodule).__name__, **_public(datamodule)}
    settings["ranks"] = trainer.world_size
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)


def store_options(module: Any, **options: Any) -> None:
    """Replaces hyper-parameters by the plain values that checkpoints hold and loggers write."""
    module.hparams.update(options)
    module._hparams_initial = deepcopy(module._hparams)  # the copy that loggers write


def _public(datamodule: Any) -> dict[str, Any]:
    """Returns a datamodule's public options, with sources by their names."""
    found = {k: _plain(v) for k, v in vars(datamodule).items() if not k.startswith("_") and k not in _OF_LIGHTNING}
    sources = found.pop("sources", None) or {}
    named = {k: v if isinstance(v, _PLAIN) else [str(s) for s in v] for k, v in sources.items() if _is_named(v)}
    return {k: v for k, v in found.items() if isinstance(v, _PLAIN) or k == "columns"} | named


_OF_LIGHTNING = ("trainer", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "report")


def _is_named(source: Any) -> bool:
    return isinstance(source, str) or (isinstance(source, list) and all(isinstance(item, str) for item in source))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if isinstance(value, _PLAIN) else f"{type(value).__module__}.{type(value).__qualname__}"
