"""The ``merge`` stage, and soups that are chosen by a metric of ``rlhf-lightning validate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..cli import PostTrainingCLI
from ..merging.options import Merged, MergeOptions, run


def run_merge(options: MergeOptions, say: Callable[[str], None] = print) -> Merged:
    """Merges; the models of a soup are measured by the configs in ``validate``.

    Args:
        options: the options.
        say: called with a line for each finished file or evaluation.

    Raises:
        ValueError: as ``merging.options.run``, or the metric is not measured.
    """
    evaluate = None
    if options.validate:
        check_configs(options.validate)
        evaluate = partial(validation_metric, configs=options.validate, metric=str(options.metric))
    return run(options, say, evaluate)


def check_configs(configs: Sequence[str]) -> None:
    """Checks before a model is measured that the configs can be read and name validation data.

    Raises:
        ValueError: they do not.
    """
    cli = _build(configs, Path("model"))
    if getattr(cli.datamodule, "sources", {}).get("val") is None:
        raise ValueError(f"the configs {list(configs)} have no data.val: set the rows that models are measured on")


def validation_metric(folder: Path, *, configs: Sequence[str], metric: str) -> float:
    """Validates the model in a folder with the module, the data and the callbacks of config files.

    Args:
        folder: of the model, which replaces the configured one.
        configs: files of ``rlhf-lightning validate``, later ones overriding earlier ones.
        metric: name of the metric, such as ``val/loss``.

    Raises:
        ValueError: the metric is not measured.
    """
    cli = _build(configs, folder)
    trainer = cli.trainer
    trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if metric not in trainer.callback_metrics:
        known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        raise ValueError(f"metric is {metric!r}, which these configs do not measure (measured: {known})")
    return float(trainer.callback_metrics[metric])


def _build(configs: Sequence[str], folder: Path) -> PostTrainingCLI:
    files = [argument for file in configs for argument in ("--config", str(file))]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return PostTrainingCLI([*files, f"--model.init_args.model={folder}", *quiet], run=False)
