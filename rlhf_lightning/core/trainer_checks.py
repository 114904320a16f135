"""Checks of trainers, callbacks, strategies and modules, with error messages of one line that name a replacement."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel

from ..distributed.strategy import FSDP2Strategy
from ..models import base_model
from ..models.config_losses import OF_BALANCE, logit_losses, router_losses
from ..sequences import ATTENTION_KERNELS
from ..utils.compilation import check_compiler
from ..utils.validation import check_choice, check_fraction, check_not_negative, check_positive


def check_module_options(
    *,
    init: str,
    micro_batch_tokens: int,
    attention: str,
    layout: str,
    compiled: bool,
    quantization: str | None,
    dropout: float | None,
    router_aux_loss_coef: float | None,
    max_grad_norm: float | None,
) -> None:
    """Checks the options that all modules share."""
    check_choice("init", init, ("pretrained", "random"))
    check_choice("attention", attention, ATTENTION_KERNELS)
    check_choice("layout", layout, ("auto", "packed", "padded"))
    if compiled and (layout == "padded" or quantization is not None):
        against = "layout: padded" if layout == "padded" else f"quantization: {quantization}"
        raise ValueError(f"compile is true with {against}, whose layers are not compiled: set compile to false")
    check_positive("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
    if dropout is not None:
        check_fraction("dropout", dropout, "0 switches it off; null is off for all but SFT, which keeps the config's")
    if router_aux_loss_coef is not None:
        check_not_negative(
            "router_aux_loss_coef", router_aux_loss_coef, "0.001 is usual; null is what the model's config asks for"
        )
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm, "null switches clipping off")


def check_trainer(trainer: Any) -> None:
    """Refuses trainer flags that have no effect in manual optimization, or the wrong one.

    Raises:
        ValueError: ``accumulate_grad_batches`` or ``gradient_clip_val`` is set, the strategy or a callback is not
            supported, or the trainer's ranks are not the launched processes.
    """
    check_launch(trainer)
    check_strategy(trainer.strategy)
    check_tuners(trainer.callbacks)
    check_callbacks(trainer.callbacks)
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be 1: one batch is one "
            "optimizer step here. Set the datamodule's global_batch_size to the number of examples per step, and the "
            "module's micro_batch_tokens to what fits in memory"
        )
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; remove it and set the module's "
            "max_grad_norm instead (it clips the norm of the global batch's gradient)"
        )


def launched_processes() -> tuple[str, int] | None:
    """Returns the launcher of this process and its number of processes; ``None`` unless there are several."""
    if TorchElasticEnvironment.detect():
        launcher, number = "torchrun", os.environ.get("WORLD_SIZE", "1")
    else:
        # Set by srun for the processes of a step, but not in a batch script.
        launcher, number = "srun", os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return (launcher, int(number)) if number.isdecimal() and int(number) > 1 else None


def check_launch(trainer: Any) -> None:
    """Refuses a trainer that would run separately in each of several processes, or wait for unknown machines.

    Raises:
        ValueError: the trainer's ranks are not the launched processes, or no address of other machines is known.
    """
    launched, nodes = launched_processes(), trainer.num_nodes
    ranks = trainer.num_devices * nodes  # not of its environment, which repeats the launcher's number
    if launched is not None and launched[1] != ranks:
        launcher, number = launched
        raise ValueError(
            f"{launcher} started {number} processes, and trainer.devices and trainer.num_nodes make {ranks}: set "
            f"--trainer.devices to the processes of a machine and --trainer.num_nodes to the machines (together "
            f"{number}), or start without {launcher}"
        )

    # Lightning's default environment would wait forever for the other machines.
    environment = getattr(trainer.strategy, "cluster_environment", None)
    alone = isinstance(environment, LightningEnvironment) and environment.main_address in ("127.0.0.1", "localhost")
    if launched is None and nodes > 1 and alone and os.environ.get("NODE_RANK", "0") == "0":
        raise ValueError(
            f"trainer.num_nodes is {nodes}, and the address of the other machines is unknown: start this command on "
            f"each with torchrun --nnodes={nodes} --nproc-per-node=... --rdzv-endpoint=HOST:PORT, or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK there; on one machine set --trainer.num_nodes=1"
        )


def check_single_process(command: str) -> None:
    """Refuses to run a single-process command in several processes, which would write the same files.

    Raises:
        ValueError: a launcher has started several processes.
    """
    launched = launched_processes()
    if launched is not None:
        raise ValueError(
            f"{command} runs in one process, and {launched[0]} started {launched[1]}: start it without {launched[0]}"
        )


def check_tuners(callbacks: Iterable[Any]) -> None:
    """Refuses Lightning's tuners, as callbacks or from ``Tuner``.

    Raises:
        ValueError: a ``LearningRateFinder`` or a ``BatchSizeFinder``.
    """
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                f"{type(callback).__name__} needs Lightning's automatic optimisation, and this module steps manually "
                "(one batch is one or more steps, under one global normaliser): remove it, run fit with "
                "trainer.max_steps of 50 or so at a few values of optimizer.init_args.lr, and compare train/loss, or "
                "train/reward"
            )
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                f"{type(callback).__name__} enlarges batches until memory runs out, but a batch is what a step learns "
                "from here, over all ranks, and needs no more memory than a micro-batch: remove it, set the "
                "datamodule's global_batch_size by what learns best, and the module's micro_batch_tokens by what fits"
            )


# Callbacks without effect or with another effect than documented, and their replacements.
_REFUSED: tuple[tuple[type, str], ...] = (
    (
        StochasticWeightAveraging,
        "averages in Lightning's automatic optimisation alone, and would here only raise the learning rate: use "
        "rlhf_lightning.callbacks.WeightAverage(decay=1.0, start_step=...)",
    ),
    (
        WeightAveraging,
        "copies the whole module, reference policies included, before the model is built: use "
        "rlhf_lightning.callbacks.WeightAverage(decay=0.999)",
    ),
    (
        GradientAccumulationScheduler,
        "changes accumulate_grad_batches, and one batch is one optimizer step here: set the datamodule's "
        "global_batch_size, and train in two runs where it should grow",
    ),
    (
        ModelPruning,
        "prunes in hooks of layers whose weights are read directly here, and in exports: prune the exported model with "
        "torch.nn.utils.prune, and train the result",
    ),
)
# Hooks of a module that Lightning calls only in automatic optimization.
_NEVER_CALLED = {
    "optimizer_step": "give the module an optimizer whose step() does it",
    "optimizer_zero_grad": "use on_before_zero_grad",
    "configure_gradient_clipping": "set max_grad_norm, or use on_before_optimizer_step",
}


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuses Lightning's callbacks that need automatic optimization.

    Raises:
        ValueError: with the callback, the reason, and a replacement.
    """
    for callback in callbacks:
        for kind, reason in _REFUSED:
            if isinstance(callback, kind):
                raise ValueError(f"{type(callback).__name__} {reason}")


def check_module(module: Any) -> None:
    """Refuses changes to a module before ``fit`` that would have no effect.

    Raises:
        ValueError: the module is compiled, is watched or frozen before its model is built, or overrides a hook that is
            never called.
    """
    name = type(module).__name__
    if module._compiler_ctx is not None:
        raise ValueError(
            f"{name} was given to torch.compile, which would compile its whole training_step, steps and collectives "
            "included: pass the module itself"
        )
    for hook, instead in _NEVER_CALLED.items():
        if is_overridden(hook, module, LightningModule):
            raise ValueError(f"{name} overrides {hook}, which is never called where a module steps manually: {instead}")

    # Names of W&B's hooks tell what was asked for.
    watched = getattr(module, "_wandb_hook_names", None)
    if watched is not None and not all(name.startswith("gradients/") for name in watched):
        raise ValueError(
            "WandbLogger.watch was asked for parameters, which it reads when forward() is called, and no step here "
            "calls it: write logger.watch(module, log='gradients', log_graph=False)"
        )

    # The model is built in fit: freezing or watching before that finds nothing.
    unbuilt = {
        "WandbLogger.watch found no weights": watched is not None and not watched,
        **{
            f"{type(callback).__name__} freezes layers": isinstance(callback, BaseFinetuning) and module.model is None
            for callback in module.trainer.callbacks
        },
    }
    for what, is_so in unbuilt.items():
        if is_so:
            raise ValueError(f"{what} before fit has built the model of {name}: call module.configure_model() first")


def report_config_losses(module: Any) -> None:
    """Reports, once per kind of model, which auxiliary losses of its config are trained and which are not."""
    models = [model for model in module.modules() if isinstance(model, PreTrainedModel)]
    trained = [model for model in models if any(p.requires_grad for p in model.parameters())]
    balanced = _report_router_loss(module)

    # Sets, so that several copies of one kind of model (policy, critic) are reported once.
    on_routers, on_logits = set(), set()
    for model in trained:
        losses = router_losses(model.config)
        if id(model) in balanced:
            losses = {name: value for name, value in losses.items() if name not in OF_BALANCE}
        on_routers.add((model.config.model_type, _written(losses)))
        if module.predicts_tokens:
            on_logits.add((model.config.model_type, _written(logit_losses(model.config))))

    name = type(module).__name__
    for kind, written in sorted(on_routers):
        if written:
            rank_zero_warn(
                f"the config of {kind} asks for a loss on its routers (output_router_logits: true, {written}), which "
                f"{name} does not train: nothing keeps its experts equally used. Freeze the routers, or train with "
                "lora on the attention's projections, so that they stay as they are; output_router_logits: false in "
                "the model's config.json ends this warning"
            )
    for kind, written in sorted(on_logits):
        if written:
            rank_zero_warn(
                f"the config of {kind} asks for a loss on the size of its logits ({written}), which {name} does not "
                "train; a coefficient of 0 in the model's config.json ends this warning"
            )


def _report_router_loss(module: Any) -> set[int]:
    """Reports whether the routers' loads are balanced, and returns the ``id`` of every module that this covers."""
    given, loss = module.router_aux_loss_coef, module._router_loss
    if loss is None and given != 0:
        return set()
    config = base_model(module.model).config
    asked = {name: value for name, value in router_losses(config).items() if name in OF_BALANCE}
    by = f"the config of {config.model_type} asks for it (output_router_logits: true, {_written(asked)})"
    if not any(p.requires_grad for p in module.model.parameters()):
        pass
    elif loss is not None:
        reason = by if given is None else f"router_aux_loss_coef is {given:g}"
        rank_zero_info(
            f"the load-balancing loss of {loss.routers.num_experts} experts, over the whole global batch, is added "
            f"with the coefficient {loss.coef:g}, since {reason}; router_aux_loss_coef=0 switches it off"
        )
    elif asked:
        rank_zero_info(f"no load-balancing loss is added, since router_aux_loss_coef is 0, although {by}")
    return {id(model) for model in module.model.modules()}


def _written(losses: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:g}" for name, value in losses.items())


def check_strategy(strategy: Any) -> None:
    """Refuses strategies with which results would depend on the ranks, or a run would deadlock.

    Raises:
        ValueError: FSDP1, DeepSpeed, or Lightning's own ``ModelParallelStrategy``.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is FSDPStrategy (FSDP1), which can neither step by hand nor clip the norm of a gradient "
            "over its shards: write strategy: fsdp2"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            "trainer.strategy is DeepSpeedStrategy, whose engine averages, clips and steps and needs equally "
            "many micro-batches on every rank: write strategy: fsdp2, which shards the same (ZeRO 3), or strategy: ddp"
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which leaves it to a module to shard itself, and hangs "
            "where ranks have different numbers of micro-batches: write strategy: fsdp2, or class_path: "
            "rlhf_lightning.FSDP2Strategy"
        )


def check_compiled(strategy: Any) -> None:
    """Refuses to compile layers under a strategy that shards them, or where torch cannot compile.

    Raises:
        ValueError: the strategy is ``fsdp2``, or there is no compiler for its device.
    """
    if isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            "compile is true with strategy 'fsdp2', which gathers each layer's weights around it, and has not been "
            "tested compiled: set compile to false, or use strategy: ddp"
        )
    check_compiler(strategy.root_device)


def trainer_dtype(trainer: Any) -> torch.dtype:
    """Returns the dtype of the weights under a trainer's precision; fp32 without a trainer."""
    precision = str(trainer.precision) if trainer is not None else "32-true"
    return {
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
        "64-true": torch.float64,
    }.get(precision, torch.float32)


def longest_sequence(module: Any) -> int | None:
    """Returns the maximum length of a sequence by the datamodule's options; ``None`` if it is unknown."""
    datamodule: Any = getattr(module._trainer, "datamodule", None)
    # A compressor's model, whose frequencies have to be the same, knows nothing of the rows.
    if not hasattr(datamodule, "max_length") or module.front is not None:
        return None
    if datamodule.max_length is None:
        return sys.maxsize
    # Rows of on-policy methods are prompts, and completions come on top.
    return int(datamodule.max_length) + int(getattr(module, "max_completion_length", 0))
