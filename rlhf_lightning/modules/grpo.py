"""Group-relative policy optimisation and its family.

Legend: E prompts of this rank, G completions of each, K reward functions, S trained completions, N their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.logging import store_options
from ..core.micro_batching import ROW_KEY, row_keys
from ..distributed.collectives import Metrics, Rows, gather_rows, rows_before_this_rank, sum_over_ranks
from ..inference import derive_seed
from ..rewards.specs import RewardSpec
from ..rl import KLPenalty, OffPolicyCorrection, PolicyLoss, RelativeAdvantage, TokenEntropy
from ..rl.advantages import GroupAdvantages
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
from ..utils.option_groups import build_group, plain_group
from ..utils.validation import check_count, check_not_negative


class GRPOModule(OnPolicyModule):
    r"""Group-relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and related losses.

    .. math:: L = -\frac{1}{T} \sum_{i,t}
              \min\big(r_{i,t} A_i, \mathrm{clip}(r_{i,t}, 1-\epsilon, 1+\epsilon_h) A_i\big)
              + \beta\, \mathrm{KL}_{i,t}, \qquad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R) + 10^{-4}}

    with the mean and deviation of a prompt's G completions. ``losses.policy_gradient`` documents formula, paper and
    departures of every ``loss_type`` and option, ``rl.advantages`` those of the advantages. With a process reward
    the advantage of a token is A_i plus the normalised rewards of the steps that end at it or later
    (``rl.step_rewards.process_advantages``).

    Departures: every normaliser and statistic is that of the global batch; the top-entropy threshold is taken once per
    iteration, from the sampling policy.

    An option group (``loss``, ``advantages``, ``kl``, ``off_policy``, ``entropy``, ``sampling``) is an object of its
    class, which documents its options, or a mapping of them: ``loss={"epsilon": 0.3}``.

    Args:
        model: Hugging Face id or folder.
        rewards: see ``OnPolicyModule``.
        num_generations: completions per prompt, at least 2.
        loss: type, clipping and aggregation of the loss: ``PolicyLoss``, or a subclass with a loss of one's own.
        advantages: baseline and scale of rewards: ``RelativeAdvantage``.
        beta: weight of the KL divergence from the reference, at least 0; 0 needs no reference.
        kl: estimator of the divergence, and where it is applied: ``KLPenalty``.
        off_policy: importance weights and masks for samples of another distribution: ``OffPolicyCorrection``.
        entropy: weight of an entropy bonus, and the share of tokens that carry the gradient: ``TokenEntropy``.
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
        loss: PolicyLoss = PolicyLoss(),
        advantages: RelativeAdvantage = RelativeAdvantage(),
        beta: float = 0.0,
        kl: KLPenalty = KLPenalty(),
        off_policy: OffPolicyCorrection = OffPolicyCorrection(),
        entropy: TokenEntropy = TokenEntropy(),
        dynamic_sampling: int = 0,
        **kwargs: Any,
    ) -> None:
        # Options are checked before the model is set up, so that errors come first.
        check_count("num_generations", num_generations, "8 is usual")
        if num_generations < 2:
            raise ValueError("num_generations is 1, and a group of one has no advantage over itself: use 2 or more")
        check_not_negative("beta", beta, "0 needs no reference; 0.04 is the paper's")
        check_not_negative("dynamic_sampling", dynamic_sampling, "0 switches it off")
        loss, advantages = build_group(loss, PolicyLoss), build_group(advantages, RelativeAdvantage)
        kl, entropy = build_group(kl, KLPenalty), build_group(entropy, TokenEntropy)
        off_policy = build_group(off_policy, OffPolicyCorrection)
        kl.check(beta)
        if advantages.normalizes_each_reward and kl.in_reward:
            raise ValueError(
                "kl.in_reward is true, but advantages.multi_objective_aggregation 'normalize_then_sum' normalises "
                "each reward individually: leave one of them at its default"
            )

        super().__init__(model, rewards=rewards, num_generations=num_generations, **kwargs)
        store_options(
            self,
            loss=plain_group(loss, PolicyLoss),
            advantages=plain_group(advantages, RelativeAdvantage),
            kl=plain_group(kl, KLPenalty),
            off_policy=plain_group(off_policy, OffPolicyCorrection),
            entropy=plain_group(entropy, TokenEntropy),
        )
        self.policy_loss = loss
        self.relative_advantage = advantages
        self.beta = beta
        self.kl = kl
        self.off_policy = off_policy
        self.entropy = entropy
        self.dynamic_sampling = dynamic_sampling
        self._replaced = 0.0

    @property
    def uses_reference(self) -> bool:
        """Whether the divergence from a reference is in the loss or in the reward."""
        return self.beta > 0

    # Rollouts.

    def on_train_start(self) -> None:
        """Checks that dynamic sampling has access to all prompts."""
        super().on_train_start()
        if self.dynamic_sampling and not len(getattr(self.trainer.train_dataloader, "examples", ())):
            raise ValueError(
                f"dynamic_sampling is {self.dynamic_sampling}, which needs all prompts at once: use "
                "PromptDataModule with streaming=false, or dynamic_sampling=0"
            )

    def rollout(self, prompts: Sequence[Example], stage: str = "train", attempt: int = 0) -> Rollouts:
        """Samples and scores completions; in training, dynamic sampling replaces groups without learning signal."""
        rollouts = super().rollout(prompts, stage, attempt)
        if stage != "train":
            return rollouts
        self._replaced = 0.0
        for again in range(1, self.dynamic_sampling + 1):
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

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Builds the training trees and attaches advantages, old and reference log-probs, and token weights."""
        every_EG = torch.ones_like(rollouts.rewards_EGK[:, :, 0], dtype=torch.bool)
        kept_EG = rollouts.ended_EG().bool() if self.policy_loss.mask_truncated_completions else every_EG
        trees = self._build_trees(rollouts, kept_EG)
        completion_index_S, index_N = flat_indices(trees, self.device)
        sequences = {"sequence_index_N": index_N, "num_sequences": len(completion_index_S)}
        known = self._known(trees)

        # Advantages are per completion; steps add theirs per token.
        scores_EG = self.outcome_scores(rollouts.rewards_EGK)
        if self.kl.in_reward:
            scores_EG = self._penalised(rollouts, scores_EG, every_EG)
        advantages_EG = self._advantages(rollouts, scores_EG)
        fixed = {"advantages": advantages_EG.flatten()[completion_index_S][index_N]}
        if self.has_process_reward:
            scale_rewards = self.relative_advantage.scale_rewards
            steps_N = process_advantages(rollouts.steps, completion_index_S, index_N, scale_rewards=scale_rewards)
            fixed["advantages"] = fixed["advantages"] + self.rewards.weights[-1] * steps_N
        fixed |= {name: known[name] for name in ("old_logprobs", "ref_logprobs") if name in known}

        values: Metrics = {}
        if self.dynamic_sampling:
            values["dynamic_sampling/replaced"] = torch.tensor(self._replaced)
        if self.off_policy.needs_sampling_logprobs:
            samples = [sample for group in rollouts.completions for sample in group]
            drawn = [logprob for place in completion_index_S.tolist() for logprob in samples[place].logprobs]
            fixed["sampling_logprobs"] = torch.tensor(drawn, dtype=torch.float64, device=self.device)

        # Token weights are fixed before the first update: importance correction and top-entropy mask.
        weights_N = None
        if self.off_policy.correction:
            old_N, drawn_N = known["old_logprobs"].double(), fixed["sampling_logprobs"]
            weights_N = self.off_policy.weights(old_N, drawn_N, **sequences)
            values |= sampling_metrics(old_N - drawn_N, weights_N)
        if self.entropy.top_quantile < 1:
            all_N = gather_rows({"entropy": known["entropy"]}, self.device)["entropy"]
            uncertain_N = self.entropy.is_uncertain(known["entropy"], all_entropies_N=all_N).double()
            weights_N = uncertain_N if weights_N is None else weights_N * uncertain_N
        if weights_N is not None:
            fixed["weights"] = weights_N
        return attach_token_fields(trees, fixed), values

    def _build_trees(self, rollouts: Rollouts, kept_EG: Tensor) -> list[Example]:
        return build_trees(rollouts, kept_EG, budget=self.micro_batch_tokens, share_prefix=self.share_prefix)

    def _known(self, trees: Sequence[Example], *, penalty: bool = False) -> Rows:
        """Computes token log-probs and entropies of the sampling policy and the reference, as far as needed."""
        moves = self.num_updates * self.num_mini_batches > 1
        policy = {
            "old_logprobs": moves or penalty or self.off_policy.correction is not None,
            "entropy": self.entropy.top_quantile < 1,
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
        kl_N = self.kl.per_token(known["old_logprobs"], known["ref_logprobs"])
        penalised = kl_penalised_scores(
            scores_EG.flatten(), kl_N=kl_N, coef=self.beta, sequence_index_N=completion_index_S[index_N]
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
        rewards_EGK, weights_K = self.outcomes(rewards_EGK)
        return self.relative_advantage(rewards_EGK, scores_EG=scores_EG, weights_K=weights_K)

    # The update.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts completions, including those excluded from the loss, and tokens in the loss."""
        completions = sum(example.fields["num_completions"] for example in examples)
        return {"completions": float(completions), "tokens": float(sum(map(num_tokens, examples)))}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the loss per tree, with the loss type's token weights but not divided by a total yet."""
        stats = self.token_stats(batch, temperature=self.temperature, entropy=True)
        sequences: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        names = ("advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs", "weights")
        fixed: dict[str, Any] = {name: token_field(batch, name, stats.logprobs) for name in names}
        loss_N, kl_N = self.token_losses(stats.logprobs, fixed, **sequences)

        # Weights of the loss type's aggregation, to be divided by its global total in `loss`.
        lengths_S = torch.bincount(batch.sequence_index, minlength=batch.num_sequences)
        weights_S = self.policy_loss.relative_weights(
            lengths_S, max_completion_length=self.max_completion_length, dtype=stats.logprobs.dtype
        )

        low_S, high_S, count_S = self.policy_loss.clipped(
            stats.logprobs, old_logprobs_N=fixed["old_logprobs"], advantages_N=fixed["advantages"], **sequences
        )
        share_S = 1 / count_S.clamp(min=1)
        rows = {
            "policy": batch.sum_per_example(loss_N * weights_S[batch.sequence_index]),
            "entropy": batch.sum_per_example(stats.entropy.detach()),
            "clip_low": tree_sums(batch, low_S),
            "clip_high": tree_sums(batch, high_S),
            "clip_units": tree_sums(batch, count_S),
            "clip_low_min": tree_extremes(batch, low_S * share_S, "amin"),
            "clip_high_max": tree_extremes(batch, high_S * share_S, "amax"),
        }
        if self.entropy.coef:
            rows["entropy_loss"] = batch.sum_per_example(self.entropy.loss(stats.entropy))
        if kl_N is not None:
            rows["kl"] = batch.sum_per_example(kl_N.detach())
        return rows

    def token_losses(
        self, logprobs_N: Tensor, fixed: Mapping[str, Tensor | None], **sequences: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the loss of every token without the entropy bonus, and the divergence from a reference if any.

        Args:
            logprobs_N: log-probs under the policy, with gradient.
            fixed: ``advantages``, and where they are needed ``old_logprobs``, ``ref_logprobs``,
                ``sampling_logprobs``, ``weights``; (N,) each.
            sequences: ``sequence_index_N`` and ``num_sequences``.
        """
        old_N, ref_N, sampling_N, advantages_N, weights_N = (
            fixed.get(name) for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs", "advantages", "weights")
        )
        assert advantages_N is not None

        # The policy gradient, of the tokens that the off-policy correction and the entropy leave it.
        loss_N = self.policy_loss(logprobs_N, old_logprobs_N=old_N, advantages_N=advantages_N, **sequences)
        if weights_N is not None:
            loss_N = loss_N * weights_N
        if self.off_policy.mask_threshold is not None and sampling_N is not None:
            sampled: dict[str, Any] = {"sampling_logprobs_N": sampling_N, "advantages_N": advantages_N}
            loss_N = loss_N * self.off_policy.keeps(logprobs_N, **sampled, **sequences)

        # The divergence from the reference: logged wherever there is one, trained unless it is in the reward.
        kl_N = None if ref_N is None else self.kl.per_token(logprobs_N, ref_N)
        if kl_N is not None and self.beta and not self.kl.in_reward:
            loss_N = loss_N + self.beta * self.kl.loss(kl_N, logprobs_N, old_logprobs_N=old_N, **sequences)
        return loss_N, kl_N

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Divides the policy loss by the loss type's total, and the entropy bonus by the tokens."""
        total = rows["policy"].sum() / max(normalizers[self.policy_loss.normalizer], 1.0)
        if self.entropy.coef:
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
