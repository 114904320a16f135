"""The ``fit`` stage: the command line's ``fit``, with an export and a log of metrics added."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from peft import PeftModel, set_peft_model_state_dict

from ..callbacks import JSONLLogger, ModelExport
from ..cli import PostTrainingCLI
from ..core import PostTrainingModule
from ..models import load_causal_lm
from ..models.headed_model import HeadedModel
from ..models.safetensors_io import read_weights
from ..utils import yaml_parser
from ..utils.files import write_atomically
from ..utils.messages import one_line
from .figures import TRAIN_SECONDS
from .stages import FitStage

HISTORY = "history.jsonl"


class Progress(lightning.Callback):
    """Reports the progress of training after every validation.

    Args:
        say: shown one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reports validations during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            shown = [f"{name} {values[name]:.3f}" for name in ("val/loss", "val/accuracy") if name in values]
            self.say(f"step {trainer.global_step}: {', '.join(shown)}")


class Stopwatch(lightning.Callback):
    """Logs the duration of training with every validation: of batches only, without validations and their samples."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts the watch."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stops the watch."""
        self.seconds += time.perf_counter() - self._began

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Logs the seconds."""
        pl_module.log(TRAIN_SECONDS, self.seconds, on_epoch=True, batch_size=1)


class StageCLI(PostTrainingCLI):
    """Builds everything that a fit stage needs, without running it.

    Args:
        stage: the stage.
        folder: where it writes.
        seed: its seed.
        callbacks: added to those configured.
    """

    def __init__(self, stage: FitStage, folder: Path, seed: int, callbacks: Sequence[lightning.Callback] = ()) -> None:
        self.folder = folder
        written = {"seed_everything": seed}
        written |= {key: getattr(stage, key) for key in ("model", "data", "trainer") if getattr(stage, key)}

        # Config files first, then the stage's own values, which override them.
        self.export = ModelExport(str(folder / "model"), **vars(stage.export))
        args = [argument for file in stage.config for argument in ("--config", file)]
        super().__init__(
            [*args, "--config", yaml_parser.dump(written)],
            run=False,
            trainer_defaults={
                "callbacks": [self.export, *callbacks],
                "default_root_dir": str(folder),
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stderr.isatty(),
                "num_sanity_val_steps": 0,
            },
        )
        self.written = written
        if self.trainer.world_size > 1:
            raise ValueError(_one_process(self.trainer.world_size))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the log of metrics to the loggers that are configured."""
        configured = self.config_init["trainer"].get("logger")
        others = [configured] if isinstance(configured, Logger) else configured or []
        loggers = [JSONLLogger(str(self.folder / HISTORY)), *(others if isinstance(others, list) else [])]
        return super().instantiate_trainer(logger=loggers, **kwargs)

    @property
    def merged(self) -> dict[str, Any]:
        """The whole configuration, defaults included."""
        merged: dict[str, Any] = yaml_parser.plain(yaml_parser.load(self.parser.dump(self.config, skip_none=False)))
        return merged


def _one_process(count: int) -> str:
    return (
        f"trainer.devices make {count} processes, and a pipeline runs in one: set devices: 1, or run this stage by "
        "`rlhf-lightning fit`"
    )


def _processes(trainer: Mapping[str, Any]) -> int:
    """Number of processes that options of a trainer ask for, 1 where the machine decides."""
    devices = trainer.get("devices")
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return max(1, count) * int(trainer.get("num_nodes") or 1)


class PlannedStageCLI(StageCLI):
    """Builds a fit stage to plan it, on a machine that may lack its device.

    Attributes:
        elsewhere: why it cannot run here; empty if it can.
    """

    elsewhere = ""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Makes a trainer for a CPU where there is no such device."""
        trainer = self.config_init["trainer"]
        accelerator, reasons = trainer.get("accelerator"), []
        if accelerator not in (None, "auto", "cpu"):
            try:
                lightning.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
            except (MisconfigurationException, ImportError, RuntimeError) as error:
                reasons.append(f"accelerator {accelerator!r} is not here ({one_line(error)})")
            if (count := _processes(trainer)) > 1:
                reasons.append(_one_process(count))
        if reasons:
            self.elsewhere = "; ".join(reasons)
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
        return super().instantiate_trainer(**kwargs)


def run_fit(stage: FitStage, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, float]:
    """Trains, exports and evaluates: validation before and after, and the test set if there is one.

    Args:
        stage: the stage.
        folder: an empty folder, which gets ``model/``, ``history.jsonl``, ``config.yaml`` and ``stage.yaml``.
        seed: the stage's seed.
        say: shown one line per validation.

    Returns:
        The metrics: ``val_before/*``, ``val/*`` and ``test/*`` of the exported model.

    Raises:
        KeyboardInterrupt: training was interrupted.
    """
    cli = StageCLI(stage, folder, seed, [Progress(say), Stopwatch()])
    write_atomically(folder / "stage.yaml", yaml_parser.dump(cli.written))
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    assert isinstance(module, PostTrainingModule)
    sources = getattr(data, "sources", {})
    metrics: dict[str, float] = {}
    try:
        if sources.get("val") is not None:
            metrics |= _named("val_before", trainer.validate(module, datamodule=data, verbose=False))
        trainer.fit(module, datamodule=data)
        # The stage's metrics are those of the model that it exports.
        if cli.export.monitor is not None:
            load_exported(module, folder / "model")
        if sources.get("val") is not None:
            # The exported model may not be that of the last step: keep its metrics out of that step's curves.
            loggers, trainer.loggers = trainer.loggers, []
            metrics |= _named("val", trainer.validate(module, datamodule=data, verbose=False))
            trainer.loggers = loggers
        if sources.get("test") is not None:
            metrics |= _named("test", trainer.test(module, datamodule=data, verbose=False))
    except SystemExit as error:  # Lightning turns Ctrl-C into it; other signals keep their exit status
        if error.code not in (1, 128 + signal.SIGINT):
            raise
        raise KeyboardInterrupt from error
    finally:
        finish_wandb()
    return metrics | {"steps": float(trainer.global_step), "exported_step": float(cli.export.step or 0)}


def load_exported(module: PostTrainingModule, folder: Path) -> None:
    """Loads the weights of an exported folder, head included, into the module that exported it.

    Weights that an export does not hold are unchanged: the critic of a PPO policy, which validation does not read.

    Raises:
        ValueError: a file is damaged or missing, or the folder holds a merged adapter.
    """
    if isinstance(module.model, PeftModel):
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(
                "export.monitor with merge_adapter leaves no adapter to measure again: set merge_adapter: false"
            )
        set_peft_model_state_dict(module.model, read_weights(folder / "adapter_model.safetensors"))
    else:
        # Not file by file: transformers stores some weights (of experts) under other names than in the model.
        stored = load_causal_lm(folder, dtype=module.model.dtype, trainable=False, headless=not module.predicts_tokens)
        module.model.load_state_dict(stored.state_dict())
    held = getattr(module, "reward_model", None)
    if isinstance(held, HeadedModel):
        held.load_head_files(folder)


def finish_wandb() -> None:
    """Closes an open run of Weights & Biases, so that the next stage starts its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def _named(prefix: str, results: Any) -> dict[str, float]:
    values = {f"{prefix}/{name.partition('/')[2]}": float(value) for name, value in results[0].items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
