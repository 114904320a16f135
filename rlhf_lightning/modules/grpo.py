"""Group-relative policy optimisation and its family.

Legend: E prompts of this rank, G completions of each, K reward functions, S trained completions, N their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.micro_batching import ROW_KEY, row_keys
from ..distributed.collectives import Metrics, Rows, gather_rows, rows_before_this_rank, sum_over_ranks
from ..inference import derive_seed
from ..losses.kl import KLEstimator, kl_per_token
from ..losses.off_policy import EngineCorrection, top_entropy_mask, top_entropy_threshold
from ..losses.policy_gradient import ImportanceLevel, PolicyLossType, aggregation_weights
from ..rewards.specs import RewardSpec
from ..rl.advantages import Baseline, GroupAdvantages, ScaleRewards, gdpo_advantages, group_advantages
from ..rl.grpo_options import Aggregation, GRPOOptions
from ..rl.on_policy_module import OnPolicyModule
from ..rl.reward_shaping import kl_penalised_scores
from ..rl.rollout_metrics import sampling_metrics
from ..rl.rollouts import (
    Rollouts,
    attach_token_fields,
    build_trees,
    flat_indices,
    num_tokens,
    token_field,
    tree_extremes,
    tree_sums,
)
from ..rl.step_rewards import process_advantages, steps_differ
from ..sequences import Example, ExampleBatch, SequenceBatch
from ..utils.validation import check_count


class GRPOModule(OnPolicyModule):
    r"""Group-relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and related losses.

    .. math:: L = -\frac{1}{T} \sum_{i,t}
              \min\big(r_{i,t} A_i, \mathrm{clip}(r_{i,t}, 1-\epsilon, 1+\epsilon_h) A_i\big)
              + \beta\, \mathrm{KL}_{i,t}, \qquad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R) + 10^{-4}}

    with the mean and deviation of a prompt's G completions. ``losses.policy_gradient`` documents formula, paper and
    departures of every ``loss_type`` and option, ``rl.advantages`` those of the advantages. With a process reward
    the advantage of a token is A_i plus the normalised rewards of the steps that end at it or later
    (``step_rewards.process_advantages``).

    Departures: every normaliser and statistic is that of the global batch; the top-entropy threshold is taken once per
    iteration, from the sampling policy.

    Args:
        model: Hugging Face id or folder.
        rewards: see ``OnPolicyModule``.
        num_generations: completions per prompt, at least 2.
        loss_type: form of the token losses and of their aggregation.
        epsilon: lower clipping range, in (0, 1).
        epsilon_high: upper clipping range; by default ``epsilon``. For ``cispo`` the bound of the ratio itself.
        delta: bound of the ratio where the advantage is negative (two-sided clipping), above 1 + ``epsilon_high``.
        dual_clip: bound of the loss where the advantage is negative, above 1.
        importance_sampling_level: ``token``, ``sequence`` or ``sequence_token``; by default the loss type's own.
        sapo_temperature_pos: of ``sapo``, for positive advantages, above 0.
        sapo_temperature_neg: of ``sapo``, for negative advantages, above 0.
        beta: weight of the KL divergence from the reference, at least 0; 0 needs no reference.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        kl_in_reward: subtract the divergence of a completion from its reward instead of adding it to the loss.
        use_bias_correction_kl: weight the KL estimate by the importance ratio, so that its gradient is unbiased.
        scale_rewards: divide advantages by the deviation of the group, of the whole batch, or not at all.
        baseline: the mean of the group, or of its other samples (leave-one-out).
        multi_objective_aggregation: sum the rewards and normalise, or the other way round (GDPO).
        mask_truncated_completions: exclude completions truncated by the length limit from the loss.
        top_entropy_quantile: share of tokens, the most uncertain ones, that carry the policy gradient, in (0, 1].
        entropy_coef: weight of an entropy bonus; below 0 a penalty.
        importance_sampling_correction: correct for a sampling distribution that is not the trained one (filters, other
            precision): bound (``truncate``) or drop (``mask``) weights of a token or sequence; ``None`` is off.
        importance_sampling_min: lower bound of these weights; ``None`` for none.
        importance_sampling_max: upper bound of these weights; ``None`` for none.
        off_policy_mask_threshold: drop completions with a negative advantage from which the policy has moved by more
            than this, above 0; ``None`` keeps them.
        dynamic_sampling: number of times that groups of equal rewards are replaced by those of other prompts of the
            training data, at least 0.
        kwargs: options of ``OnPolicyModule`` and ``PostTrainingModule``.

    Example::

        module = GRPOModule("my-sft-model", rewards=["rlhf_lightning.rewards.exact_answer"])
        lightning.Trainer(max_steps=100).fit(module, PromptDataModule(train="prompts.jsonl", global_batch_size=16))
    """

    progress_metrics: ClassVar[tuple[str, ...]] = ("reward", "completions/mean_length", "kl")

    def __init__(
        self,
        model: str,
        *,
        rewards: Sequence[RewardSpec],
        num_generations: int = 8,
        loss_type: PolicyLossType = "dapo",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        dual_clip: float | None = None,
        importance_sampling_level: ImportanceLevel | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in_reward: bool = False,
        use_bias_correction_kl: bool = True,
        scale_rewards: ScaleRewards = "group",
        baseline: Baseline = "mean",
        multi_objective_aggregation: Aggregation = "sum_then_normalize",
        mask_truncated_completions: bool = False,
        top_entropy_quantile: float = 1.0,
        entropy_coef: float = 0.0,
        importance_sampling_correction: EngineCorrection | None = None,
        importance_sampling_min: float | None = None,
        importance_sampling_max: float | None = 3.0,
        off_policy_mask_threshold: float | None = None,
        dynamic_sampling: int = 0,
        **kwargs: Any,
    ) -> None:
        # Options are checked before the model is set up, so that errors come first.
        check_count("num_generations", num_generations, "8 is usual")
        if num_generations < 2:
            raise ValueError("num_generations is 1, and a group of one has no advantage over itself: use 2 or more")
        options = GRPOOptions(
            loss_type=loss_type,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            delta=delta,
            dual_clip=dual_clip,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            beta=beta,
            kl_estimator=kl_estimator,
            kl_in_reward=kl_in_reward,
            use_bias_correction_kl=use_bias_correction_kl,
            scale_rewards=scale_rewards,
            baseline=baseline,
            multi_objective_aggregation=multi_objective_aggregation,
            mask_truncated_completions=mask_truncated_completions,
            top_entropy_quantile=top_entropy_quantile,
            entropy_coef=entropy_coef,
            importance_sampling_correction=importance_sampling_correction,
            importance_sampling_min=importance_sampling_min,
            importance_sampling_max=importance_sampling_max,
            off_policy_mask_threshold=off_policy_mask_threshold,
            dynamic_sampling=dynamic_sampling,
        )

        super().__init__(model, rewards=rewards, num_generations=num_generations, **kwargs)
        self.options = options
        self._replaced = 0.0

    @property
    def uses_reference(self) -> bool:
        """Whether the divergence from a reference is in the loss or in the reward."""
        return self.options.beta > 0

    # Rollouts.

    def on_train_start(self) -> None:
        """Checks that dynamic sampling has access to all prompts."""
        super().on_train_start()
        if self.options.dynamic_sampling and not len(getattr(self.trainer.train_dataloader, "examples", ())):
            raise ValueError(
                f"dynamic_sampling is {self.options.dynamic_sampling}, which needs all prompts at once: use "
                "PromptDataModule with streaming=false, or dynamic_sampling=0"
            )

    def rollout(self, prompts: Sequence[Example], stage: str = "train", attempt: int = 0) -> Rollouts:
        """Samples and scores completions; in training, dynamic sampling replaces groups without learning signal."""
        rollouts = super().rollout(prompts, stage, attempt)
        if stage != "train":
            return rollouts
        self._replaced = 0.0
        for again in range(1, self.options.dynamic_sampling + 1):
            keys = row_keys(rollouts.prompts, self.device)
            signal_E = self._group_advantages(rollouts.rewards_EGK, self.combined(rollouts.rewards_EGK)).has_signal_G
            if self.has_process_reward:
                signal_E = signal_E | steps_differ(rollouts.steps, signal_E.device)
            weak = (~signal_E).nonzero().flatten().tolist() if len(keys) else []
            count = sum_over_ranks({"weak": float(len(weak))}, self.device)["weak"]
            if not count:
                break
            self._replaced += count
            others = [self._other_prompt(rollouts.prompts[place].row_id, again) for place in weak]
            rollouts.replace(weak, super().rollout(others, stage, again))
        return rollouts

    def _other_prompt(self, row_id: str, again: int) -> Example:
        """Chooses a replacement prompt as a function of the replaced row, independent of the number of ranks."""
        pool: Any = self.trainer.train_dataloader.examples  # type: ignore[union-attr]
        number = derive_seed(self.seed, self.iteration, row_id, again) % len(pool)
        return self.validate_batch(ExampleBatch([pool[number]]))[0]

    # From rollouts to training trees.

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Rows]:
        """Builds one tree per prompt and attaches advantages, old and reference log-probs, and token weights."""
        options = self.options
        every_EG = torch.ones_like(rollouts.rewards_EGK[:, :, 0], dtype=torch.bool)
        kept_EG = rollouts.ended_EG().bool() if options.mask_truncated_completions else every_EG
        trees = self._build_trees(rollouts, kept_EG)
        completion_index_S, index_N = flat_indices(trees, self.device)
        sequences = {"sequence_index_N": index_N, "num_sequences": len(completion_index_S)}
        known = self._known(trees)

        # Advantages are per completion; steps add theirs per token.
        scores_EG = self.outcome_scores(rollouts.rewards_EGK)
        if options.kl_in_reward:
            scores_EG = self._penalised(rollouts, scores_EG, every_EG)
        advantages_EG = self._advantages(rollouts, scores_EG)
        fixed = {"advantages": advantages_EG.flatten()[completion_index_S][index_N]}
        if self.has_process_reward:
            steps_N = process_advantages(
                rollouts.steps, completion_index_S, index_N, scale_rewards=options.scale_rewards
            )
            fixed["advantages"] = fixed["advantages"] + self.rewards.weights[-1] * steps_N
        fixed |= {name: known[name] for name in ("old_logprobs", "ref_logprobs") if name in known}

        values: Metrics = {}
        if options.dynamic_sampling:
            values["dynamic_sampling/replaced"] = torch.tensor(self._replaced)
        if options.importance_sampling_correction or options.off_policy_mask_threshold:
            samples = [sample for group in rollouts.completions for sample in group]
            drawn = [logprob for place in completion_index_S.tolist() for logprob in samples[place].logprobs]
            fixed["sampling_logprobs"] = torch.tensor(drawn, dtype=torch.float64, device=self.device)

        # Token weights are fixed before the first update: importance correction and top-entropy mask.
        weights_N = None
        if options.importance_sampling_correction:
            old_N, drawn_N = known["old_logprobs"].double(), fixed["sampling_logprobs"]
            weights_N = options.correction(old_N, drawn_N, **sequences)
            assert weights_N is not None
            values |= sampling_metrics(old_N - drawn_N, weights_N)
        if options.top_entropy_quantile < 1:
            global_rows_N = gather_rows({"entropy": known["entropy"]}, self.device)["entropy"]
            threshold = top_entropy_threshold(global_rows_N, top_fraction=options.top_entropy_quantile)
            uncertain_N = top_entropy_mask(known["entropy"], threshold=threshold).double()
            weights_N = uncertain_N if weights_N is None else weights_N * uncertain_N
        if weights_N is not None:
            fixed["weights"] = weights_N
        return attach_token_fields(trees, fixed), values

    def _build_trees(self, rollouts: Rollouts, kept_EG: Tensor) -> list[Example]:
        return build_trees(rollouts, kept_EG, budget=self.micro_batch_tokens, share_prefix=self.share_prefix)

    def _known(self, trees: Sequence[Example], *, penalty: bool = False) -> Rows:
        """Computes token log-probs and entropies of the sampling policy and the reference, as far as needed."""
        options = self.options
        moves = self.num_updates * self.num_mini_batches > 1
        policy = {
            "old_logprobs": moves or penalty or options.importance_sampling_correction is not None,
            "entropy": options.top_entropy_quantile < 1,
        }
        names = [name for name, needed in (policy | {"ref_logprobs": self.has_reference}).items() if needed]

        def values_of(batch: SequenceBatch) -> Rows:
            found: Rows = {}
            if any(policy.values()):
                stats = self.token_stats(batch, temperature=self.temperature, entropy=policy["entropy"])
                found = {"old_logprobs": stats.logprobs, "entropy": stats.entropy}
            if self.has_reference:
                found["ref_logprobs"] = self.ref_logprobs(batch)
            return found

        return self.per_token(trees, names, values_of) if names else {}

    def _penalised(self, rollouts: Rollouts, scores_EG: Tensor, every_EG: Tensor) -> Tensor:
        """Subtracts the divergence of every completion, also of those excluded from the loss, from its score."""
        trees = self._build_trees(rollouts, every_EG)
        completion_index_S, index_N = flat_indices(trees, self.device)
        known = self._known(trees, penalty=True)
        kl_N = kl_per_token(
            known["old_logprobs"], ref_logprobs_N=known["ref_logprobs"], estimator=self.options.kl_estimator
        )
        penalised = kl_penalised_scores(
            scores_EG.flatten(), kl_N=kl_N, coef=self.options.beta, sequence_index_N=completion_index_S[index_N]
        )
        return penalised.view_as(scores_EG)

    def _advantages(self, rollouts: Rollouts, scores_EG: Tensor) -> Tensor:
        """Computes ``(E, G)`` advantages from the rewards of the global batch, in canonical order."""
        keys = row_keys(rollouts.prompts, self.device)
        own = {ROW_KEY: keys, "rewards": rollouts.rewards_EGK, "scores": scores_EG}
        global_rows = gather_rows(own, self.device)
        order = torch.argsort(global_rows[ROW_KEY], stable=True)
        groups = self._group_advantages(global_rows["rewards"][order], global_rows["scores"][order])
        advantages = torch.empty_like(global_rows["scores"])
        advantages[order] = groups.advantages_S.view_as(advantages)
        place = rows_before_this_rank(len(keys))
        return advantages[place : place + len(keys)]

    def _group_advantages(self, rewards_EGK: Tensor, scores_EG: Tensor) -> GroupAdvantages:
        num_groups, group_size = scores_EG.shape
        index_S = torch.arange(num_groups, device=scores_EG.device).repeat_interleave(group_size)
        groups: dict[str, Any] = {"group_index_S": index_S, "num_groups": num_groups}
        rewards_EGK, weights_K = self.outcomes(rewards_EGK)
        if self.options.multi_objective_aggregation == "normalize_then_sum" and len(weights_K):
            return gdpo_advantages(rewards_EGK.flatten(0, 1), weights_K=weights_K, **groups)
        return group_advantages(
            scores_EG.flatten(), scale_rewards=self.options.scale_rewards, baseline=self.options.baseline, **groups
        )

    # The update.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts completions, including those excluded from the loss, and tokens in the loss."""
        completions = sum(example.fields["num_completions"] for example in examples)
        return {"completions": float(completions), "tokens": float(sum(map(num_tokens, examples)))}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the loss per tree, with the loss type's token weights but not divided by a total yet."""
        stats = self.token_stats(batch, temperature=self.temperature, entropy=True)
        names = ("advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs", "weights")
        losses = self.options.token_losses(
            stats.logprobs,
            stats.entropy,
            {name: token_field(batch, name, stats.logprobs) for name in names},
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )

        # With normalizers of `unit` the aggregation weights are relative: `loss` divides by the global one.
        lengths_S = torch.bincount(batch.sequence_index, minlength=batch.num_sequences)
        unit = batch.num_sequences
        weights_S = unit * aggregation_weights(
            self.options.loss_type,
            lengths_S,
            total_sequences=unit,
            total_tokens=unit,
            max_completion_length=self.max_completion_length,
            dtype=stats.logprobs.dtype,
        )

        low_S, high_S, count_S = losses.clipped
        share_S = 1 / count_S.clamp(min=1)
        rows = {
            "policy": batch.sum_per_example(losses.loss_N * weights_S[batch.sequence_index]),
            "entropy": batch.sum_per_example(stats.entropy.detach()),
            "clip_low": tree_sums(batch, low_S),
            "clip_high": tree_sums(batch, high_S),
            "clip_units": tree_sums(batch, count_S),
            "clip_low_min": tree_extremes(batch, low_S * share_S, "amin"),
            "clip_high_max": tree_extremes(batch, high_S * share_S, "amax"),
        }
        if self.options.entropy_coef:
            rows["entropy_loss"] = batch.sum_per_example(losses.entropy_loss_N)
        if losses.kl_N is not None:
            rows["kl"] = batch.sum_per_example(losses.kl_N.detach())
        return rows

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Divides the policy loss by the loss type's total, and the entropy bonus by the tokens."""
        total = rows["policy"].sum() / max(normalizers[self.options.normalizer], 1.0)
        if self.options.entropy_coef:
            total = total + rows["entropy_loss"].sum() / max(normalizers["tokens"], 1.0)
        return total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes entropy and divergence per token, and clipped fractions, over all updates of an iteration."""
        tokens = max(normalizers["tokens"], 1.0)
        units = rows["clip_units"].sum().clamp(min=1)
        low, high = rows["clip_low"].sum() / units, rows["clip_high"].sum() / units
        values = {
            "entropy": rows["entropy"].sum() / tokens,
            "clip_ratio/low_mean": low,
            "clip_ratio/low_min": rows["clip_low_min"].amin(),
            "clip_ratio/high_mean": high,
            "clip_ratio/high_max": rows["clip_high_max"].amax(),
            "clip_ratio/region_mean": low + high,
        }
        if "kl" in rows:
            values["kl"] = rows["kl"].sum() / tokens
        return values
