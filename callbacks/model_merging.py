"""Merges snapshots of the policy while it trains, and keeps a merge only if it is better on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ..core import PostTrainingModule
from ..core.measuring import measure_validation
from ..core.position import has_validation
from ..distributed.fsdp2 import whole_tensor
from ..metrics.direction import direction_of
from ..utils.validation import check_choice, check_count, check_not_negative
from .snapshot_merges import DECAYS, Decay, mean_merge, spherical_merge
from .trained_weights import copied, placed, put, settled_weights
from .weight_average import WeightAverage

Weights = dict[str, Tensor]


class ModelMerging(lightning.Callback):
    r"""Replaces the policy by a merge of its own snapshots where that is better on a validation metric.

    ``method: mean`` is the plain mean of the last ``num_models`` snapshots (Stochastic Weight Averaging, Izmailov et
    al., 2018, arXiv:1803.05407; with a constant learning rate it replaces decay: WSM, Tian et al., 2025,
    arXiv:2507.17634). ``decay`` weighs the snapshots as another decay over their window would: ``cosine``, or ``sqrt``,
    1 - sqrt(x), which gives the oldest most (:func:`~rlhf_lightning.callbacks.snapshot_merges.decay_weights`).

    ``method: warp`` runs rounds like those of WARP (Ramé et al., 2024, arXiv:2406.16768). In each round
    ``num_models`` policies are trained one after the other, from the same start :math:`\theta_0`, with a fresh
    optimizer state; their task vectors :math:`\delta_m = \theta_m - \theta_0` are merged on the sphere, tensor by
    tensor, and the result is pulled towards the start:

    .. math:: \theta = \theta_0 + \eta\, \delta, \qquad
        \delta = \mathrm{slerp}(\delta_1, \delta_2; 1/2), \text{ then } \mathrm{slerp}(\delta, \delta_3; 1/3), \dots

    It is the start of the next round. Unlike in the paper, the policies of a round see different batches of one run and
    there is no moving anchor for the divergence: ``ReferenceSync`` moves the reference.

    Each merge is measured by ``monitor``, before and after, with the policy's weights and with the merged ones. It is
    kept if it is better, by more than ``-max_drop``; otherwise the policy continues as it was. A merge that is kept
    begins a new window (or round), and clears the optimizer's state, which belongs to other weights. With
    ``merge_every_n_epochs: null`` a mean is taken once, when training ends: it is exported, and validated by the same
    trainer, while checkpoints keep the weights that train, so that the run can be extended.

    Only trained weights are merged, with LoRA the adapter's matrices. Snapshots have the type and the device of the
    weights, sharded where these are: ``num_models`` copies, two more while a merge is measured, and the start of
    ``warp`` or of ``eta`` below 1. Merges are computed in fp32 at least. Checkpoints hold all of it whole, and a
    resumed run equals an uninterrupted one.

    Args:
        monitor: metric that decides: one that the module computes in validation, such as ``val/loss``, or that of a
            callback with a ``name`` and ``measure(trainer, module)``, such as ``val/accuracy`` of
            ``GenerationAccuracy``.
        mode: whether more (``max``) or less (``min``) of it is better; if omitted, derived from its name.
        method: ``mean`` or ``warp``.
        num_models: snapshots in a mean, policies in a round; at least 2.
        snapshot_every_n_steps: optimizer steps between two snapshots (the length of a policy's training in ``warp``),
            at least 1; if omitted, a snapshot is taken at the end of every epoch.
        merge_every_n_epochs: of ``mean``: merge at the end of every so many epochs, at least 1, the weights at that
            time being the last snapshot; if omitted, when training ends. ``warp`` merges after every round.
        eta: of the pull: 1 takes the merge itself, 0.3 is the paper's choice for the next round's start; in (0, 1]. In
            ``mean``, the start is that of the training.
        max_drop: loss of the metric that is accepted, at least 0.
        decay: of ``mean``: ``linear``, the plain mean, ``cosine`` or ``sqrt``.

    Raises:
        ValueError: an option out of range; in training, a metric that cannot be measured, or a ``WeightAverage``, whose
            average would be exported in place of the merge.

    Example::

        merging = ModelMerging("val/loss", num_models=4, merge_every_n_epochs=1, snapshot_every_n_steps=50)
        lightning.Trainer(callbacks=[merging, ModelExport("runs/sft/model")]).fit(module, data)
        print(merging.history)  # step, metric of the policy, metric of the merge, whether it was kept
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["max", "min"] | None = None,
        method: Literal["mean", "warp"] = "mean",
        num_models: int = 4,
        snapshot_every_n_steps: int | None = None,
        merge_every_n_epochs: int | None = None,
        eta: float = 1.0,
        max_drop: float = 0.0,
        decay: Decay = "linear",
    ) -> None:
        check_choice("method", method, ("mean", "warp"))
        check_choice("decay", decay, DECAYS)
        if method == "warp" and decay != "linear":
            raise ValueError(f"decay is {decay!r} with method 'warp', which merges on the sphere: leave it out")
        check_count("num_models", num_models, "4 is usual")
        if num_models < 2:
            raise ValueError(f"num_models is {num_models}; it must be at least 2: one model alone is no merge")
        for name, value in (
            ("snapshot_every_n_steps", snapshot_every_n_steps),
            ("merge_every_n_epochs", merge_every_n_epochs),
        ):
            if value is not None:
                check_count(name, value, "or null")
        if method == "warp" and merge_every_n_epochs is not None:
            raise ValueError(
                f"merge_every_n_epochs is {merge_every_n_epochs} with method 'warp', which merges after every round of "
                "num_models snapshots: remove it, and set snapshot_every_n_steps"
            )
        if not 0 < eta <= 1:
            raise ValueError(f"eta is {eta}; it must be in (0, 1] (1 takes the merge itself, the paper of WARP 0.3)")
        check_not_negative("max_drop", max_drop, "0 keeps only what is better")
        if mode is not None:
            check_choice("mode", mode, ("max", "min"))
        self.monitor = monitor
        self.mode = direction_of(monitor) if mode is None else mode
        self.method = method
        self.decay = decay
        self.num_models = num_models
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.merge_every_n_epochs = merge_every_n_epochs
        self.eta = eta
        self.max_drop = max_drop
        self.history: list[dict[str, Any]] = []
        self.snapshots: list[Weights] = []
        self.start: Weights = {}
        self.kept_at_end = False  # whether a merge was kept when training ended
        self._adds_last = False  # whether the last weights of training are merged besides the snapshots
        self._restart = False  # whether the next batch begins at the start, for another policy of the round
        self._last_step = 0
        self._snapshot_step = -1  # of the last snapshot
        self._own: Weights | None = None  # the weights that trained, after a merge was kept at the end
        self._is_loaded = False  # whether weights are from a checkpoint: whole, and on the CPU
        self._module: PostTrainingModule | None = None

    @property
    def state_key(self) -> str:
        """Distinguishes the state of several of these callbacks."""
        return self._generate_state_key(method=self.method, monitor=self.monitor)

    def setup(self, trainer: Any, pl_module: lightning.LightningModule, stage: str) -> None:
        """Forgets another module's snapshots, and moves to the front: exports and checkpoints are to see merges."""
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"ModelMerging needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        if any(isinstance(callback, WeightAverage) for callback in trainer.callbacks):
            raise ValueError(
                "ModelMerging exports its merge, and WeightAverage its average in place of it: remove one of them"
            )
        # Another list, as Lightning is going through this one.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]
        if self._module is not pl_module:
            self._module, self.history, self.snapshots, self.start = pl_module, [], [], {}
            self.kept_at_end, self._restart, self._own, self._is_loaded = False, False, None, False
            self._snapshot_step = -1

    # Training.

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Moves what a checkpoint held to the devices of the weights, and checks that the metric can be measured."""
        self._last_step, self._own = trainer.global_step, None
        self._place()
        if not self.start and (self.method == "warp" or self.eta < 1):
            self.start = copied(settled_weights(pl_module))
        self._check_monitor(trainer, pl_module)

    def _check_monitor(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Refuses a metric that nothing measures before training, and not at its end."""
        if self._measuring(trainer) is not None:
            return
        if not has_validation(trainer):
            raise ValueError(
                f"monitor is {self.monitor!r}, and there are no validation rows to measure it on: set the datamodule's "
                "val, or name the metric of a callback, such as val/accuracy of GenerationAccuracy"
            )
        # Few rows may lack what a metric is about.
        found = measure_validation(trainer, module, num_batches=1)
        found = found if self.monitor in found else measure_validation(trainer, module)
        if self.monitor not in found:
            raise ValueError(
                f"monitor is {self.monitor!r}, which is not measured at validation (measured: "
                f"{', '.join(sorted(found)) or 'nothing'}); a callback measures its own if it has name and measure()"
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins the training of the next policy of a round."""
        self.kept_at_end = False
        if self._restart:
            self._restart = False
            self._replace(trainer, pl_module, self.start)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes a snapshot, and merges, where they are due."""
        step, every = trainer.global_step, self.snapshot_every_n_steps
        ends_epoch = bool(trainer.is_last_batch)
        due = ends_epoch if every is None else step // every > self._last_step // every
        self._last_step = step
        merges = self.merge_every_n_epochs
        merging = ends_epoch and merges is not None and (trainer.current_epoch + 1) % merges == 0
        if not (due or merging):
            return
        self.snapshots = [*self.snapshots, copied(settled_weights(pl_module))][-self.num_models :]
        self._snapshot_step = step
        if self.method == "warp":
            merging = len(self.snapshots) == self.num_models
            self._restart = not merging
        if merging and len(self.snapshots) > 1:
            self._merge(trainer, pl_module)

    def _merge(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        kept = self._judge(trainer, module, self._merged(self.snapshots))
        if kept:
            _clear_optimizer(trainer)
        if kept or self.method == "warp":
            self.snapshots = []
        if self.method == "warp":
            self.start = copied(settled_weights(module))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Merges once, where merges are not periodic; checkpoints keep the weights that train."""
        if self.method != "mean" or self.merge_every_n_epochs is not None:
            return
        own = copied(settled_weights(pl_module))
        self._adds_last = self._snapshot_step != trainer.global_step
        if len(self.snapshots) + self._adds_last > 1:
            self.kept_at_end = self._judge(trainer, pl_module, self._final(own))
        self._own = own if self.kept_at_end else None

    def _final(self, last: Weights) -> Weights:
        """Merges the last snapshots and the weights at the end of training, which are one of them."""
        # Not stored as a snapshot: a run that is extended would not have taken it.
        snapshots = [*self.snapshots, last] if self._adds_last else self.snapshots
        return self._merged(snapshots[-self.num_models :])

    def _merged(self, snapshots: Sequence[Weights]) -> Weights:
        if self.method == "warp":
            return spherical_merge(snapshots, self.start, self.eta)
        return mean_merge(snapshots, self.start, self.eta, self.decay)

    # Measuring.

    def _judge(self, trainer: lightning.Trainer, module: lightning.LightningModule, candidate: Weights) -> bool:
        """Measures the policy and a merge, and leaves the merge in its place if it is better; else the policy."""
        before = self._measure(trainer, module)
        own = copied(settled_weights(module))
        _put_exactly(module, candidate)
        after = self._measure(trainer, module)
        gain = after - before if self.mode == "max" else before - after
        better = math.isfinite(after) and (gain > -self.max_drop or not math.isfinite(before))
        kept = bool(trainer.strategy.broadcast(better))  # the same decision on every rank
        if not kept:
            _put_exactly(module, own)
        self.history.append({"step": trainer.global_step, "policy": before, "merged": after, "kept": kept})
        for logger in trainer.loggers:
            values = {"merge/policy": before, "merge/merged": after, "merge/kept": float(kept)}
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        rank_zero_info(
            f"step {trainer.global_step}: {self.monitor} is {before:.4g}, and {after:.4g} merged: the merge is "
            f"{'kept' if kept else 'not kept'}"
        )
        return kept

    def _measuring(self, trainer: Any) -> Any:
        """Finds the callback that measures the metric, if one does."""
        for callback in trainer.callbacks:
            if getattr(callback, "name", None) == self.monitor and callable(getattr(callback, "measure", None)):
                return callback
        return None

    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> float:
        callback = self._measuring(trainer)
        if callback is not None:
            return float(callback.measure(trainer, module))
        return measure_validation(trainer, module).get(self.monitor, math.nan)

    def _replace(self, trainer: lightning.Trainer, module: lightning.LightningModule, weights: Weights) -> None:
        """Continues training from other weights, with a fresh optimizer state."""
        _put_exactly(module, weights)
        _clear_optimizer(trainer)

    # Evaluation and export of a run that has ended.

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the merge of a run that has ended before, and was resumed with nothing left to train."""
        self._show_end(pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the merge where the checkpoint of a run that has ended is validated."""
        if trainer.state.fn != "fit":
            self._show_end(pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the merge where the checkpoint of a run that has ended is tested."""
        self._show_end(pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the merge where the checkpoint of a run that has ended is predicted with."""
        self._show_end(pl_module)

    def _show_end(self, module: lightning.LightningModule) -> None:
        if not self.kept_at_end or self._own is not None:
            return
        with torch.inference_mode(False):  # tensors made in inference mode could not train again
            self._place()
            self._own = copied(settled_weights(module))
            _put_exactly(module, self._final(self._own))

    # Checkpoints.

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the weights that train where a merge was kept at the end."""
        if self._own is None:
            return
        whole = {name: whole_tensor(weight) for name, weight in self._own.items()}
        # Only the rank that writes has weights in the checkpoint.
        checkpoint["state_dict"].update({name: w for name, w in whole.items() if name in checkpoint["state_dict"]})

    def state_dict(self) -> dict[str, Any]:
        """Returns snapshots, the start of the round, and all decisions."""
        return {
            "snapshots": [dict(snapshot) for snapshot in self.snapshots],
            "start": dict(self.start),
            "restart": self._restart,
            "snapshot_step": self._snapshot_step,
            "kept_at_end": self.kept_at_end,
            "adds_last": self._adds_last,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of an earlier run."""
        self.snapshots, self.start = list(state_dict["snapshots"]), dict(state_dict["start"])
        self._restart, self._snapshot_step = state_dict["restart"], state_dict["snapshot_step"]
        self.kept_at_end, self._adds_last = state_dict["kept_at_end"], state_dict["adds_last"]
        self.history, self._own, self._is_loaded = list(state_dict["history"]), None, True

    def _place(self) -> None:
        if not self._is_loaded or self._module is None:
            return
        weights = settled_weights(self._module)
        names = {"what": "snapshot", "callback": "ModelMerging"}
        self.snapshots = [placed(snapshot, weights, **names) for snapshot in self.snapshots]
        self.start = placed(self.start, weights, **names) if self.start else {}
        self._is_loaded = False


def _put_exactly(module: lightning.LightningModule, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        put(settled_weights(module), values)


def _clear_optimizer(trainer: lightning.Trainer) -> None:
    """Forgets moments, which belong to weights that are no longer there."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
