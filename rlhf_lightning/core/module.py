"""Base class of all methods: one batch is one optimizer step, however it is split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed.collectives import (
    Metrics,
    Rows,
    concatenate,
    gather_objects,
    gather_rows,
    sum_over_ranks,
    world_size,
)
from ..models import (
    TokenStats,
    base_model,
    load_causal_lm,
    load_tokenizer,
    num_positions,
    resolve_layout,
    token_stats,
)
from ..models import save_pretrained as export_pretrained
from ..models.backbone import fix_rotary_frequencies
from ..models.saving import export_kind
from ..sequences import Example, ExampleBatch, SequenceBatch, register_attention, register_flex_attention
from ..sequences.example import check_contract
from ..utils.files import check_replaceable
from .agreement import RankAgreement
from .checkpoint_io import prepare_checkpoints
from .exports import trained_end_tokens
from .gradients import clip_gradients, loss_scale, sum_gradients
from .hooks import check_optimizers, step_schedulers
from .logging import call_hooks, forget_others, log_settings
from .lr_schedules import WarmupSchedule
from .micro_batching import ROW_KEY, in_canonical_order
from .optimizers import build_optimizer, without_decay
from .position import ResumePosition
from .progress_bar import prepare_screen
from .resume import ResumableModule
from .router_loss import AUX_LOSS, RouterLoss, router_loss_of
from .stopping import StopOnSignal
from .trainer_checks import (
    check_module,
    check_module_options,
    check_trainer,
    longest_sequence,
    report_config_losses,
    trainer_dtype,
)

_STEPS = {"val": "validation_step", "test": "test_step"}


class PostTrainingModule(ResumableModule):
    """Loads a causal language model, runs packed micro-batches under global normalisers, and steps once per batch.

    Args:
        model: Hugging Face id or folder: weights, config, or a PEFT adapter.
        init: ``"pretrained"`` loads weights; ``"random"`` draws them from the config.
        tokenizer: id or folder, if not the model's.
        micro_batch_tokens: maximum number of tokens per forward, above 0; affects memory, not results.
        attention: kernel of the packed layout: ``"sdpa"``, or ``"flex"``: FlexAttention, which trains only on CUDA.
        layout: ``"packed"``, ``"padded"``, or ``"auto"``: packed where a probe shows that the model supports it.
        share_prefix: compute a prompt once for all its completions; does not affect results.
        lora: arguments of ``peft.LoraConfig`` (``{"r": 16}``); ``None`` trains all weights.
        quantization: ``"nf4"``, ``"fp4"`` or ``"int8"`` weights by bitsandbytes; needs ``lora``.
        dropout: rate in training, in [0, 1), which replaces all rates of the model's config and of ``lora``. ``None``
            is off, so that a policy is trained as it is scored and ratios begin at 1; in ``SFTModule`` it keeps the
            config's rates.
        gradient_checkpointing: recompute activations in the backward pass.
        router_aux_loss_coef: weight, at least 0, of the load-balancing loss of a mixture of experts, taken over the
            whole global batch (``losses.router``). ``None`` takes the coefficient of the model's config where its
            ``output_router_logits`` is true, and is 0 otherwise. Above 0, a step of several micro-batches or ranks
            takes one more forward. It is not part of the logged ``loss``, and not computed in validation.
        max_grad_norm: clip the global gradient norm to this, above 0; ``None`` does not clip.
        optimizer: function from parameters to an optimizer; by default AdamW at ``default_learning_rate`` without
            weight decay. Its weight decay is applied to matrices only.
        lr_scheduler: function from an optimizer to a scheduler, stepped once per optimizer step.

    Raises:
        ValueError: an option is out of range; the message names a valid value.
    """

    default_learning_rate: ClassVar[float] = 1e-5
    contracts: ClassVar[tuple[str, ...]] = ()  # datamodules whose rows are accepted; () for any
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss",)  # metrics in the progress bar

    def __init__(
        self,
        model: str,
        *,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer: str | None = None,
        micro_batch_tokens: int = 8192,
        attention: Literal["sdpa", "flex"] = "sdpa",
        layout: Literal["auto", "packed", "padded"] = "auto",
        share_prefix: bool = True,
        lora: dict[str, Any] | None = None,
        quantization: Literal["nf4", "fp4", "int8"] | None = None,
        dropout: float | None = None,
        gradient_checkpointing: bool = False,
        router_aux_loss_coef: float | None = None,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if not isinstance(model, str | PathLike):
            raise TypeError(
                f"model is a {type(model).__name__}; pass the folder or hub id that it came from, or write it with "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder), and pass the folder"
            )
        super().__init__(micro_batch_tokens=micro_batch_tokens, share_prefix=share_prefix)
        check_module_options(
            init=init,
            micro_batch_tokens=micro_batch_tokens,
            attention=attention,
            layout=layout,
            dropout=dropout,
            router_aux_loss_coef=router_aux_loss_coef,
            max_grad_norm=max_grad_norm,
        )

        # The batch, not Lightning, decides when to step: manual optimization.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.automatic_optimization = False
        self.model: Any = None
        self.model_source = str(model)
        self.init = init
        self.attention = attention
        self.lora = dict(lora) if lora is not None else None
        self.quantization = quantization
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.router_aux_loss_coef = router_aux_loss_coef
        self._router_loss: RouterLoss | None = None
        self.max_grad_norm = max_grad_norm
        self._tokenizer_source = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._requested_layout = layout
        self._layout: Literal["packed", "padded"] | None = None
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._is_configured = False
        # Rows and normalizers of the running validation or test epoch, by the index of the data loader.
        self._rows: dict[int, list[Rows]] = {}
        self._row_normalizers: dict[int, dict[str, float]] = {}

    # The model.

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model's output projection is used; if not, the checkpoint need not have one."""
        return True

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
                attn_implementation=register_attention() if self.attention == "sdpa" else register_flex_attention(),
                headless=not self.predicts_tokens,
            )
        fix_rotary_frequencies(self.model, longest=longest_sequence(self), head=self.predicts_tokens)
        self._router_loss = router_loss_of(self.model, self.router_aux_loss_coef)
        self.remember_base()
        self.train(self.training)
        self._is_configured = True

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
        """Moves and converts the module as torch does, but keeps the fp32 buffers of its models in fp32.

        Lightning's ``bf16-true`` and ``16-true`` convert everything. Models keep rotary frequencies in fp32: rounded,
        position 1000 is off by tenths of a radian. Done here rather than in a hook, so that no override can undo it.
        """
        models = [model for model in self.modules() if isinstance(model, PreTrainedModel)]
        owners = {id(owner): owner for model in models for owner in model.modules()}.values()
        exact = [(owner._buffers, name, b) for owner in owners for name, b in owner._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for buffers, name, before in exact:
            now = buffers[name]
            if before.dtype == torch.float32 and now is not None and now.dtype != before.dtype:
                buffers[name] = before.to(now.device)
        return self

    def place_on_device(self) -> None:
        """Places state that is not part of the module on its device; called before the first batch of any run."""

    def on_fit_start(self) -> None:
        """Checks the result of ``configure_optimizers``, calls ``place_on_device``, and logs the run's settings."""
        check_optimizers(self)
        report_config_losses(self)
        self.place_on_device()
        log_settings(self)

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

    @property
    def models_alike(self) -> list[nn.Module]:
        """Further models that run in the policy's layout."""
        return []

    def token_stats(self, batch: SequenceBatch, model: nn.Module | None = None, **options: Any) -> TokenStats:
        """Computes log-probs of a batch's scored tokens under the policy, or under another model of the same kind."""
        return token_stats(self.model if model is None else model, batch, self.layout, **options)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        """Groups parameters for the optimizer; a group's ``lr_ratio`` multiplies its learning rate."""
        return list(parameters)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer on the trainable parameters, and its scheduler."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "nothing is trainable: give lora={'r': 16}, leave quantization out, or call unfreeze() after freeze()"
            )
        build = self._optimizer or partial(AdamW, lr=self.default_learning_rate, weight_decay=0.0, fused=True)
        optimizer = build_optimizer(build, self.parameter_groups(parameters), without_decay(self))
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler is ReduceLROnPlateau, which waits for a metric; schedules step with every optimizer step "
                "here: use rlhf_lightning.core.WarmupSchedule or another torch schedule, or override "
                "configure_optimizers and return it with its monitor"
            )
        if isinstance(scheduler, WarmupSchedule) and scheduler.total_steps is None:
            scheduler.set_total_steps(self._num_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> int:
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
        self._log("train", values)
        if self.trainer.is_last_batch:
            step_schedulers(self, "epoch")
        batch.mark_consumed()
        return values or None

    def optimize(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, float], Rows]:
        """Makes one optimizer step on a global batch; every rank calls it with its own part, which may be empty.

        Args:
            examples: this rank's part.

        Returns:
            The detached rows of the whole global batch, its normalizers, and further logged values: the gradient's
            norm, the learning rate, and the load-balancing loss where it is trained.
        """
        if self.attention == "flex" and self.device.type != "cuda":
            raise ValueError(f"attention is 'flex' on {self.device.type}, where it has no backward pass: use 'sdpa'")
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        with self._local_gradients(), self._summed_gradients(), self.phase("forward_backward"):
            rows, normalizers = self.backward_examples(examples)
        with self.phase("step"):
            sum_gradients(p for p in self.parameters() if p.requires_grad)
            grad_norm, rate = self._clip(), torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32)
            self._check_gradient(grad_norm, examples)
            scale = loss_scale(self.trainer)
            optimizer.step()
            call_hooks(self.trainer, "on_before_zero_grad", optimizer.optimizer)
            optimizer.zero_grad()
            if loss_scale(self.trainer) >= scale:  # after an fp16 overflow the scale falls and no step was made
                step_schedulers(self, "step")
                step_schedulers(self, "step", waiting=True)
        progress = {"grad_norm": grad_norm, "learning_rate": rate}
        if AUX_LOSS in normalizers:
            progress[AUX_LOSS] = torch.tensor(normalizers.pop(AUX_LOSS), dtype=torch.float64)
        return gather_rows(rows, self.device), normalizers, progress

    def _local_gradients(self) -> AbstractContextManager[None]:
        """Disables DDP's gradient averaging: ranks may run different numbers of micro-batches, zero included."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks that the examples of a batch fit the model and returns them; a method adds its own checks.

        Raises:
            ValueError: with the row, what is wrong with it, and what to do.
        """
        if not isinstance(batch, ExampleBatch):
            raise TypeError(
                f"{type(self).__name__} was given a {type(batch).__name__}; it needs an ExampleBatch: use one of "
                "rlhf_lightning.datamodules, or wrap your examples in rlhf_lightning.sequences.ExampleBatch"
            )
        check_contract(self, batch.contract)
        positions = num_positions(self.model)
        embeddings: Any = base_model(self.model).get_input_embeddings()
        vocab_size = int(embeddings.weight.shape[0])
        for example in batch.examples:
            for path in example.root.paths():
                length = sum(len(segment.tokens) for segment in path)
                if positions is not None and length > positions:
                    raise ValueError(
                        f"row {example.row_id} has {length} tokens, the model has {positions} positions: set the "
                        f"datamodule's max_length to {positions} or less"
                    )
                ends = [int(end) for segment in path for end in (segment.tokens.min(), segment.tokens.max())]
                if min(ends) < 0 or max(ends) >= vocab_size:
                    wrong = min(ends) if min(ends) < 0 else max(ends)
                    raise ValueError(
                        f"row {example.row_id} has token {wrong}, the model's vocabulary has {vocab_size}: the "
                        "tokenizer is not this model's"
                    )
        return batch.examples

    def _clip(self) -> Tensor:
        scale = loss_scale(self.trainer)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm * scale
        return clip_gradients((p for p in self.parameters() if p.requires_grad), limit) / scale

    def _check_gradient(self, grad_norm: Tensor, examples: Sequence[Example]) -> None:
        """Raises before a step with a non-finite gradient; fp16's gradient scaler skips such steps instead."""
        if bool(torch.isfinite(grad_norm)) or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        self.zero_grad()
        rows = ", ".join(example.row_id for example in examples[:3]) + (", ..." if len(examples) > 3 else "")
        # The norm is the same on all ranks, so all raise, with the rows of every rank.
        if world_size() > 1:
            rows = "; ".join(f"of rank {n}: {part}" for n, part in enumerate(gather_objects(rows)) if part)
        raise ValueError(
            f"the gradient's norm is {float(grad_norm)} in step {self.trainer.global_step + 1} (rows {rows}); the "
            "weights are still those of the step before: look at these rows, or lower the learning rate"
        )

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
        super().on_validation_epoch_start()
        self._rows, self._row_normalizers = {}, {}

    def on_test_epoch_start(self) -> None:
        """Discards the rows of an interrupted test."""
        self._rows, self._row_normalizers = {}, {}

    def on_validation_epoch_end(self) -> None:
        """Logs loss and metrics of the validation set."""
        self._log_loaders("val", len(self.trainer.num_val_batches))

    def on_test_epoch_end(self) -> None:
        """Logs loss and metrics of the test set."""
        self._log_loaders("test", len(self.trainer.num_test_batches))

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows and returns one dictionary per row, with ``row_id`` and every score.

        On several ranks, these are this rank's rows, every ``world_size``-th of a batch: ``PredictionWriter`` merges
        all ranks in order.
        """
        examples = self.validate_batch(batch)
        rows = self.score_examples(examples)
        names = [name for name in rows if name != ROW_KEY]
        values = {name: rows[name].tolist() for name in names}
        return [{"row_id": e.row_id} | {name: values[name][n] for name in names} for n, e in enumerate(examples)]

    def _collect(self, batch: ExampleBatch, loader: int = 0) -> None:
        examples = self.validate_batch(batch)
        if examples:
            self._rows.setdefault(loader, []).append(self.score_examples(examples))
            counts = self._row_normalizers.setdefault(loader, {})
            for name, count in self.normalizers(examples).items():
                counts[name] = counts.get(name, 0.0) + count
        batch.mark_consumed()

    def _log_loaders(self, stage: str, num_loaders: int) -> None:
        """Logs the loss and metrics of each data loader, and warns about one without rows."""
        kept, self._rows = self._rows, {}
        counted, self._row_normalizers = self._row_normalizers, {}
        for loader in range(num_loaders):
            values = self._collected(kept.get(loader, []), counted.get(loader, {}))
            if values:
                self._log(stage, values, suffix=f"/dataloader_idx_{loader}" if num_loaders > 1 else "")
            elif _STEPS[stage] in self.hooks_reached:  # otherwise a subclass has overridden the step
                warnings.warn(f"the {stage} set has no rows: nothing is logged for it", stacklevel=2)

    def _collected(self, kept: list[Rows], counts: dict[str, float]) -> Metrics:
        """Computes loss and metrics of the collected rows of all ranks; empty where there are none."""
        normalizers = sum_over_ranks(counts or self.normalizers([]), self.device)
        rows = gather_rows(concatenate(kept), self.device)
        return self._summary(rows, normalizers | self._statistics(rows, normalizers)) if rows else {}

    @torch.no_grad()
    def _summary(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes loss and metrics of a global batch."""
        rows = in_canonical_order(rows)
        return {"loss": self.loss(rows, normalizers)} | self.metrics(rows, normalizers)

    def _log(self, stage: str, values: Metrics, suffix: str = "") -> None:
        shown = {f"{stage}/{name}{suffix}": value.detach().float() for name, value in values.items()}
        bar = {f"{stage}/{name}{suffix}" for name in self.progress_metrics}
        if stage == "train":
            forget_others(self.trainer, shown)
        for name, value in shown.items():
            self.log(
                name,
                value,
                prog_bar=name in bar,
                on_step=stage == "train",
                on_epoch=stage != "train",
                batch_size=1,
                add_dataloader_idx=not suffix,
            )

    # Export.

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes a plain Hugging Face folder with the tokenizer; of a LoRA model only the adapter, unless merged.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
        """
        self.configure_model()
        tokenizer = self._export_tokenizer()
        ends = trained_end_tokens(self, tokenizer)
        export_pretrained(self.model, tokenizer, folder, merge_adapter=merge_adapter, end_tokens=ends)

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
