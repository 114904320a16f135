"""From rollouts to the training trees of GRPO: what is fixed for every token before the first update.

Legend: E prompts of this rank, S completions of them, K reward functions, B branches, N tokens of trained completions,
U without the copies of shared ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.micro_batching import ROW_KEY
from ..distributed.collectives import Metrics, Rows, gather_rows, rows_before_this_rank
from ..sequences import Example, SequenceBatch
from .advantages import GroupAdvantages, group_advantages
from .branches import Branches, copies, shared_mean
from .reward_shaping import kl_penalised_scores
from .rollout_metrics import sampling_metrics
from .rollouts import (
    Rollouts,
    attach_token_fields,
    build_trees,
    drawn_logprobs,
    flat_indices,
    group_index,
    sequence_index,
    stored_field,
)
from .step_rewards import process_advantages


class TrainingTrees:
    """Builds the training trees of a module's rollouts, with the fields that its loss reads.

    Args:
        module: a ``GRPOModule``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Builds the trees and attaches their fields; returns them and logged values. Every rank calls it."""
        every_S = torch.ones(len(rollouts.samples), dtype=torch.bool)
        kept_S = rollouts.ended_S().bool() if self.module.policy_loss.mask_truncated_completions else every_S
        trees = self._build(rollouts, kept_S)
        trees = attach_token_fields(trees, self._sampled_fields(rollouts, kept_S, trees))
        replayed, counts = self._replayed(trees, rollouts)
        trees = [*trees, *replayed]
        fixed, values = self._policy_fields(trees)
        return attach_token_fields(trees, fixed), values | counts

    def has_signal(self, rollouts: Rollouts) -> Tensor:
        """Returns whether two completions of a prompt have different outcome rewards: ``(E,)``."""
        scores_S = self.module.combined(rollouts.rewards_SK)
        return self._group_advantages(rollouts.rewards_SK, scores_S, group_index(rollouts.first_S())).has_signal_G

    def _replayed(self, trees: Sequence[Example], rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Exchanges completions with the replay buffer, where there is one."""
        module = self.module
        if not module.off_policy.replay_capacity:
            return [], {}
        index_S = group_index(rollouts.first_S())
        scores_S = module.combined(rollouts.rewards_SK)
        groups = group_advantages(scores_S, group_index_S=index_S, num_groups=len(rollouts.prompts))
        found: tuple[list[Example], Metrics] = module.replay.exchange(trees, groups.std_G[index_S], module.iteration)
        return found

    def _build(self, rollouts: Rollouts, kept_S: Tensor) -> list[Example]:
        module = self.module
        return build_trees(rollouts, kept_S, budget=module.micro_batch_tokens, share_prefix=module.share_prefix)

    def _sampled_fields(self, rollouts: Rollouts, kept_S: Tensor, trees: Sequence[Example]) -> Rows:
        """Computes what completions and rewards say of every token: its advantage and its share.

        The shares of the copies of a token, one for each completion through it, add up to the draws that gave it.
        """
        module = self.module
        completion_index_S, index_N = flat_indices(trees)
        branches = Branches(rollouts.completions)
        tokens = branches.tokens(completion_index_S.tolist())
        scores_S = module.outcome_scores(rollouts.rewards_SK)
        if module.kl.in_reward:
            scores_S = self._penalised(rollouts, scores_S)
        advantages_B = module.tree_advantage(
            branches,
            scores_S=scores_S,
            advantages_S=self._advantages(rollouts, scores_S),
            relative=module.relative_advantage,
        )
        fixed = {
            "advantages": advantages_B[tokens.branch_N],
            "shares": branches.shares(kept_S)[tokens.branch_N],
            "tokens": tokens.token_N,
        }

        # Steps add theirs per token; a shared token has the mean over its completions.
        if module.has_process_reward:
            scale_rewards = module.relative_advantage.scale_rewards
            steps_N = process_advantages(rollouts.steps, completion_index_S, index_N, scale_rewards=scale_rewards)
            weights_N = module.tree_advantage.weights(branches)[completion_index_S][index_N]
            steps_N = shared_mean(steps_N, tokens=tokens, weights_N=weights_N)
            fixed["advantages"] = fixed["advantages"] + module.rewards.weights[-1] * steps_N
        if module.off_policy.needs_sampling_logprobs:
            fixed["sampling_logprobs"] = drawn_logprobs(rollouts, completion_index_S)
        return fixed

    def _policy_fields(self, trees: Sequence[Example]) -> tuple[Rows, Metrics]:
        """Computes what policy and reference say of every token, and weights that are fixed before the first update."""
        module = self.module
        known = self._known(trees)
        fixed: Rows = {name: known[name] for name in ("old_logprobs", "ref_logprobs") if name in known}
        values: Metrics = {}
        weights_N, (first_U, which_N) = None, copies(stored_field(trees, "tokens"))
        if module.off_policy.correction:
            old_N, drawn_N = known["old_logprobs"].double(), stored_field(trees, "sampling_logprobs")
            num_sequences, index_N = sequence_index(trees)
            weights_N = module.off_policy.weights(old_N, drawn_N, sequence_index_N=index_N, num_sequences=num_sequences)
            values = sampling_metrics((old_N - drawn_N)[first_U], weights_N[first_U])
        if module.entropy.top_quantile < 1:
            # Decided once for all copies of a token, whose entropies may differ by rounding.
            local_U = known["entropy"][first_U]
            global_entropies = gather_rows({"entropy": local_U})["entropy"]
            uncertain_N = module.entropy.is_uncertain(local_U, all_entropies_N=global_entropies).double()[which_N]
            weights_N = uncertain_N if weights_N is None else weights_N * uncertain_N
        if weights_N is not None:
            fixed["weights"] = weights_N
        return fixed, values

    def _known(self, trees: Sequence[Example], *, penalty: bool = False) -> Rows:
        """Computes token log-probs and entropies of the sampling policy and the reference, as far as needed."""
        module = self.module
        moves = module.num_updates * module.num_mini_batches > 1
        policy = {
            "old_logprobs": moves or penalty or module.off_policy.correction is not None,
            "entropy": module.entropy.top_quantile < 1,
        }
        names = [name for name, needed in (policy | {"ref_logprobs": module.has_reference}).items() if needed]

        def values_of(batch: SequenceBatch) -> Rows:
            found: Rows = {}
            if any(policy.values()):
                stats = module.token_stats(batch, temperature=module.temperature, entropy=policy["entropy"])
                found = {"old_logprobs": stats.logprobs, "entropy": stats.entropy}
            if module.has_reference:
                found["ref_logprobs"] = module.ref_logprobs(batch)
            return found

        known: Rows = module.per_token(trees, names, values_of) if names else {}
        return known

    def _penalised(self, rollouts: Rollouts, scores_S: Tensor) -> Tensor:
        """Subtracts the divergence of every completion, also of those excluded from the loss, from its score."""
        trees = self._build(rollouts, torch.ones_like(scores_S, dtype=torch.bool))
        completion_index_S, index_N = flat_indices(trees)
        known = self._known(trees, penalty=True)
        kl_N = self.module.kl.per_token(known["old_logprobs"], known["ref_logprobs"])
        index_N = completion_index_S[index_N]
        return kl_penalised_scores(scores_S, kl_N=kl_N, coef=self.module.beta, sequence_index_N=index_N)

    def _advantages(self, rollouts: Rollouts, scores_S: Tensor) -> Tensor:
        """Computes the advantages of completions, from the rewards of the global batch in canonical order."""
        local_rows = {
            ROW_KEY: rollouts.keys_S(),
            "first": rollouts.first_S(),
            "rewards": rollouts.rewards_SK,
            "scores": scores_S,
        }
        global_rows = gather_rows(local_rows)
        order = torch.argsort(global_rows[ROW_KEY], stable=True)
        ordered = {name: value[order] for name, value in global_rows.items()}
        groups = self._group_advantages(ordered["rewards"], ordered["scores"], group_index(ordered["first"]))
        advantages_S = torch.empty_like(groups.advantages_S)
        advantages_S[order] = groups.advantages_S
        place = rows_before_this_rank(len(scores_S))
        return advantages_S[place : place + len(scores_S)]

    def _group_advantages(self, rewards_SK: Tensor, scores_S: Tensor, group_index_S: Tensor) -> GroupAdvantages:
        rewards_SK, weights_K = self.module.outcomes(rewards_SK)
        found: GroupAdvantages = self.module.relative_advantage(
            rewards_SK, scores_S=scores_S, weights_K=weights_K, group_index_S=group_index_S
        )
        return found
