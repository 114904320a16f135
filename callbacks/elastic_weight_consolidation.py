"""Keeps weights near the ones that earlier tasks need, by a quadratic penalty with their Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core import PostTrainingModule
from ..core.gradients import loss_scale
from ..data.sources import Source
from ..distributed.collectives import sum_over_ranks, sum_vector_over_ranks
from ..distributed.fsdp2 import sharded_units
from ..distributed.lockstep import lockstep
from ..merging.data import fisher_sums, row_tokens
from ..models import evaluating
from ..utils.validation import check_count, check_positive
from .sharded_fisher import sharded_fisher_sums
from .trained_weights import exact, placed, settled_weights, trained_weights

Weights = dict[str, Tensor]


class ElasticWeightConsolidation(lightning.Callback):
    r"""Adds the gradient of elastic weight consolidation to every optimizer step.

    Paper: Overcoming catastrophic forgetting in neural networks (Kirkpatrick et al., 2017, arXiv:1612.00796). For
    earlier tasks k, with the weights :math:`\theta^*_k` that they ended with,

    .. math:: \mathcal{L}(\theta) + \frac{\lambda}{2} \sum_k \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

    :math:`F_k` is the diagonal Fisher information, the mean over contexts of task k's rows, each row's gradient squared
    on its own; the same as in ``rlhf-lightning merge --method fisher``. Up to a constant, the penalties of all tasks
    are one, with :math:`A = \sum_k \lambda F_k` around the mean :math:`\sum_k \lambda F_k \theta^*_k / A`: any number
    of tasks takes two tensors per trained weight, in at least fp32.

    The gradient :math:`\lambda \sum_k F_k (\theta - \theta^*_k)` is added after clipping, right before the step: it is
    not part of the logged ``loss`` and ``grad_norm``. Only trained weights have a penalty, with LoRA the adapter's: in
    a new one B is 0, so that A alone changes no prediction: its information is 0, and only B has a penalty. On
    several ranks each measures its share of the rows; of sharded weights (``fsdp2``) all measure one row after the
    other, which takes as long as on one rank.

    Args:
        rows: rows of earlier tasks, as ``SFTDataModule`` reads them: a source, or a list with one for each task. They
            are measured on the model that training starts from, before the first step. Without it,
            :meth:`consolidate` adds tasks.
        strength: :math:`\lambda`, above 0. The information is a mean over tokens, and small: 100 to 10,000 is usual.
        num_rows: number of rows of each task to measure, from the first; at least 1.
        seed: of the draws that the information is measured on.

    Raises:
        ValueError: an option out of range; in training, rows that are empty.

    Example::

        keep = ElasticWeightConsolidation(["general.jsonl", "code.jsonl"], strength=1000.0)
        lightning.Trainer(callbacks=[keep]).fit(module, data)

        # Tasks that are learned one after the other:
        keep = ElasticWeightConsolidation()
        for rows in ("first.jsonl", "second.jsonl", "third.jsonl"):
            lightning.Trainer(callbacks=[keep]).fit(module, SFTDataModule(rows))
            keep.consolidate(module, rows)
    """

    def __init__(
        self, rows: str | list[str] | None = None, strength: float = 1000.0, num_rows: int = 256, seed: int = 0
    ) -> None:
        check_positive("strength", strength, "1000 is usual")
        check_count("num_rows", num_rows, "256 is usual")
        if rows is not None and not rows:
            raise ValueError(f"rows is {rows!r}; name at least one source, or write null and call consolidate()")
        self.rows = [rows] if isinstance(rows, str) else rows
        self.strength = strength
        self.num_rows = num_rows
        self.seed = seed
        self.num_tasks = 0
        self.information: Weights = {}  # A, by name of the weight
        self.center: Weights = {}  # the mean of the tasks' weights, weighted by their information
        self._is_loaded = False  # whether both are from a checkpoint: whole, and on the CPU

    # Tasks.

    def consolidate(self, module: PostTrainingModule, rows: Source, *, strength: float | None = None) -> None:
        """Adds a task that the module has learned, with its present weights.

        Args:
            module: a module; if its model is sharded, within a run, by all ranks.
            rows: of the task.
            strength: of this task, above 0; that of the callback if omitted.

        Raises:
            ValueError: there are no rows, weights are sharded and no run is on, or nothing is trained.
        """
        check_positive("strength", self.strength if strength is None else strength, "1000 is usual")
        factor = float(self.strength if strength is None else strength)
        module.configure_model()
        weights = trained_weights(module)
        self._place(weights)
        found = self._measure(module, rows)
        for name, weight in weights.items():
            added, here = factor * found[name], exact(weight).clone()
            if name not in self.information:
                self.information[name], self.center[name] = added, here
                continue
            total = self.information[name] + added
            share = torch.where(total > 0, added / total, torch.zeros_like(total))
            self.center[name] = self.center[name] + share * (here - self.center[name])
            self.information[name] = total
        self.num_tasks += 1

    def _measure(self, module: PostTrainingModule, rows: Source) -> Weights:
        if not module.predicts_tokens:
            raise ValueError(
                f"ElasticWeightConsolidation measures predictions of tokens; {type(module).__name__} makes none"
            )
        agreement = lockstep() if sharded_units(module) else None
        if agreement is None and sharded_units(module):
            raise ValueError(
                "ElasticWeightConsolidation measures sharded weights while they are trained, and the run has ended: "
                "name the rows of earlier tasks (rows=...) for the run that follows"
            )
        named = {id(weight): name for name, weight in trained_weights(module).items()}
        inner = {n: w for n, w in module.model.named_parameters() if id(w) in named}
        sequences = dict(enumerate(islice(row_tokens(module.tokenizer, rows), self.num_rows)))
        if not any(len(tokens) > 1 for tokens in sequences.values()):
            raise ValueError(f"rows {rows!r:.80} has no row of two tokens to measure information on")
        is_fitting = module._trainer is not None and module._trainer.world_size > 1
        rank, world = (module.global_rank, module.trainer.world_size) if is_fitting else (0, 1)
        if agreement is not None:
            with evaluating(module.model):
                sums = sharded_fisher_sums(
                    module.model, inner, sequences, seed=self.seed, rank=rank, agreement=agreement
                )
            count = sum(max(0, len(tokens) - 1) for tokens in sequences.values())
        else:
            local_sequences = {number: tokens for number, tokens in sequences.items() if number % world == rank}
            with evaluating(module.model), torch.enable_grad():
                sums, count = fisher_sums(module.model, inner, local_sequences, seed=self.seed)
            if world > 1:
                sums = {name: sum_vector_over_ranks(total) for name, total in sums.items()}
                count = int(sum_over_ranks({"count": float(count)})["count"])
        found = {named[id(inner[name])]: total / count for name, total in sums.items()}
        _warn_of_free(found)
        # Weights outside of the model have no part in its predictions.
        others = {n: torch.zeros_like(exact(w)) for n, w in trained_weights(module).items() if n not in found}
        return found | others

    # Training.

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures the earlier tasks on the model as it is before the first step, unless a checkpoint has them."""
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(
                f"ElasticWeightConsolidation needs a PostTrainingModule; it was given a {type(pl_module).__name__}"
            )
        self._place(settled_weights(pl_module))
        if self.rows is not None and not self.num_tasks:
            for rows in self.rows:
                self.consolidate(pl_module, rows)
        if not self.num_tasks and self.rows is None:
            rank_zero_info("ElasticWeightConsolidation has no task yet: nothing is penalised in this run")

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        """Adds the penalty's gradient to that of the loss."""
        # Gradients of fp16 are still scaled where the optimizer divides them itself.
        scale = loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        for name, weight in self._penalised(pl_module).items():
            gradient = self._gradient(name, weight) * scale
            if weight.grad is None:
                weight.grad = gradient.to(weight.dtype)
            else:
                weight.grad.copy_(gradient + weight.grad)

    def _gradient(self, name: str, weight: Tensor) -> Tensor:
        return self.information[name] * (exact(weight) - self.center[name])

    def _penalised(self, module: lightning.LightningModule) -> Mapping[str, torch.nn.Parameter]:
        weights = trained_weights(module)
        return {name: weight for name, weight in weights.items() if name in self.information}

    @torch.no_grad()
    def penalty(self, module: lightning.LightningModule) -> Tensor:
        """Computes the penalty of the present weights, less that of the best weights for the tasks alone."""
        parts: Sequence[Tensor] = [
            0.5 * (self._gradient(name, weight) * (exact(weight) - self.center[name])).sum()
            for name, weight in self._penalised(module).items()
        ]
        whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
        return torch.stack(whole).sum() if whole else torch.zeros(())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs ``train/ewc_penalty`` of the weights after the batch."""
        if self.num_tasks:
            pl_module.log("train/ewc_penalty", self.penalty(pl_module), on_step=True, on_epoch=False, batch_size=1)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns the penalty of all tasks."""
        return {"num_tasks": self.num_tasks, "information": dict(self.information), "center": dict(self.center)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the penalty of an earlier run."""
        self.num_tasks = state_dict["num_tasks"]
        self.information, self.center = dict(state_dict["information"]), dict(state_dict["center"])
        self._is_loaded = True

    def _place(self, weights: Mapping[str, torch.nn.Parameter]) -> None:
        """Moves the penalty to the devices and shards of the weights, where it was not made on them."""
        first = next(iter(self.information), None)
        moved = first is not None and first in weights and self.information[first].device != weights[first].device
        if first is not None and (self._is_loaded or moved):
            names = {"callback": "ElasticWeightConsolidation"}
            self.information = placed(self.information, weights, what="Fisher information", **names)
            self.center = placed(self.center, weights, what="center", **names)
        self._is_loaded = False


def _warn_of_free(information: Weights) -> None:
    """Warns of weights without any information, which the penalty leaves free."""
    sums = {name: value.sum() for name, value in information.items()}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in sums.items()}
    if free := [name for name, value in whole.items() if value == 0]:
        rank_zero_warn(
            f"ElasticWeightConsolidation: the information of {len(free)} of {len(whole)} trained weights is 0, and no "
            f"penalty holds them (the first is {free[0]!r}); the A of a new LoRA adapter is such a one, as its B is 0: "
            "call consolidate() on an adapter that has learned a task, or train without lora"
        )
