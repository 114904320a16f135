"""Accepts the policy at boundaries of training by a paired test on a suite, or goes back to the last accepted state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from ..core import PostTrainingModule
from ..core.checkpoint_io import check_place
from ..core.rewind import Rewind, allow_rewinding
from ..evaluation import Suite, TaskResult
from ..evaluation.checks import check_suite
from ..evaluation.suite import SuiteSource
from ..inference import derive_seed
from ..rl.on_policy_module import OnPolicyModule
from ..self_improvement.gate import CapabilityCriteria, CriteriaSource, Decision, check_criteria, decide, overruled
from ..self_improvement.measuring import SuiteMeter
from ..self_improvement.snapshots import Snapshots
from ..self_improvement.validators import AdversarialValidator
from ..utils.files import hold, on_first_rank, release
from ..utils.option_groups import build_group
from ..utils.validation import check_count
from .learning_rates import scale_learning_rates
from .model_export import ModelExport
from .self_improvement import SelfImprovement
from .trained_weights import copied, placed, put, settled_weights
from .training_checkpoint import TrainingCheckpoint

# Above the number of any rank, from which other random states are derived.
_ANEW = 1 << 20


class CapabilityGate(lightning.Callback):
    r"""Evaluates the policy on a suite at boundaries, and keeps what was learned only where a paired test accepts it.

    The policy is measured before the first step, and that state is the first accepted one. At each boundary, and when
    training ends, :func:`~rlhf_lightning.self_improvement.decide` compares the candidate with the last accepted state,
    on the same prompts with the same seeds. An accepted candidate is saved as a whole checkpoint. A rejected one is
    discarded: weights, optimizer, schedules, random states, position in the data, and the states of the module and of
    all callbacks are again those of the accepted state, bit for bit on CPUs, as in a resumed run. Then
    ``criteria.on_reject`` decides: training continues with the learning rate times ``step_factor`` for every rejection
    in succession (``smaller_step``), with other samples and dropout (``new_seed``, of methods that draw), or ends.
    After ``criteria.patience`` rejections in succession it ends as well. A run that has ended has the weights of the
    last accepted state, and the final export is made from it.

    With ``SelfImprovement`` the rows of a round are made at the start of its epoch, trained on, and tested at its end.
    A rejection takes its round, rows and history back as well; the round that follows begins from the accepted policy,
    and rows that are made again have seeds of their own, whatever ``criteria.on_reject``.

    Rejected steps count neither for ``max_steps`` nor for schedules, but for ``max_time``. ``ModelExport`` with
    ``monitor``, or ``every_n_steps``, may export between boundaries, where nothing has been decided yet. With
    ``WeightAverage``, the weights that train are judged, not their average. A run has one gate.

    Args:
        suite: a suite, its options as a mapping, or a YAML file such as ``configs/suites/arithmetic.yaml``; see
            ``evaluation.Suite``. Prompts on which the policy is not trained tell more.
        folder: destination of the accepted states, their results, and ``manifest.json`` with their SHA-256 and all
            decisions; one folder for each run.
        every_n_steps: optimizer steps between two boundaries, at least 1; if omitted, every epoch ends at one.
        criteria: when a candidate is accepted: a ``CapabilityCriteria`` or a mapping of its options. ``max_kl`` limits
            :math:`\mathrm{KL}(\text{candidate} \,\|\, \text{start})`, estimated on one sample of each prompt that the
            candidate draws (the mean of log p - log p_start over its tokens); it takes a copy of the weights that are
            trained. Limits of size and speed are for stages: training changes neither.
        step_factor: factor of the learning rates at each rejection, in (0, 1).
        keep: number of newest accepted states to keep, at least 1; older ones stay while a run that is resumed from
            a checkpoint of ``TrainingCheckpoint`` needs them.
        seed: of samples and tests.
        validators: checks of ``self_improvement.AdversarialValidator``, which must pass as well: each a mapping with
            ``class_path`` and ``init_args``, or an object. On several ranks each runs all of them.

    Raises:
        ValueError: an option out of range, or a suite without tasks; in training, a verifier that raises or has no
            verdict, a folder of another run, or an accepted state that was changed on disk.

    Example::

        gate = CapabilityGate("configs/suites/arithmetic.yaml", "runs/grpo/accepted", every_n_steps=50)
        lightning.Trainer(callbacks=[gate, ModelExport("runs/grpo/model")], max_steps=400).fit(module, data)
        print(gate.history)  # step, verdict, reason, difference, low, high, p_value of every decision
    """

    def __init__(
        self,
        suite: SuiteSource,
        folder: str,
        every_n_steps: int | None = None,
        criteria: CriteriaSource = None,
        step_factor: float = 0.5,
        keep: int = 2,
        seed: int = 0,
        validators: list[Any] | None = None,
    ) -> None:
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, "null judges at the end of every epoch")
        if isinstance(step_factor, bool) or not isinstance(step_factor, int | float) or not 0 < step_factor < 1:
            raise ValueError(f"step_factor is {step_factor!r}; it must be in (0, 1) (0.5 is usual)")
        check_count("keep", keep, "2 is usual")
        self.suite = Suite.read(suite)
        self.folder = Path(folder).expanduser()
        self.every_n_steps = every_n_steps
        self.criteria = build_group({} if criteria is None else criteria, CapabilityCriteria)
        for limit in ("max_memory_gb", "max_token_ms"):
            if getattr(self.criteria, limit) is not None:
                raise ValueError(
                    f"criteria.{limit} is {getattr(self.criteria, limit)!r}, and training changes neither size nor "
                    "speed of a model: leave it out, or write it in a pipeline's stage of kind gate or rounds"
                )
        self.step_factor = step_factor
        self.seed = seed
        self.snapshots = Snapshots(self.folder, keep)
        self.validator = AdversarialValidator(validators) if validators else None
        self._meter = SuiteMeter(self.suite, seed)
        self._module: PostTrainingModule | None = None
        self._forget()

    def _forget(self) -> None:
        self.accepted: int | None = None  # step of the last accepted state
        self.history: list[dict[str, Any]] = []  # decisions
        self.num_rejected = 0  # in succession
        self._results: list[TaskResult] | None = None  # of the accepted state
        self._first: list[TaskResult] | None = None  # results of the policy at the start
        self._start: dict[str, Tensor] | None = None  # trained weights of the start, where drift is limited
        self._is_loaded = False  # whether these are from a checkpoint: whole, and on the CPU
        self._module_seed: int | None = None  # of an on-policy module, after new_seed
        self._last_step = 0
        self._judged_step = -1
        self._is_stopping = False

    @property
    def state_key(self) -> str:
        """Tells two in one trainer apart, so that ``setup`` can say why there must be one."""
        return self._generate_state_key(folder=self.folder.name)

    def setup(self, trainer: Any, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks module and folder, and moves to where candidates are complete and nothing has been written of them."""
        if stage != "fit":
            return
        if not isinstance(pl_module, PostTrainingModule) or not pl_module.predicts_tokens:
            raise ValueError(
                f"CapabilityGate needs a module that generates text; it was given a {type(pl_module).__name__}"
            )
        if (count := sum(isinstance(callback, CapabilityGate) for callback in trainer.callbacks)) > 1:
            raise ValueError(
                f"there are {count} CapabilityGates, and one would take back what another has accepted: give one of "
                "them a suite with the tasks of all"
            )
        check_suite(self.suite)
        # A repeated stretch differs from the rejected one where a round of other rows begins at every boundary.
        rounds = self.every_n_steps is None and any(r.every_n_epochs == 1 for r in _rounds(trainer))
        draws = isinstance(pl_module, OnPolicyModule) or pl_module.drops or rounds
        if self.criteria.on_reject == "new_seed" and not draws:
            raise ValueError(
                f"criteria.on_reject is 'new_seed', and {type(pl_module).__name__} draws nothing at random without "
                "dropout: every attempt would be the same; use smaller_step or stop"
            )
        if self._module is not pl_module or trainer.global_step == 0:
            self._forget()
        self._module, self._is_stopping = pl_module, False
        allow_rewinding(trainer)
        if not _is_trial(trainer):
            on_first_rank(self._prepare_folder)

        # Another list, as Lightning is going through this one.
        trainer.callbacks = sorted(trainer.callbacks, key=self._order)

    def _prepare_folder(self) -> None:
        check_place(self.folder, "accepted states")
        hold(self.folder)

    def _order(self, callback: lightning.Callback) -> int:
        """After callbacks that change weights or states, before callbacks that write them."""
        if callback is self:
            return 1
        return 3 if isinstance(callback, Checkpoint) else 2 if isinstance(callback, ModelExport) else 0

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Lets other runs write to the folder."""
        release(self.folder)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Lets other runs write to the folder."""
        release(self.folder)

    # Boundaries.

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses a folder of another run, reads the accepted results of a resumed one, or ends a run that stops."""
        if _is_trial(trainer):
            return
        self._last_step = self._judged_step = trainer.global_step
        if self._is_stopping:
            trainer.should_stop = True
            # Lightning would train on until these are met.
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None
            return
        if self._module_seed is not None and isinstance(pl_module, OnPolicyModule):
            pl_module.seed = self._module_seed
        if self.accepted is None:
            self.snapshots.refuse_others()
        elif self._results is None:
            self._results = self.snapshots.read(self.accepted)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures the policy before the first step, and saves it as the first accepted state."""
        self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Does so where a run without this callback is resumed within an epoch."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.accepted is not None or _is_trial(trainer):
            return
        assert isinstance(module, PostTrainingModule)
        results = self._measure(trainer, module)
        check_criteria(results, self.criteria)
        if self.criteria.max_kl is not None:
            if not self._meter.samples(module):
                raise ValueError(
                    "criteria.max_kl is measured on samples of the policy, and all of them are empty at the start: "
                    "remove it, or check the model"
                )
            self._start = copied(settled_weights(module))
        self._first = results
        self._accept(trainer, results)
        rank_zero_info(f"step {trainer.global_step}: {_scores(results)} before training")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judges the policy at a boundary."""
        step, every = trainer.global_step, self.every_n_steps
        due = trainer.is_last_batch if every is None else step // every > self._last_step // every
        self._last_step = step
        if due:
            self._judge(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Judges the last steps, before the final model is exported."""
        self._judge(trainer, pl_module)

    def _judge(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Accepts the policy, or leaves the loops to continue from the accepted state.

        Raises:
            Rewind: it is rejected.
        """
        step = trainer.global_step
        if self.accepted is None or self._is_stopping or step == self._judged_step or _is_trial(trainer):
            return
        assert isinstance(module, PostTrainingModule)
        assert self._results is not None
        results, kl = self._measure(trainer, module), self._divergence(module)
        found = decide(
            self._results,
            results,
            self.criteria,
            start=self._first,
            kl=kl,
            num_rejected=self.num_rejected,
            seed=self.seed,
        )
        if found.verdict == "accept" and (validator := self.validator) is not None:
            validation = self._meter.ask(module, lambda engine: validator.validate(engine, seed=self.seed))
            found = overruled(found, validation, self.criteria, num_rejected=self.num_rejected)
        decision: Decision = trainer.strategy.broadcast(found)
        self._judged_step = step
        self._record(trainer, decision, results)
        if decision.verdict == "accept":
            self._accept(trainer, results)
            return

        # The accepted checkpoint holds an earlier state of this callback, so the present one is not restored from it.
        self.num_rejected += 1
        self.snapshots.check(self.accepted)
        self.snapshots.note(self.history)
        kept, of_accepted = self.state_dict(), self._results
        is_stop = decision.verdict == "stop"

        def then() -> None:
            self.load_state_dict(kept, results=of_accepted)
            self._is_stopping = is_stop
            if not is_stop:
                self._try_otherwise(trainer, module)

        raise Rewind(self.snapshots.checkpoint(self.accepted), then)

    def _measure(self, trainer: lightning.Trainer, module: PostTrainingModule) -> list[TaskResult]:
        settings = getattr(getattr(trainer, "datamodule", None), "chat_template_kwargs", None)
        return self._meter.results(module, settings)

    @torch.no_grad()
    def _divergence(self, module: PostTrainingModule) -> float | None:
        """Estimates KL(policy || start), the mean of log p(x) - log p_start(x) over tokens x that the policy draws."""
        if self._start is None:
            return None
        weights = settled_weights(module)
        if self._is_loaded:
            self._start = placed(self._start, weights, what="start", callback="criteria.max_kl")
            self._is_loaded = False
        samples = self._meter.samples(module)
        if not samples:  # a candidate that says nothing at all is as far away as can be
            return math.inf
        logprob = self._meter.mean_logprob(module, samples)
        kept = copied(weights)
        try:
            put(weights, self._start)
            return logprob - self._meter.mean_logprob(module, samples)
        finally:
            put(settled_weights(module), kept)

    def _record(self, trainer: lightning.Trainer, decision: Decision, results: Sequence[TaskResult]) -> None:
        step = trainer.global_step
        scores = {result.task.name: result.accuracy.value for result in results}
        self.history.append({"step": step, "accepted_step": self.accepted, **decision.as_dict(), "scores": scores})
        values = {"gate/difference": decision.difference, "gate/p_value": decision.p_value}
        values |= {"gate/accepted": float(decision.verdict == "accept")}
        values |= {} if decision.kl is None else {"gate/kl": decision.kl}
        values |= {f"gate/{name}": score for name, score in scores.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        rank_zero_info(
            f"step {step}: {decision.verdict}: {decision.reason}"
            + ("" if decision.verdict == "accept" else f"; back to step {self.accepted}")
        )

    def _accept(self, trainer: lightning.Trainer, results: list[TaskResult]) -> None:
        """Saves the state of the run, this decision in it."""
        step = trainer.global_step
        self.accepted, self.num_rejected, self._results, self._judged_step = step, 0, results, step
        for callback in _rounds(trainer):
            callback.attempt = 0
        on_first_rank(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        trainer.save_checkpoint(self.snapshots.checkpoint(step))
        savers = [callback for callback in trainer.callbacks if isinstance(callback, TrainingCheckpoint)]  # type: ignore[attr-defined]
        self.snapshots.add(step, results, self.history, lambda: [at for saver in savers for at in saver.steps()])

    def _try_otherwise(self, trainer: lightning.Trainer, module: PostTrainingModule) -> None:
        """Changes what the criteria say of the restored state, so that the next attempt is another one."""
        for callback in _rounds(trainer):
            callback.attempt = self.num_rejected
        if self.criteria.on_reject == "smaller_step":
            scale_learning_rates(trainer, self.step_factor**self.num_rejected)
            return
        module.resume.draw_anew(_ANEW + self.num_rejected)
        if isinstance(module, OnPolicyModule):
            # The same for an attempt of the same number, also after a kill.
            self._module_seed = derive_seed(module.seed, "rejected") >> 1

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns the step of the accepted state, all decisions, and the weights that drift is measured from."""
        return {
            "accepted": self.accepted,
            "history": [dict(entry) for entry in self.history],
            "num_rejected": self.num_rejected,
            "start": self._start,
            "first": None if self._first is None else [result.as_dict() for result in self._first],
            "module_seed": self._module_seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any], results: list[TaskResult] | None = None) -> None:
        """Restores the state of an earlier run; the results are read when training starts, unless they are given."""
        self.accepted, self.num_rejected = state_dict["accepted"], state_dict["num_rejected"]
        self.history, self._start, self._is_loaded = list(state_dict["history"]), state_dict["start"], True
        self._module_seed, self._results = state_dict["module_seed"], results
        first = state_dict["first"]
        self._first = None if first is None else [TaskResult.read(result) for result in first]


def _scores(results: Iterable[TaskResult]) -> str:
    return ", ".join(f"{result.task.name} {result.accuracy.value:.4f}" for result in results)


def _rounds(trainer: Any) -> list[SelfImprovement]:
    """Returns the callbacks that make rows."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SelfImprovement)]


def _is_trial(trainer: Any) -> bool:
    """Tells whether the trainer is in a trial run (``fast_dev_run``), which writes and decides nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))
