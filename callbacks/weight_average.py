"""Averages the weights over training, and uses the average in evaluation and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from ..core import PostTrainingModule
from .trained_weights import copied, exact, placed, put, settled_weights, trained_weights


class WeightAverage(lightning.Callback):
    r"""Keeps an exponential moving average of the trained weights, and uses it in evaluation and exports.

    Papers: Polyak & Juditsky, 1992; Averaging Weights Leads to Wider Optima (Izmailov et al., 2018, arXiv:1803.05407);
    the bias correction is Adam's (Kingma & Ba, 2015, arXiv:1412.6980, section 3). After optimizer step t,

    .. math:: a_t = a_{t-1} + \frac{1 - d}{1 - d^t} (w_t - a_{t-1}),
        \qquad\text{so}\qquad a_t = \frac{1 - d}{1 - d^t} \sum_{k=1}^{t} d^{t-k} w_k

    so no warm-up is needed: the first average is the weights after the first step, and does not contain the initial
    ones. With d = 1 the factor is 1 / t: the plain mean.

    Training continues with its own weights. Validation (including ``GenerationAccuracy`` and ``SampleLogger``), test
    and predict of the same trainer, and the exports (``save_pretrained``, ``save_critic``, ``ModelExport``) use the
    average. A checkpoint holds both, and a resumed run continues with both. Only trained weights are averaged: with
    LoRA the adapter, never a reference; every optimizer step counts, also where a batch makes several of them. Where
    weights are sharded (``fsdp2``), so is their average; checkpoints hold it whole, and move between strategies and
    numbers of ranks.

    Unlike this callback, Lightning's ``EMAWeightAveraging`` copies the whole module, including frozen weights and
    references, counts batches, shows training weights to hooks at the end of validation, and cannot be sharded.

    Args:
        decay: d, in [0, 1]; the average covers about the last 1 / (1 - d) steps.
        start_step: number of initial optimizer steps to skip, at least 0.

    Raises:
        ValueError: a number out of range, a module that is not a ``PostTrainingModule``, or a checkpoint whose average
            is of other weights.

    Example::

        callbacks = [WeightAverage(decay=0.99), ModelExport("runs/dpo/model")]
        lightning.Trainer(callbacks=callbacks).fit(module, data)
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        if isinstance(decay, bool) or not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay!r}; it must be in [0, 1] (0.99 averages about 100 steps, 1 all of them)")
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step is {start_step!r}; it must be a whole number of at least 0")
        self.decay = decay
        self.start_step = start_step
        self.num_steps = 0  # of the optimizer, including those before start_step
        self.average: dict[str, Tensor] = {}
        self._is_loaded = False  # whether the average is from a checkpoint: whole, and on the CPU
        self._module: PostTrainingModule | None = None
        self._own: dict[str, Tensor] | None = None  # the training weights while the average replaces them
        self._hook: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Resets the average for a new module, and makes its exports use the average."""
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"WeightAverage needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        if self._module is pl_module:
            return
        self.num_steps, self.average, self._is_loaded, self._module = 0, {}, False, pl_module

        # On the instance, since exports of other modules must not change.
        attributes = vars(pl_module)
        for name in ("save_pretrained", "save_critic"):
            attributes.pop(name, None)  # of an earlier average
            if (export := getattr(pl_module, name, None)) is not None:
                attributes[name] = self._averaged(export)

    def _averaged(self, export: Callable[..., None]) -> Callable[..., None]:
        @wraps(export)
        def averaged(*args: Any, **kwargs: Any) -> None:
            with self.shown():
                export(*args, **kwargs)

        return averaged

    # Training.

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Moves a loaded average to the devices of the weights, and hooks into the optimizer's steps."""
        self._place()
        self._unhook()  # a run that was rewound begins again
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._step())

    @torch.no_grad()
    def _step(self) -> None:
        self.num_steps += 1
        count = self.num_steps - self.start_step
        if count < 1:
            return
        trained = self._trained()
        # A checkpoint that was made without this callback has no average: it begins where the run resumes.
        if not self.average:
            self.average = {name: exact(weight).clone() for name, weight in trained.items()}
            self.start_step = self.num_steps - 1
            return

        # Adam's bias correction: the initial weights are not in the average.
        factor = 1 / count if self.decay == 1 else (1 - self.decay) / (1 - self.decay**count)
        for name, weight in trained.items():
            self.average[name].lerp_(exact(weight), factor)

    def _place(self) -> None:
        if self.average:
            self.average = placed(self.average, self._trained(), what="average", callback="WeightAverage")
        self._is_loaded = False

    def _trained(self) -> dict[str, nn.Parameter]:
        assert self._module is not None
        return trained_weights(self._module)

    # Evaluation.

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Replaces the weights by the average within the context; does nothing before the first average."""
        # An export during validation finds the average in place and must leave it there.
        nested = self._own is not None
        self._show()
        try:
            yield
        finally:
            if not nested:
                self._hide()

    def _show(self) -> None:
        if not self.average or self._own is not None:
            return
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could not train again
            assert self._module is not None
            trained = settled_weights(self._module)
            if self._is_loaded:  # a checkpoint is validated without training
                self._place()
            self._own = copied(trained)
            put(trained, self.average)

    def _hide(self) -> None:
        if self._own is None:
            return
        assert self._module is not None
        with torch.inference_mode(False), torch.no_grad():
            put(settled_weights(self._module), self._own)
        self._own = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replaces the weights by the average."""
        self._show()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the training weights, before checkpoints are made: Lightning calls checkpoint callbacks last."""
        self._hide()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replaces the weights by the average."""
        self._show()

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the training weights."""
        self._hide()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replaces the weights by the average."""
        self._show()

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the training weights."""
        self._hide()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restores the training weights, since a checkpoint may follow."""
        self._hide()
        self._unhook()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stops counting steps; the average stays, for exports and evaluation with the same trainer."""
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Returns the average and the number of steps."""
        return {"num_steps": self.num_steps, "start_step": self.start_step, "average": dict(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of an earlier run."""
        self.num_steps, self.average = state_dict["num_steps"], dict(state_dict["average"])
        self._is_loaded = True
        # Before the first average, the start_step of this run applies.
        if self.average:
            self.start_step = state_dict["start_step"]
