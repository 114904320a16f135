"""Base class of all methods: one batch is one optimizer step, however it is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from ..distributed.collectives import Metrics, Rows, gather_rows, sum_over_ranks
from ..distributed.host_group import set_timeout
from ..distributed.whole_gradients import without_buckets
from ..models import Reference, TokenStats, load_causal_lm, load_tokenizer, resolve_layout, token_stats
from ..models import save_pretrained as export_pretrained
from ..models.backbone import fix_rotary_frequencies
from ..models.dropout import switch_off_dropout
from ..models.half_weights import hold_frozen, rounded, widen_trained
from ..models.own_attention import avoid_cudnn_attention
from ..models.saving import export_kind
from ..sequences import AttentionKernel, Example, ExampleBatch, SequenceBatch, register_attention
from ..utils.files import check_replaceable
from ..utils.keywords import refuse_unknown
from ..utils.transfer import to_host
from .agreement import RankAgreement
from .attention_report import reported_attention
from .batch_checks import check_batch
from .checkpoint_io import prepare_checkpoints
from .device_precision import autocast_dtype
from .exports import trained_end_tokens
from .front import check_front, front_of, save_front
from .gradients import check_gradient, clip_gradients, loss_scale, sum_gradients
from .hooks import check_optimizers, step_schedulers, wrap_hooks
from .logging import call_hooks, log_settings, log_values
from .micro_batching import ROW_KEY, MicroBatching, in_canonical_order
from .optimizers import build_optimizer_and_scheduler, check_lr_ratios, group_parameters
from .position import ResumePosition
from .precision import apply_in_fp32
from .progress_bar import prepare_screen
from .reference_policy import ReferencePolicy
from .resume import ResumeState, adapted_models
from .router_loss import AUX_LOSS, RouterLoss, router_loss_of
from .stopping import StopOnSignal
from .timing import PhaseClock
from .trainer_checks import (
    check_compiled,
    check_module,
    check_module_options,
    check_trainer,
    longest_sequence,
    report_config_losses,
    trainer_dtype,
)
from .validation_rows import ValidationRows


class PostTrainingModule(lightning.LightningModule):
    """Loads a causal language model, runs packed micro-batches under global normalizers, and steps once per batch.

    A method overrides what stands under *The interface of a method*: ``grad_rows`` and ``loss`` at least. The work is
    done by parts that a module holds: ``micro_batching`` (passes), ``resume`` (checkpoints), ``validation_rows``, and
    ``reference`` where a method compares the policy with the one that training began with.

    Args:
        model: Hugging Face id or folder: weights, config, or a PEFT adapter.
        init: ``"pretrained"`` loads weights; ``"random"`` draws them from the config.
        tokenizer: id or folder, if not the model's.
        micro_batch_tokens: maximum number of tokens per forward, above 0; affects memory, not results.
        attention: kernel of the packed layout; does not affect results. ``"blocks"``: scaled-dot-product attention of
            padded blocks; ``"cascade"``: flash attention along the tree, on CUDA in half precision; ``"flex"``:
            FlexAttention, which trains only on CUDA; ``"auto"``: the fastest that applies (``tree_attention``).
        layout: ``"packed"``, ``"padded"``, or ``"auto"``: packed where a probe shows that the model supports it.
        share_prefix: compute a prompt once for all its completions; does not affect results.
        lora: arguments of ``peft.LoraConfig`` (``{"r": 16}``); ``None`` trains all weights.
        quantization: ``"nf4"``, ``"fp4"`` or ``"int8"`` weights by bitsandbytes; needs ``lora``.
        dropout: rate in training, in [0, 1), which replaces all rates of the model's config and of ``lora``. ``None``
            is off, so that a policy is trained as it is scored and ratios begin at 1; in ``SFTModule`` it keeps the
            config's rates.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: run the policy's decoder layers, and those of its frozen reference and of a separate critic, through
            ``torch.compile``; results change by rounding, and with dropout its draws. For GPUs: the first steps take
            a minute or more longer, and all others fewer launches. In the packed layout, and not with
            ``quantization``, mixtures of experts or ``fsdp2``.
        compressor: folder or hub id of a ``ContextCompressor`` that was trained for ``model``. It stays as it is, and
            rows need a column ``context``: policy and reference see its summaries alone, then the prompt. ``model`` may
            have been trained with it already. In the packed layout, and not with ``quantization`` or ``compile``.
        router_aux_loss_coef: weight, at least 0, of the load-balancing loss of a mixture of experts, taken over the
            whole global batch (``losses.router``). ``None`` takes the coefficient of the model's config where its
            ``output_router_logits`` is true, and is 0 otherwise. Above 0, a step of several micro-batches or ranks
            takes one more forward. It is not part of the logged ``loss``, and not computed in validation.
        max_grad_norm: clip the global gradient norm to this, above 0; ``None`` does not clip.
        optimizer: function from parameters to an optimizer; by default AdamW at ``default_learning_rate`` without
            weight decay. Its weight decay is applied to matrices only.
        lr_ratios: learning rates relative to the optimizer's, above 0, by regular expressions that are searched for in
            parameters' names (``{"lm_head|embed": 0.1}``); of several that match, the first counts. Every one must
            match a trained parameter.
        layer_lr_decay: d in (0, 1]: of L decoder layers, the one with number i from 0 has a learning rate of
            d^(L - 1 - i) times the optimizer's, and input embeddings d^L; it multiplies ``lr_ratios``. ``None`` is off.
        lr_scheduler: function from an optimizer to a scheduler, stepped once per optimizer step.
        unknown: options that do not exist.

    Raises:
        TypeError: an option does not exist; the message suggests another.
        ValueError: an option is out of range; the message names a valid value.
    """

    default_learning_rate: ClassVar[float] = 1e-5
    contracts: ClassVar[tuple[str, ...]] = ()  # datamodules whose rows are accepted; () for any
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss",)  # metrics in the progress bar
    takes_compressor: ClassVar[bool] = True  # whether it learns from rows after compressed contexts
    keeps_dropout: ClassVar[bool] = False  # whether dropout=None means the rates of the model's config
    of_validation: ClassVar[tuple[str, ...]] = ("validation_rows",)  # attributes that a validation replaces

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        wrap_hooks(cls)

    def __init__(
        self,
        model: str,
        *,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer: str | None = None,
        micro_batch_tokens: int = 8192,
        attention: AttentionKernel = "auto",
        layout: Literal["auto", "packed", "padded"] = "auto",
        share_prefix: bool = True,
        lora: dict[str, Any] | None = None,
        quantization: Literal["nf4", "fp4", "int8"] | None = None,
        dropout: float | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        compressor: str | None = None,
        router_aux_loss_coef: float | None = None,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_ratios: dict[str, float] | None = None,
        layer_lr_decay: float | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        if not isinstance(model, str | PathLike):
            raise TypeError(
                f"model is a {type(model).__name__}; pass the folder or hub id that it came from, or write it with "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder), and pass the folder"
            )
        super().__init__()
        check_module_options(
            init=init,
            micro_batch_tokens=micro_batch_tokens,
            attention=attention,
            layout=layout,
            compiled=compile,
            quantization=quantization,
            dropout=dropout,
            router_aux_loss_coef=router_aux_loss_coef,
            max_grad_norm=max_grad_norm,
        )
        check_lr_ratios(lr_ratios, layer_lr_decay)

        # The batch, not Lightning, decides when to step: manual optimization.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.automatic_optimization = False
        self.model: Any = None
        self.model_source = str(model)
        self.init = init
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefix = share_prefix
        self.attention = attention
        self.lora = dict(lora) if lora is not None else None
        self.quantization = quantization
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles_layers = compile
        self.router_aux_loss_coef = router_aux_loss_coef
        self._router_loss: RouterLoss | None = None
        self.max_grad_norm = max_grad_norm
        self.lr_ratios = None if lr_ratios is None else dict(lr_ratios)
        self.layer_lr_decay = layer_lr_decay
        self._tokenizer_source = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._requested_layout = layout
        self._layout: Literal["packed", "padded"] | None = None
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._is_configured = False
        self.attention_in_use: str | None = None  # known after the first step

        # The parts.
        self.front = front_of(self, compressor)
        self.micro_batching = MicroBatching(self)
        self.resume = ResumeState(self)
        self.validation_rows = ValidationRows(self)
        self.reference: ReferencePolicy | None = None  # set by methods that use one
        self.clock: PhaseClock | None = None  # set by callbacks that measure time
        self.hooks_reached: set[str] = set()  # names of the core's hooks that have run
        # By the id of a scheduler: the monitored metric, and whether it is required.
        self.scheduler_monitors: dict[int, tuple[str | None, bool]] = {}

    # The interface of a method.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the counts of these examples that the loss is divided by; they are summed over all ranks."""
        return {"examples": float(len(examples))}

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Makes arrays of what else losses read of examples; they travel with the batch, see ``extra``."""
        return {}

    def example_parts(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """Makes examples of further batches that rows are computed of; they travel along as ``batch.also``."""
        return {}

    def extra(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Returns the ``example_arrays`` of a batch, on its device."""
        return self.micro_batching.extra(batch)

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes rows that carry no gradient; called once per micro-batch, under ``torch.no_grad``."""
        return {}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes rows that carry gradient."""
        raise TypeError(f"{type(self).__name__} must define grad_rows(batch)")

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Computes the rows' share of the loss: a sum over them, divided by the global normalizers."""
        raise TypeError(f"{type(self).__name__} must define loss(rows, normalizers)")

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes logged metrics from the rows of a whole global batch or validation set."""
        return {}

    @property
    def couples_rows(self) -> bool:
        """Whether a row's loss depends on the other rows of the global batch."""
        return False

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a row's loss reads ``batch_statistics`` of the whole global batch's ``no_grad_rows``."""
        return False

    def batch_statistics(self, no_grad_rows: Rows, normalizers: dict[str, float]) -> dict[str, float]:
        """Computes statistics of the no-grad rows of *all* examples; they are added to the normalizers.

        A loss that couples rows by its no-grad rows alone (KTO's KL estimate) needs no second pass then.
        """
        return {}

    def after_step(self, rows: Rows, normalizers: dict[str, float]) -> None:
        """Updates running estimates after the step of a global batch; called with the same rows on every rank."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss or the rewards compare with a reference policy, in a method that holds one."""
        return True

    def reference_rows(self, batch: SequenceBatch, model: nn.Module) -> Rows:
        """Computes the reference's rows of a batch, each from the content of its own example alone."""
        raise TypeError(f"{type(self).__name__} must define reference_rows(batch, model)")

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model's output projection is used; if not, the checkpoint need not have one."""
        return True

    @property
    def drops(self) -> bool:
        """Whether dropout is active in training; if not, the policy is trained as it is scored."""
        return self.keeps_dropout if self.dropout is None else self.dropout > 0

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks that the examples of a batch fit the model and returns them; a method adds its own checks.

        Raises:
            ValueError: with the row, what is wrong with it, and what to do.
        """
        if self.front is not None and isinstance(batch, ExampleBatch):
            batch = self.front.follow(batch)
        return check_batch(self, batch)

    # The model.

    def configure_model(self) -> None:
        """Builds the model once, in the dtype of the trainer's precision.

        Called by ``fit``; call it earlier to inspect or freeze weights. A subclass may build ``self.model`` itself.
        """
        if self.is_configured:
            return
        if self.model is None:
            self.model = load_causal_lm(
                self.model_source,
                init=self.init,
                dtype=trainer_dtype(self._trainer),
                quantization=self.quantization,
                lora=self.lora,
                dropout=self.dropout,
                gradient_checkpointing=self.gradient_checkpointing,
                compile=self.compiles_layers,
                attn_implementation=register_attention(self.attention),
                headless=not self.predicts_tokens,
            )
        fix_rotary_frequencies(self.model, longest=longest_sequence(self), head=self.predicts_tokens)
        self._router_loss = router_loss_of(self.model, self.router_aux_loss_coef)
        self.resume.remember_base()
        self.train(self.training)
        self._is_configured = True
        if self.front is not None:
            self.front.build()
        if self.reference is not None:
            self.reference.build()

    @property
    def is_configured(self) -> bool:
        """Whether the model has been built."""
        return self._is_configured

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss of the policy's routers, if it is requested and the policy is trainable."""
        loss = self._router_loss
        return loss if loss is not None and any(p.requires_grad for p in loss.model.parameters()) else None

    def freeze(self) -> Self:
        """Freezes all parameters as Lightning does, building the model first if needed."""
        self.configure_model()
        super().freeze()
        return self

    def unfreeze(self) -> Self:
        """Unfreezes all parameters as Lightning does, building the model first if needed."""
        self.configure_model()
        super().unfreeze()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts as torch does, but keeps what must stay in fp32; no hook that overrides it can undo this."""
        apply_in_fp32(self, fn, partial(super()._apply, recurse=recurse))
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as torch does; without dropout, the models within stay in evaluation mode."""
        super().train(mode)
        if mode and not self.drops:
            switch_off_dropout(self)
        return self

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measures the time of a block as one of ``timing.PHASES``; does nothing without a clock."""
        return nullcontext() if self.clock is None else self.clock.phase(name)

    @property
    def references(self) -> list[Reference]:
        """The reference policy in a list, which is empty where none is in memory."""
        return [] if self.reference is None else self.reference.policies

    @property
    def models_alike(self) -> list[nn.Module]:
        """Further models that run in the policy's layout."""
        return [] if self.reference is None else self.reference.models

    # The hooks of a run.

    def place_on_device(self) -> None:
        """Places state that is not part of the module on its device; called before the first batch of any run."""
        if self.front is not None:
            self.front.forget()
        if self.reference is not None:
            self.reference.place_on_device()

    def rounded_weights(self) -> AbstractContextManager[None]:
        """Rounds the weights of all passes within once, where autocast would do so in each; changes no result."""
        return rounded(self, *self.models_alike)

    def on_fit_start(self) -> None:
        """Checks the result of ``configure_optimizers``, logs the run's settings, and prepares the reference."""
        check_optimizers(self)
        report_config_losses(self)
        hold_frozen(self, autocast_dtype(self.trainer))
        self.place_on_device()
        log_settings(self)
        if self.reference is not None:
            self.reference.begin_fit()

    def on_train_start(self) -> None:
        """Restores the random states of a checkpoint."""
        self.resume.begin_training()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restores random states once more in mid-epoch, and the precision of weights that were unfrozen."""
        self.resume.begin_batch(batch_idx)
        widen_trained(self, autocast_dtype(self.trainer))

    def on_train_epoch_end(self) -> None:
        """Steps epoch-wise schedulers that monitor a metric, which validation may have logged."""
        step_schedulers(self, "epoch", waiting=True)

    def on_validation_start(self) -> None:
        """Calls ``place_on_device`` before the first batch."""
        self.place_on_device()

    def on_test_start(self) -> None:
        """Calls ``place_on_device`` before the first batch."""
        self.place_on_device()

    def on_predict_start(self) -> None:
        """Calls ``place_on_device`` before the first batch."""
        self.place_on_device()

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Checks the trainer's flags before Lightning's own checks, and returns the callbacks that every run needs."""
        check_trainer(self.trainer)
        check_module(self)
        if self.compiles_layers:
            check_compiled(self.trainer.strategy)
        avoid_cudnn_attention(self.trainer.strategy.root_device)
        without_buckets(self.trainer.strategy)
        set_timeout(getattr(self.trainer.strategy, "_timeout", None))
        prepare_checkpoints(self.trainer)
        prepare_screen(self.trainer)
        run = self.trainer.state.fn
        for logger in self.trainer.loggers:
            if hasattr(logger, "begin"):
                logger.begin("fit" if run is None else run.value)
        trainer: Any = self.trainer
        present = {type(callback) for callback in trainer.callbacks}
        return [make() for make in (RankAgreement, ResumePosition, StopOnSignal) if make not in present]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The given tokenizer, else the model's."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_source or self.model_source)
        return self._tokenizer

    @property
    def layout(self) -> Literal["packed", "padded"]:
        """The layout of batches; decided once, when the model is on its device."""
        if self._layout is None:
            self._layout = resolve_layout(self.model, self._requested_layout, *self.models_alike)
        return self._layout

    def decide_layout(self) -> None:
        """Decides the layout of batches."""
        assert self.layout

    def token_stats(self, batch: SequenceBatch, model: nn.Module | None = None, **options: Any) -> TokenStats:
        """Computes log-probs of a batch's scored tokens under the policy, or under another model of the same kind."""
        self.place_contexts(batch)
        return token_stats(self.model if model is None else model, batch, self.layout, **options)

    def place_contexts(self, batch: SequenceBatch) -> None:
        """Gives a batch the states of the contexts that its trees follow, before a model runs it."""
        if self.front is not None:
            self.front.attach(batch)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        """Groups parameters for the optimizer; a group's ``lr_ratio`` multiplies its learning rate."""
        return group_parameters(self, parameters, self.lr_ratios, self.layer_lr_decay)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer on the trainable parameters, and its scheduler."""
        build = self._optimizer or partial(AdamW, lr=self.default_learning_rate, weight_decay=0.0, fused=True)
        return build_optimizer_and_scheduler(self, build, self._lr_scheduler)

    def num_steps(self) -> int:
        """Returns the number of optimizer steps of the whole run, for a schedule without its own.

        Raises:
            ValueError: the run has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps in (float("inf"), -1):
            raise ValueError("the schedule has no end: set trainer.max_steps, or total_steps of the lr_scheduler")
        return int(steps)

    # One batch, one step.

    def training_step(self, batch: ExampleBatch, batch_idx: int) -> Metrics | None:
        """Trains on a batch of examples: micro-batches, one clipped step, metrics of the global batch.

        Returns:
            The ``outputs`` of callbacks: ``loss`` and all other logged values of the step, by their names without
            ``train/``; ``None`` where a streamed batch has lost all its rows.
        """
        rows, normalizers, progress = self.optimize(self.validate_batch(batch))
        values = self._summary(rows, normalizers) | progress if rows else {}
        if rows:
            self.after_step(rows, normalizers)
        return self._finish_batch(batch, values)

    def _finish_batch(self, batch: ExampleBatch, values: Metrics) -> Metrics | None:
        """Logs a batch's values, steps epoch-wise schedulers after the last batch, and counts the batch as used."""
        log_values(self, "train", values)
        if self.trainer.is_last_batch:
            step_schedulers(self, "epoch")
        batch.mark_consumed()
        return values or None

    def optimize(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, float], Metrics]:
        """Makes one optimizer step on a global batch; every rank calls it with its own part, which may be empty.

        Args:
            examples: this rank's part.

        Returns:
            The detached rows of the whole global batch in host memory, its normalizers, and further logged values: the
            gradient's norm, the learning rate, and the load-balancing loss where it is trained.
        """
        if self.attention == "flex" and self.device.type != "cuda":
            raise ValueError(f"attention is 'flex' on {self.device.type}, where it has no backward pass: use 'auto'")
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        with self.micro_batching.summed_gradients(), self.phase("forward_backward"), reported_attention(self):
            rows, normalizers = self.backward_examples(examples)
        with self.phase("step"):
            sum_gradients(p for p in self.parameters() if p.requires_grad)
            scale, rate = loss_scale(self.trainer), torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32)
            progress: Metrics = {"grad_norm": self._clip(scale)}
            if AUX_LOSS in normalizers:
                progress[AUX_LOSS] = normalizers.pop(AUX_LOSS)

            # The one place of a step where the host waits for the device: for everything that is read of it.
            read = to_host(dict(enumerate([*rows.values(), *progress.values()])))
            rows = {name: read[number] for number, name in enumerate(rows)}
            progress = {name: read[len(rows) + number] for number, name in enumerate(progress)}
            check_gradient(self, float(progress["grad_norm"]), examples)
            optimizer.step()
            call_hooks(self.trainer, "on_before_zero_grad", optimizer.optimizer)
            optimizer.zero_grad()
            if loss_scale(self.trainer) >= scale:  # after an fp16 overflow the scale falls and no step was made
                step_schedulers(self, "step")
                step_schedulers(self, "step", waiting=True)
        return gather_rows(rows), normalizers, progress | {"learning_rate": rate}

    def backward_examples(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, Any]]:
        """Accumulates this rank's part of the gradient of the global batch's loss.

        Returns:
            This rank's rows, detached, and the global normalizers, which include the load-balancing loss where it is
            trained, as a tensor.
        """
        return self.micro_batching.backward(examples)

    def _clip(self, scale: float) -> Tensor:
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm * scale
        return clip_gradients((p for p in self.parameters() if p.requires_grad), limit) / scale

    # Validation: rows are collected, then loss and metrics of the whole set are computed.

    def validation_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch and keeps its rows; results do not depend on how the set is batched.

        With several data loaders each is logged separately, under Lightning's names: ``val/loss/dataloader_idx_1``.
        """
        self._collect(batch, dataloader_idx)

    def test_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch and keeps its rows, as ``validation_step`` does."""
        self._collect(batch, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Discards the rows of an interrupted validation."""
        self.resume.begin_validation()
        self.validation_rows.clear()

    def on_test_epoch_start(self) -> None:
        """Discards the rows of an interrupted test."""
        self.validation_rows.clear()

    def on_validation_epoch_end(self) -> None:
        """Logs loss and metrics of the validation set."""
        self.validation_rows.log("val", len(self.trainer.num_val_batches))

    def on_test_epoch_end(self) -> None:
        """Logs loss and metrics of the test set."""
        self.validation_rows.log("test", len(self.trainer.num_test_batches))

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows and returns one dictionary per row, with ``row_id`` and every score.

        On several ranks, these are this rank's rows, every ``world_size``-th of a batch: ``PredictionWriter`` merges
        all ranks in order.
        """
        examples = self.validate_batch(batch)
        rows = to_host(self.score_examples(examples))
        names = [name for name in rows if name != ROW_KEY]
        values = {name: rows[name].tolist() for name in names}
        return [{"row_id": e.row_id} | {name: values[name][n] for name in names} for n, e in enumerate(examples)]

    def _collect(self, batch: ExampleBatch, loader: int = 0) -> None:
        examples = self.validate_batch(batch)
        if examples:
            self.validation_rows.add(loader, self.score_examples(examples), self.normalizers(examples))
        batch.mark_consumed()

    def summarize(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes loss and metrics of the rows of all ranks of a validation or test set; the rows may be none."""
        totals = sum_over_ranks(normalizers or self.normalizers([]))
        gathered = gather_rows(rows)
        return self._summary(gathered, totals | self.micro_batching.statistics(gathered, totals)) if gathered else {}

    def score_examples(self, examples: Sequence[Example]) -> Rows:
        """Scores examples without gradient in micro-batches, and returns rows in the order of ``examples``."""
        return self.micro_batching.score(examples)

    @torch.no_grad()
    def _summary(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes loss and metrics of a global batch."""
        rows = in_canonical_order(rows)
        return {"loss": self.loss(rows, normalizers)} | self.metrics(rows, normalizers)

    # Checkpoints.

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold every weight: not with an adapter, where ``on_load_checkpoint`` checks it."""
        if self._strict_loading is not None:
            return self._strict_loading
        return self.model is not None and not adapted_models(self)

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self._strict_loading = strict_loading

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the random states and what a reference cannot rebuild; removes the frozen weights under adapters."""
        self.resume.save(checkpoint)
        save_front(self.front, checkpoint)
        if self.reference is not None:
            self.reference.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits this model, and restores the reference."""
        self.resume.load(checkpoint)
        check_front(self.front, checkpoint)
        if self.reference is not None:
            self.reference.load(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights as torch does, building the model first; frozen weights of an adapted model may be missing."""
        if self.model is None and state_dict:
            self.configure_model()  # strategies that fork pass a trained state to a module that is not built
        return self.resume.load_weights(partial(super().load_state_dict, assign=assign), state_dict, strict=strict)

    # Export.

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes a plain Hugging Face folder with the tokenizer; of a LoRA model only the adapter, unless merged.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
        """
        self.configure_model()
        tokenizer = self._export_tokenizer()
        ends, note = trained_end_tokens(self, tokenizer), None if self.front is None else self.front.note()
        export_pretrained(self.model, tokenizer, folder, merge_adapter=merge_adapter, note=note, end_tokens=ends)

    def check_export(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Checks before training that ``save_pretrained`` will be allowed to replace a folder.

        Args:
            folder: destination.
            merge_adapter: as for ``save_pretrained``.

        Raises:
            ValueError: the folder holds something other than an export of the same kind.
        """
        self.configure_model()
        kind = export_kind(self.model, merge_adapter=merge_adapter, with_head=self.exports_head)
        check_replaceable(Path(folder).expanduser().resolve(), kind)

    @property
    def exports_head(self) -> bool:
        """Whether a head is written with the model."""
        return False

    def _export_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the module's tokenizer, else the datamodule's, else the model folder's."""
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        given = getattr(datamodule, "tokenizer", None)
        if self._tokenizer_source is None and isinstance(given, PreTrainedTokenizerBase):
            return given
        return self.tokenizer


wrap_hooks(PostTrainingModule)
