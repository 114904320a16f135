"""Proximal policy optimisation with a critic.

Legend: E prompts of this rank, G completions of each, S trained completions, N their tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.router_loss import RouterLoss
from ..core.trainer_checks import longest_sequence, trainer_dtype
from ..distributed.collectives import Metrics, Rows, sum_over_ranks, sum_vector_over_ranks
from ..losses.kl import kl_per_token
from ..losses.off_policy import entropy_bonus_loss
from ..losses.policy_gradient import clip_statistics, importance_ratio, policy_gradient_loss
from ..losses.value import explained_variance, explained_variance_sums, value_clipped, value_loss
from ..models import TokenStats, base_model, evaluating, fused_logprobs, hidden_states, output_head
from ..models.critic import Critic, own_critic, shared_critic
from ..rewards.specs import RewardSpec
from ..rl.advantages import gae, moment_sums, whiten
from ..rl.on_policy_module import OnPolicyModule
from ..rl.ppo_options import PPOOptions
from ..rl.reward_shaping import KLController, missing_eos_penalty, token_rewards
from ..rl.rollouts import Rollouts, attach_token_fields, build_trees, flat_indices, num_tokens, token_field, tree_sums
from ..rl.step_rewards import at_tokens
from ..sequences import Example, SequenceBatch


class PPOModule(OnPolicyModule):
    r"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347) as InstructGPT uses it.

    .. math:: L = \frac{1}{T} \sum_t -\min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_h) A_t\big)
              + \tfrac{c_v}{2} \max\big((V_t - R_t)^2, (V_t^{clip} - R_t)^2\big) - c_e H_t

    Ouyang et al., 2022, arXiv:2203.02155: a completion's reward is given at its last sampled token, minus ``kl_coef``
    times the divergence from the reference at every token; rewards of steps are given where steps end.
    ``rl.advantages.gae`` computes advantages and returns.

    Departures: whitening and normalisers use the global batch (those of the losses, the global mini-batch); completions
    that could not be scored are excluded; the gradients of policy and critic are clipped and stepped together.

    Args:
        model: Hugging Face id or folder.
        rewards: see ``OnPolicyModule``.
        num_generations: completions per prompt, at least 1.
        num_updates: passes over the completions of an iteration, at least 1.
        value_model: folder or id of the critic's initial model, with a backbone of its own: an exported reward model
            (its head is loaded), or any language model; ``None``: a head on the policy's backbone.
        value_head: ``linear`` or ``mlp``, if no head is loaded; initialised to 0.
        value_lr_ratio: learning rate of the critic's own weights relative to the policy's, above 0.
        value_warmup_iterations: iterations in which only the critic's own weights learn, at least 0.
        vf_coef: weight of the critic's loss, at least 0.
        cliprange_value: clipping range of values around the old ones, above 0; ``None`` for no clipping.
        epsilon: lower clipping range of the ratio, in (0, 1).
        epsilon_high: upper clipping range; by default ``epsilon``.
        dual_clip: bound of the loss where the advantage is negative, above 1; ``None`` for none.
        gamma: discount, in [0, 1].
        gae_lambda: 0 trusts the critic, 1 the rewards.
        kl_coef: weight of the divergence from the reference in the rewards, at least 0; 0 needs no reference.
        kl_estimator: ``k1`` or ``k3``.
        kl_target: target divergence per completion, to which ``kl_coef`` adapts, above 0; ``None`` keeps it fixed.
        kl_horizon: completions over which it adapts, at least 1.
        missing_eos_penalty: subtracted from the reward of a truncated completion, at least 0; ``None`` is 0.
        whiten_rewards: scale the rewards of tokens to variance 1.
        whiten_advantages: normalise advantages to mean 0 and variance 1.
        entropy_coef: weight of an entropy bonus; below 0 a penalty.
        kwargs: options of ``OnPolicyModule`` and ``PostTrainingModule``.

    Example::

        module = PPOModule("my-sft-model", rewards=["my_rewards.helpful"], value_model="my-reward-model")
        lightning.Trainer(max_epochs=1).fit(module, PromptDataModule(train="prompts.jsonl", global_batch_size=64))
    """

    progress_metrics: ClassVar[tuple[str, ...]] = ("reward", "objective/kl", "explained_variance")

    def __init__(
        self,
        model: str,
        *,
        rewards: Sequence[RewardSpec],
        num_generations: int = 1,
        num_updates: int = 4,
        value_model: str | None = None,
        value_head: Literal["linear", "mlp"] = "linear",
        value_lr_ratio: float = 1.0,
        value_warmup_iterations: int = 0,
        vf_coef: float = 0.1,
        cliprange_value: float | None = 0.2,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        dual_clip: float | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        kl_coef: float = 0.05,
        kl_estimator: Literal["k1", "k3"] = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        missing_eos_penalty: float | None = None,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        entropy_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # Options are checked before the model is set up, so that errors come first.
        options = PPOOptions(
            value_head=value_head,
            value_lr_ratio=value_lr_ratio,
            value_warmup_iterations=value_warmup_iterations,
            vf_coef=vf_coef,
            cliprange_value=cliprange_value,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            dual_clip=dual_clip,
            gamma=gamma,
            gae_lambda=gae_lambda,
            kl_estimator=kl_estimator,
            missing_eos_penalty=missing_eos_penalty,
            whiten_rewards=whiten_rewards,
            whiten_advantages=whiten_advantages,
            entropy_coef=entropy_coef,
        )
        controller = KLController(kl_coef, target=kl_target, horizon=kl_horizon)

        super().__init__(model, rewards=rewards, num_generations=num_generations, num_updates=num_updates, **kwargs)
        self.options = options
        self.controller = controller
        self.value_source = value_model
        self.critic: Critic | None = None

    @property
    def uses_reference(self) -> bool:
        """Whether the divergence from a reference is in the rewards."""
        return self.controller.coef > 0

    @property
    def warming(self) -> bool:
        """Whether the critic is being warmed up, and learns alone."""
        return self.iteration < self.options.value_warmup_iterations

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss of the policy's routers, after the warm-up of the critic."""
        return None if self.warming else super().router_loss

    def configure_model(self) -> None:
        """Builds the policy, its reference, and the critic."""
        if self.is_configured:
            return
        super().configure_model()
        assert self.model is not None
        dtype = trainer_dtype(self._trainer)
        if self.value_source is None:
            size = int(base_model(self.model).config.get_text_config().hidden_size)
            self.critic = shared_critic(size, kind=self.options.value_head, seed=self.seed, dtype=dtype)
        else:
            self.critic = own_critic(
                self.value_source,
                kind=self.options.value_head,
                seed=self.seed,
                dtype=dtype,
                lora=self.lora,
                quantization=self.quantization,
                dropout=self.dropout,
                gradient_checkpointing=self.gradient_checkpointing,
                attention=self.attention,
                layout=self._requested_layout,
                longest=longest_sequence(self),
            )
        self.train(self.training)  # the critic, too

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        """Groups the policy's weights, and the critic's own with their relative learning rate."""
        assert self.critic is not None
        own = {id(parameter) for parameter in self.critic.parameters()}
        if self.options.value_lr_ratio == 1:
            return list(parameters)
        return [
            {"params": [p for p in parameters if id(p) not in own]},
            {"params": [p for p in parameters if id(p) in own], "lr_ratio": self.options.value_lr_ratio},
        ]

    # From rollouts to training trees.

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Rows]:
        """Builds one tree per prompt and attaches advantages, returns, old log-probs and old values."""
        options = self.options
        scores_EG = self.outcome_scores(rollouts.rewards_EGK)
        trees = build_trees(
            rollouts, ~scores_EG.isnan(), budget=self.micro_batch_tokens, share_prefix=self.share_prefix
        )
        completion_index_S, index_N = flat_indices(trees, self.device)
        sequences: dict[str, Any] = {"sequence_index_N": index_N, "num_sequences": len(completion_index_S)}
        names = ["old_logprobs", "old_values", *(["ref_logprobs"] if self.has_reference else [])]
        known = {name: value.double() for name, value in self.per_token(trees, names, self._known).items()}

        # Token rewards: the score at the end, the KL penalty everywhere, step rewards where steps end.
        scores_S, ended_S = scores_EG.flatten()[completion_index_S], rollouts.ended_EG().flatten()[completion_index_S]
        if options.missing_eos_penalty is not None:
            scores_S = missing_eos_penalty(scores_S, has_eos_S=ended_S, penalty=options.missing_eos_penalty)
        kl_N = None
        if self.has_reference:
            kl_N = kl_per_token(
                known["old_logprobs"], ref_logprobs_N=known["ref_logprobs"], estimator=options.kl_estimator
            )
        rewards_N = token_rewards(scores_S, sequence_index_N=index_N, kl_N=kl_N, kl_coef=self.controller.coef)
        if self.has_process_reward:
            lengths_S = torch.bincount(index_N, minlength=len(completion_index_S))
            steps_N = float(self.rewards.weights[-1]) * at_tokens(rollouts.steps, completion_index_S, lengths_S)
            rewards_N, scores_S = rewards_N + steps_N, scores_S.index_add(0, index_N, steps_N)
        if options.whiten_rewards:
            rewards_N = whiten(rewards_N, sums=sum_vector_over_ranks(moment_sums(rewards_N)), shift_mean=False)

        # Returns are the critic's targets, so only advantages are whitened after this.
        advantages_N, returns_N = gae(
            rewards_N, values_N=known["old_values"], gamma=options.gamma, gae_lambda=options.gae_lambda, **sequences
        )
        if options.whiten_advantages:
            advantages_N = whiten(advantages_N, sums=sum_vector_over_ranks(moment_sums(advantages_N)))

        values = self._objective(scores_S, ended_S, known, kl_N, sequences)
        sums = sum_vector_over_ranks(explained_variance_sums(known["old_values"], returns_N=returns_N))
        values["explained_variance"] = explained_variance(sums)
        fixed = {"advantages": advantages_N, "returns": returns_N} | {n: known[n] for n in names[:2]}
        return attach_token_fields(trees, fixed), {name: value for name, value in values.items() if value.isfinite()}

    def _known(self, batch: SequenceBatch) -> Rows:
        assert self.critic is not None
        with evaluating(self.critic):
            stats, values_N = self._policy_and_values(batch)
        found = {"old_logprobs": stats.logprobs, "old_values": values_N}
        return found | {"ref_logprobs": self.ref_logprobs(batch)} if self.has_reference else found

    def _objective(
        self, scores_S: Tensor, ended_S: Tensor, known: Rows, kl_N: Tensor | None, sequences: dict[str, Any]
    ) -> Metrics:
        """Computes mean scores, entropy and KL penalty per completion, and adapts the weight of the divergence."""
        own = {
            "samples": float(len(scores_S)),
            "tokens": float(len(known["old_logprobs"])),
            "scores": float(scores_S.sum()),
            "entropy": float(-known["old_logprobs"].sum()),
            "num_eos": float(ended_S.sum()),
        }
        if kl_N is not None:
            own["kl"] = float(kl_N.sum())
        sums = sum_over_ranks(own, self.device)
        if not sums["samples"]:  # no completion could be scored, so means are undefined
            return {}

        count, coef = sums["samples"], self.controller.coef
        values = {
            "objective/scores": sums["scores"] / count,
            "objective/entropy": sums["entropy"] / count,
            "completions/num_eos": sums["num_eos"],
        }
        if kl_N is not None:
            penalty = -coef * sums["kl"] / count
            values |= {
                "kl": sums["kl"] / max(sums["tokens"], 1.0),
                "objective/kl": sums["kl"] / count,
                "objective/non_score_reward": penalty,
                "objective/rlhf_reward": penalty + values["objective/scores"],
                "kl_coef": coef,
            }
            self.controller.update(values["objective/kl"], num_samples=int(sums["samples"]))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    # The update.

    def _policy_and_values(self, batch: SequenceBatch, *, entropy: bool = False) -> tuple[TokenStats, Tensor]:
        """Computes log-probs of the scored tokens, and the critic's values of the states before them."""
        assert self.critic is not None
        if not self.critic.is_shared:
            stats = self.token_stats(batch, temperature=self.temperature, entropy=entropy)
            return stats, self.critic.own_values(batch)
        hidden = hidden_states(self.model, batch, self.layout)
        hidden_ND = hidden.read(batch.source_index, batch.source_path, batch.source_depth)
        stats = fused_logprobs(
            hidden_ND, output_head(self.model), batch.target_ids, temperature=self.temperature, entropy=entropy
        )
        return stats, self.critic.values(hidden_ND.detach() if self.warming else hidden_ND)

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts tokens."""
        return {"tokens": float(sum(map(num_tokens, examples)))}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the losses per tree, and sums for metrics."""
        options = self.options
        stats, values_N = self._policy_and_values(batch, entropy=True)
        fixed = {}
        for name in ("advantages", "returns", "old_logprobs", "old_values"):
            like_N = values_N if name in ("returns", "old_values") else stats.logprobs
            found = token_field(batch, name, like_N)
            assert found is not None
            fixed[name] = found

        # Both losses take the ratio and the values relative to the policy and critic before the updates.
        sequences: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        policy: dict[str, Any] = {"advantages_N": fixed["advantages"], **options.clipping, **sequences}
        policy_N = policy_gradient_loss(
            stats.logprobs, old_logprobs_N=fixed["old_logprobs"], dual_clip=options.dual_clip, **policy
        )
        critic = {"old_values_N": fixed["old_values"], "returns_N": fixed["returns"]}
        value_N = value_loss(values_N, cliprange=options.cliprange_value, **critic)

        # For metrics only: the approximate KL is half the mean squared log-ratio.
        with torch.no_grad():
            ratio_N = importance_ratio(stats.logprobs, old_logprobs_N=fixed["old_logprobs"], **sequences)
            clipped = clip_statistics(ratio_N, **policy)
            moved_N = (stats.logprobs - fixed["old_logprobs"]).square() / 2
            value_clipped_N = value_clipped(values_N, cliprange=options.cliprange_value, **critic)

        return {
            "policy": batch.sum_per_example(policy_N),
            "value": batch.sum_per_example(value_N),
            "entropy_loss": batch.sum_per_example(entropy_bonus_loss(stats.entropy, coef=options.entropy_coef)),
            "entropy": batch.sum_per_example(stats.entropy.detach()),
            "ratio": batch.sum_per_example(ratio_N),
            "approxkl": batch.sum_per_example(moved_N),
            "clip_low": tree_sums(batch, clipped.low_S),
            "clip_high": tree_sums(batch, clipped.high_S),
            "value_clipped": batch.sum_per_example(value_clipped_N),
        }

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Adds the mean losses over the tokens of a mini-batch; during warm-up only the critic's."""
        value = self.options.vf_coef * rows["value"].sum()
        if not self.warming:
            value = value + rows["policy"].sum() + rows["entropy_loss"].sum()
        return value / max(normalizers["tokens"], 1.0)

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes losses, entropy, approximate KL, clipped fractions and ratio over all updates of an iteration."""
        names = [name for name, value in rows.items() if value.is_floating_point()]
        means = {name: rows[name].sum() / max(normalizers["tokens"], 1.0) for name in names}
        return {
            "loss/policy_avg": means["policy"],
            "loss/value_avg": means["value"],
            "entropy": means["entropy"],
            "policy/approxkl_avg": means["approxkl"],
            "policy/clipfrac_avg": means["clip_low"] + means["clip_high"],
            "clip_ratio/low_mean": means["clip_low"],
            "clip_ratio/high_mean": means["clip_high"],
            "value/clip_frac": means["value_clipped"],
            "policy/ratio": means["ratio"],
        }

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the weight of the divergence."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"]["controller"] = self.controller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the weight of the divergence."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("on_policy", {}).get("controller")
        if state is not None:
            self.controller.load_state_dict(state)
