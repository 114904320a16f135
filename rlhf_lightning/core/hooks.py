"""Hooks of the core that run even where a subclass overrides them without ``super()``.

Modules set up runs, collect validation rows and fill checkpoints in Lightning's hooks, and a subclass that overrides
one without calling ``super()`` would lose that silently. So after every override outside the package the core's own
hook is called, unless the override has called it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

_PACKAGE = __name__.partition(".")[0]
CORE_HOOKS = (
    *("configure_callbacks", "configure_model"),
    *("on_fit_start", "on_validation_start", "on_test_start", "on_predict_start"),
    *("on_train_start", "on_train_batch_start", "on_train_epoch_end"),
    *("on_validation_epoch_start", "on_validation_epoch_end", "on_test_epoch_start", "on_test_epoch_end"),
    *("on_save_checkpoint", "on_load_checkpoint"),
)
# Steps may be overridden without super(); their result is checked and the batch is counted as used.
CORE_STEPS = ("training_step", "validation_step", "test_step")


def wrap_hooks(cls: type) -> None:
    """Wraps the hooks of a class so that the core's own always run; called for every new subclass."""
    is_own = cls.__module__.partition(".")[0] == _PACKAGE
    for name in (*CORE_HOOKS, *CORE_STEPS, "configure_optimizers"):
        hook = vars(cls).get(name)
        if not callable(hook):
            continue
        # The package's own classes call super() and record that they were reached; overrides of users are checked.
        if is_own:
            setattr(cls, name, _noted(hook, name))
        elif name in CORE_HOOKS:
            setattr(cls, name, _followed(hook, name, cls))
        elif name in CORE_STEPS:
            setattr(cls, name, _checked_step(hook, name))
        else:
            setattr(cls, name, _with_monitors(hook))


def _noted(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wraps a hook of the core so that it records its call."""

    @wraps(hook)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooks_reached.add(name)
        return hook(self, *args, **kwargs)

    return noted


def _followed(hook: Callable[..., Any], name: str, cls: type) -> Callable[..., Any]:
    """Wraps an override so that the core's hook runs after it, unless the override has called it."""

    @wraps(hook)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooks_reached.discard(name)
        result = hook(self, *args, **kwargs)
        if name in self.hooks_reached:
            return result

        # The override has not called super(): the core's hook follows it.
        own = getattr(super(cls, self), name)(*args, **kwargs)
        if name == "configure_callbacks":  # the only one whose result counts
            return [*own, *([] if result is None else result if isinstance(result, list | tuple) else [result])]
        return result

    return followed


def _checked_step(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wraps an overridden step: counts its batch as used, and refuses a training step that returns a loss only.

    Raises:
        ValueError: the override returned a value and made no optimizer step.
    """

    @wraps(hook)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooks_reached.discard(name)
        before = self.trainer.global_step if name == "training_step" else 0
        result = hook(self, *args, **kwargs)
        if name in self.hooks_reached:
            return result
        if name == "training_step" and result is not None and self.trainer.global_step == before:
            raise ValueError(
                f"{type(self).__name__}.training_step returned a {type(result).__name__} and made no optimizer step; "
                "modules step by themselves here (one batch is one step under global normalizers): override "
                "loss(rows, normalizers) for another loss, or call super().training_step(batch, batch_idx)"
            )

        # The loader's position moves on, as it does after the module's own step.
        batch: Any = args[0] if args else kwargs.get("batch")
        if hasattr(batch, "mark_consumed"):
            batch.mark_consumed()
        return result

    return checked


def _with_monitors(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``configure_optimizers`` to keep the monitored metrics, which Lightning drops in manual optimization."""

    @wraps(hook)
    def configured(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _take_monitors(hook(self, *args, **kwargs), self.scheduler_monitors)

    return configured


def _take_monitors(value: Any, found: dict[int, tuple[str | None, bool]]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_take_monitors(item, found) for item in value])
    if not isinstance(value, dict):
        return value
    if "scheduler" in value:
        found[id(value["scheduler"])] = value.get("monitor"), value.get("strict", True)
        return {k: v for k, v in value.items() if k not in ("monitor", "strict", "reduce_on_plateau")}
    scheduler = value.get("lr_scheduler")
    if isinstance(scheduler, dict):
        return value | {"lr_scheduler": _take_monitors(scheduler, found)}
    if isinstance(scheduler, ReduceLROnPlateau):  # its monitor is the dictionary's other key
        found[id(scheduler)] = value.get("monitor"), True
        return {k: v for k, v in value.items() if k != "monitor"}
    return value


def step_schedulers(module: Any, interval: str, *, waiting: bool = False) -> None:
    """Steps the schedulers that are due by their interval and frequency, with the metric that they monitor.

    Args:
        module: module whose optimizer has just made a step, or whose epoch has just ended.
        interval: ``step`` (of the optimizer) or ``epoch``.
        waiting: step only the schedulers that monitor a metric; by default only the others.

    Raises:
        ValueError: a monitored metric has not been logged.
    """
    trainer = module.trainer
    done = trainer.global_step if interval == "step" else trainer.current_epoch + 1
    for config in trainer.lr_scheduler_configs:
        if config.interval != interval or done % config.frequency:
            continue
        if isinstance(config.scheduler, ReduceLROnPlateau) is not waiting:
            continue
        # A plateau schedule waits for its metric, which only exists after validation.
        value = None
        if waiting:
            monitor, strict = module.scheduler_monitors[id(config.scheduler)]
            value = trainer.callback_metrics.get(monitor)
            if value is None and not strict:
                continue
            if value is None:
                logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
                raise ValueError(f"ReduceLROnPlateau waits for {monitor!r}, which is not logged (logged: {logged})")
        module.lr_scheduler_step(config.scheduler, value)


def check_optimizers(module: Any) -> None:
    """Refuses results of ``configure_optimizers`` that a step cannot use.

    Raises:
        ValueError: no optimizer or several, a ``ReduceLROnPlateau`` without a metric, or an unknown interval.
    """
    trainer, name = module.trainer, type(module).__name__
    count = sum(bool(optimizer.param_groups) for optimizer in trainer.optimizers)
    if count != 1:
        raise ValueError(
            f"{name}.configure_optimizers returns {count or 'no'} optimizers; a batch makes a step of one here: return "
            "one with parameter groups, each with its own lr (or override parameter_groups)"
        )
    for config in trainer.lr_scheduler_configs:
        plateau = isinstance(config.scheduler, ReduceLROnPlateau)
        if plateau and module.scheduler_monitors.get(id(config.scheduler), (None, True))[0] is None:
            raise ValueError(
                f"{name}.configure_optimizers returns ReduceLROnPlateau without a metric: return {{'optimizer': ..., "
                "'lr_scheduler': {'scheduler': ..., 'monitor': 'val/loss'}}"
            )
        if config.interval not in ("step", "epoch"):
            raise ValueError(f"the interval of a schedule is {config.interval!r}; it must be step or epoch")
