"""Base class of GRPO and PPO: a batch of prompts is one iteration, from the first sampled token to the last step.

No state of an iteration crosses a batch boundary, so a checkpoint there resumes exactly. A sample is a function of the
weights, its prompt and a seed hashed from (seed, iteration, row, attempt, sample number), independent of the rest of
the batch, of the memory budget and of the number of ranks.

Completions, rewards, advantages and all else that the updates compare with are kept in host memory. Besides sampling
and the steps, an iteration waits for the device once, for the log-probs of its samples.

Legend: E prompts of this rank, S completions of all of them, K reward functions, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.logging import store_options
from ..core.micro_batching import ROW_KEY, in_canonical_order
from ..core.module import PostTrainingModule
from ..core.reference_policy import ReferencePolicy
from ..distributed.collectives import Metrics, Rows, concatenate, gather_rows, sum_over_ranks
from ..inference import Completion, LocalEngine, derive_seed
from ..models import evaluating, num_positions
from ..rewards import RewardScores
from ..rewards.specs import RewardSpec, build_rewards, plain_specs
from ..sequences import Example, ExampleBatch, SequenceBatch
from ..utils.option_groups import build_group, plain_group
from ..utils.transfer import to_host
from ..utils.validation import check_choice, check_count, check_positive
from .advantages import combine_rewards
from .branches import branch_lengths
from .reward_failures import FailureWatch
from .rollout_metrics import rollout_metrics
from .rollouts import Rollouts, group_index, num_tokens, reward_columns, token_arrays
from .sampling import Sampling
from .step_rewards import StepsAtTokens, place_steps
from .update_schedule import update_parts


class OnPolicyModule(PostTrainingModule):
    """A module that learns from its own completions: it generates, scores, and updates.

    Args:
        model: Hugging Face id or folder.
        rewards: reward functions: each a function, the dotted path of a function or class, or a dictionary with
            ``class_path``, and ``init_args``, ``weight`` and ``name`` if wanted. Called with the texts as ``prompts``
            and ``completions``, the tokens as ``prompt_ids`` and ``completion_ids``, and the rows' other columns.
        reward_weights: one per reward; 1 by default.
        process_reward: a function that rewards steps, written as a reward is; it returns a list with one number per
            step, or ``None``, for each completion. Steps are separated by its attribute ``step_separator``, a line
            break by default. A step's reward is placed on the token that completes its separator, that of the last step
            on the last token. ``rewards`` may be empty if it is given.
        num_generations: completions per prompt, at least 1.
        max_completion_length: maximum number of tokens of a completion, at least 1.
        temperature: temperature of sampling and of the trained policy, above 0.
        sampling: filters, stop strings and memory of the sampler: ``Sampling`` or a mapping of its options.
        num_updates: passes over the completions of an iteration, at least 1.
        num_mini_batches: optimizer steps per pass, each on an equal share of the prompts; at least 1.
        reward_timeout: seconds for a reward function and a batch, above 0; ``None`` for no limit.
        on_bad_reward: ``error`` if a reward function returns a value that is not a reward, or ``skip`` the sample. A
            function that raises or times out loses only its own samples, counted in ``rewards/<name>/failures``. One
            that fails on every sample of 3 consecutive iterations ends the run.
        seed: seed of sampling.
        reference: ``frozen`` or ``adapter`` as in ``core.ReferencePolicy``; ``auto``: only where the loss needs one.
        kwargs: options of ``PostTrainingModule``.
    """

    default_learning_rate: ClassVar[float] = 1e-6
    progress_metrics: ClassVar[tuple[str, ...]] = ("reward", "completions/mean_length")
    contracts: ClassVar[tuple[str, ...]] = ("PromptDataModule",)
    of_validation: ClassVar[tuple[str, ...]] = (*PostTrainingModule.of_validation, "last_rollouts")

    def __init__(
        self,
        model: str,
        *,
        rewards: Sequence[RewardSpec],
        reward_weights: list[float] | None = None,
        process_reward: RewardSpec | None = None,
        num_generations: int = 8,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        sampling: Sampling = Sampling(),
        num_updates: int = 1,
        num_mini_batches: int = 1,
        reward_timeout: float | None = 60.0,
        on_bad_reward: Literal["error", "skip"] = "error",
        seed: int = 0,
        reference: Literal["auto", "frozen", "adapter"] = "auto",
        **kwargs: Any,
    ) -> None:
        check_choice("reference", reference, ("auto", "frozen", "adapter"))
        check_choice("on_bad_reward", on_bad_reward, ("error", "skip"))
        check_count("num_generations", num_generations, "8 is usual for GRPO, 1 for PPO")
        check_count("max_completion_length", max_completion_length, "how many tokens a good answer may need")
        check_positive("temperature", temperature, "1.0 is usual; greedy completions teach nothing")
        check_count("num_updates", num_updates, "1 stays on policy")
        check_count("num_mini_batches", num_mini_batches, "1 takes all prompts in one step")
        sampling = build_group(sampling, Sampling)
        params = sampling.params(max_completion_length=max_completion_length, temperature=temperature, seed=seed)
        super().__init__(model, **kwargs)
        self.reference = ReferencePolicy(self, reference)

        # Checkpoints must load without the script that defined the reward functions, so store plain specs.
        store_options(
            self,
            rewards=plain_specs(rewards),
            process_reward=None if process_reward is None else plain_specs([process_reward])[0],
            sampling=plain_group(sampling, Sampling),
        )

        self.rewards = build_rewards(
            rewards, reward_weights, process=process_reward, timeout=reward_timeout, on_bad_value=on_bad_reward
        )
        self.failing = FailureWatch()
        self.has_process_reward = process_reward is not None

        self.num_generations = num_generations
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.sampling = params  # its seed is overridden: every sample has its own
        self._engine_options = sampling.engine_options
        self.num_updates = num_updates
        self.num_mini_batches = num_mini_batches
        self.seed = seed
        self.iteration = 0
        self.last_rollouts: Rollouts | None = None  # for callbacks that read samples
        self._engine: LocalEngine | None = None

    # The interface of a method.

    @property
    def uses_reference(self) -> bool:
        """Whether the loss or the rewards compare with a reference policy; a method with such a term overrides it."""
        return False

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Collects what trees hold of their tokens."""
        return token_arrays(examples)

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Turns rollouts into training examples; every rank calls it.

        Returns:
            Trees with their token fields attached (see ``rollouts``), and logged values of the iteration.
        """
        raise TypeError(f"{type(self).__name__} must define prepare(rollouts)")

    # The reference and the schedule.

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is in memory."""
        return bool(self.references)

    def num_steps(self) -> int:
        """Counts the steps of the run: per batch and pass ``num_mini_batches``, or its number of prompts if fewer."""
        batches, most = super().num_steps(), self.trainer.max_steps
        sizes = getattr(self.trainer.train_dataloader, "batch_sizes", None) or [self.num_mini_batches]
        steps = 0
        for number in range(batches):
            steps += self.num_updates * min(self.num_mini_batches, sizes[number % len(sizes)])
            if 0 <= most <= steps:  # the iteration that reaches max_steps is completed
                break
        return steps

    # One iteration.

    def training_step(self, batch: ExampleBatch, batch_idx: int) -> Metrics | None:
        """Runs an iteration: generates, scores, and makes all its updates; returns its logged values."""
        rollouts = self.rollout(self.validate_batch(batch))
        global_rows = in_canonical_order(gather_rows(self._rollout_rows(rollouts)))
        failures = sum_over_ranks({name: float(n) for name, n in rollouts.failures.items()})
        self.failing.update(self.rewards.names, global_rows["rewards"], failures, rollouts.errors)
        with self.phase("score"):
            trees, values = self.prepare(rollouts)
        lost = {f"rewards/{name}/failures": torch.tensor(count) for name, count in failures.items()}
        values = self._rollout_metrics(global_rows) | lost | values
        values |= self.update(trees)
        self.last_rollouts = rollouts
        self.iteration += 1
        return self._finish_batch(batch, values)

    def update(self, trees: Sequence[Example]) -> Rows:
        """Makes the optimizer steps of an iteration, and returns loss and metrics over all of them."""
        rows, normalizers, progress = [], dict.fromkeys(self.normalizers([]), 0.0), []
        schedule = {"num_updates": self.num_updates, "num_mini_batches": self.num_mini_batches}
        for part in update_parts(trees, seeds=(self.seed, self.iteration), **schedule):
            part_rows, part_totals, part_progress = self.optimize(part)
            if part_rows:
                rows.append(part_rows)
            normalizers = {name: count + part_totals[name] for name, count in normalizers.items()}
            progress.append(part_progress)
        if not rows:
            return {}
        means = {name: torch.stack([part[name] for part in progress]).mean() for name in progress[0]}
        return self._summary(concatenate(rows), normalizers) | means | {"learning_rate": progress[0]["learning_rate"]}

    def rollout(self, prompts: Sequence[Example], stage: str = "train", attempt: int = 0) -> Rollouts:
        """Samples and scores completions of prompts; every rank calls it, with any number of prompts.

        Args:
            prompts: this rank's prompts.
            stage: ``train`` makes samples depend on the iteration; any other stage, on its name alone.
            attempt: a different number gives different samples.
        """
        for function in self.rewards.functions:
            attach = getattr(function, "attach", None)
            if callable(attach):  # learned rewards need the module's device and tokenizer
                attach(self)

        # Seeds depend on rows, not on the batch: a sample is the same on any number of ranks.
        moment = self.iteration if stage == "train" else stage
        complete = self.explore if stage == "train" else self.generate
        with self.phase("generate"):
            completions = complete(prompts, [derive_seed(self.seed, moment, e.row_id, attempt) for e in prompts])
        samples = [(prompt, sample) for prompt, group in zip(prompts, completions, strict=True) for sample in group]
        if self.clock is not None:
            self.clock.count_generated(branch_lengths(completions))
        if not samples:
            failures = dict.fromkeys(self.rewards.function_names, 0)
            none = torch.zeros(0, len(self.rewards.names), dtype=torch.float64)
            return Rollouts([], [], none, failures)

        texts = [self.prompt_text(prompt) for prompt, _ in samples]
        with self.phase("score"):
            scores = self.rewards(texts, [sample.text for _, sample in samples], reward_columns(samples))
        values = torch.from_numpy(scores.values)
        steps = self._steps(completions, scores)
        return Rollouts(list(prompts), completions, values, scores.failures, scores.errors, steps)

    def _steps(self, completions: Sequence[Sequence[Completion]], scores: RewardScores) -> list[list[StepsAtTokens]]:
        """Places the rewards of steps on the tokens where they end; empty without a process reward."""
        if not self.has_process_reward:
            return []
        separator, rewards = self.rewards.step_separators[-1], iter(scores.steps[self.rewards.names[-1]])
        assert separator is not None
        return [[place_steps(next(rewards), c, separator, self.tokenizer) for c in group] for group in completions]

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Finds the completions of prompts to train on, any number of each; by default those of ``generate``."""
        return self.generate(prompts, seeds)

    def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Samples ``num_generations`` completions of each prompt with the current policy.

        Args:
            prompts: this rank's prompts.
            seeds: one per prompt; the seeds of its samples are hashed from it.
        """
        each = [[derive_seed(seed, sample) for sample in range(self.num_generations)] for seed in seeds]
        tokens = [prompt.root.tokens.tolist() for prompt in prompts]
        contexts = None if self.front is None else self.front.contexts(prompts)
        return self.engine.generate(tokens, self.num_generations, self.sampling, seeds=each or None, contexts=contexts)

    @property
    def engine(self) -> LocalEngine:
        """The engine that samples from the policy."""
        if self._engine is None:
            self._engine = LocalEngine(self.model, self.tokenizer, **self._engine_options)
        return self._engine

    def prompt_text(self, prompt: Example) -> Any:
        """Returns a prompt as given, text or messages; if it is not stored, its decoded tokens."""
        written = prompt.fields.get("prompt")
        tokens = prompt.root.tokens.tolist()
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if written is None else written

    @torch.no_grad()
    def per_token(
        self, trees: Sequence[Example], names: Sequence[str], values_of: Callable[[SequenceBatch], Rows]
    ) -> Rows:
        """Computes values of all tokens of trees without gradient, in micro-batches and evaluation mode.

        Args:
            trees: this rank's trees.
            names: names of the values.
            values_of: function from a packed batch to ``{name: (n,)}``, in the order of its scored tokens.

        Returns:
            ``{name: (N,)}``, tree after tree, in host memory.
        """
        found: dict[str, list[Tensor]] = {name: [torch.empty(0, device=self.device)] * len(trees) for name in names}
        with evaluating(self.model), self.rounded_weights():
            for micro in self.micro_batching.plan(trees):
                values = values_of(self.micro_batching.pack([trees[n] for n in micro]))
                sizes = [num_tokens(trees[n]) for n in micro]
                for name in names:
                    for n, part in zip(micro, values[name].split(sizes), strict=True):
                        found[name][n] = part
        return to_host({n: torch.cat([torch.empty(0, device=self.device), *parts]) for n, parts in found.items()})

    def ref_logprobs(self, batch: SequenceBatch) -> Tensor:
        """Computes log-probs of a batch's scored tokens under the reference: ``(n,)``."""
        with self.references[0].scoring() as model:
            return self.token_stats(batch, model, temperature=self.temperature).logprobs

    # Metrics of rollouts.

    def _rollout_rows(self, rollouts: Rollouts) -> Rows:
        return {
            ROW_KEY: rollouts.keys_S(),
            "first": rollouts.first_S(),
            "rewards": rollouts.rewards_SK,
            "lengths": rollouts.lengths_S(),
            "ended": rollouts.ended_S(),
        }

    def _rollout_metrics(self, rows: Rows) -> Metrics:
        return rollout_metrics(
            rows["rewards"],
            self.combined(rows["rewards"]),
            group_index_S=group_index(rows["first"]),
            names=self.rewards.names,
            lengths_S=rows["lengths"],
            ended_S=rows["ended"],
        )

    def combined(self, rewards_SK: Tensor) -> Tensor:
        """Computes the logged score of completions: the weighted sum of their outcome rewards, ``(S,)``.

        NaN where no function could score. With a process reward alone it is the weighted mean over the steps.
        """
        outcomes_SK, weights_K = self.outcomes(rewards_SK)
        if not len(weights_K):
            return float(self.rewards.weights[-1]) * rewards_SK[:, -1]
        return combine_rewards(outcomes_SK, weights_K=weights_K)

    def outcome_scores(self, rewards_SK: Tensor) -> Tensor:
        """Computes the outcome scores, ``(S,)``: ``combined``, but 0 if only steps are rewarded."""
        only_steps = len(self.rewards.names) == self.has_process_reward
        return self.combined(rewards_SK) * (0.0 if only_steps else 1.0)

    def outcomes(self, rewards_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outcome rewards, without the process reward, and their weights."""
        weights_K = torch.from_numpy(self.rewards.weights).to(rewards_SK.device)
        count = len(weights_K) - self.has_process_reward
        return rewards_SK[:, :count], weights_K[:count]

    # Validation and prediction: completions of the policy and their rewards.

    def _collect(self, batch: ExampleBatch, loader: int = 0) -> None:
        rollouts = self.rollout(self.validate_batch(batch), stage="val")
        if rollouts.prompts:
            self.validation_rows.add(loader, self._rollout_rows(rollouts))
        self.last_rollouts = rollouts
        batch.mark_consumed()

    def summarize(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes metrics of the rollouts of all ranks of a validation or test set."""
        gathered = gather_rows(rows)
        return self._rollout_metrics(in_canonical_order(gathered)) if gathered else {}

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Completes prompts and returns one dictionary per row of this rank, with ``completions`` and ``rewards``."""
        rollouts = self.rollout(self.validate_batch(batch), stage="predict")
        scores = self.combined(rollouts.rewards_SK).split(rollouts.sizes)
        return [
            {"row_id": prompt.row_id, "completions": [sample.text for sample in group], "rewards": values.tolist()}
            for prompt, group, values in zip(rollouts.prompts, rollouts.completions, scores, strict=True)
        ]

    # Checkpoints and checks.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the number of the next iteration, and the failure counts of the rewards."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {"iteration": self.iteration, "failing": dict(self.failing.consecutive)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the iteration and the failure counts."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("on_policy", {})
        self.iteration = state.get("iteration", 0)
        self.failing.consecutive = dict(state.get("failing", {}))

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks that rows are prompts without completions, with positions left for one."""
        examples = super().validate_batch(batch)
        positions = num_positions(self.model)
        for example in examples:
            if example.root.children:
                raise ValueError(
                    f"row {example.row_id} already has {len(example.root.children)} completions; "
                    f"{type(self).__name__} writes its own: use PromptDataModule"
                )
            first, length = example.root.first_position, len(example.root.tokens)
            most = None if positions is None else positions - self.max_completion_length - first
            if most is not None and length > most:
                raise ValueError(
                    f"row {example.row_id} has {first + length} tokens, and with max_completion_length="
                    f"{self.max_completion_length} they exceed the model's {positions} positions: set the datamodule's "
                    f"max_length to {max(most, 1)}, or lower max_completion_length"
                )
        return examples
