"""Proximal policy optimisation with a critic.

Legend: E prompts of this rank, G completions of each, S trained completions, N their tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.logging import store_options
from ..core.optimizers import group_parameters
from ..core.router_loss import RouterLoss
from ..core.trainer_checks import longest_sequence, trainer_dtype
from ..distributed.collectives import Metrics, Rows, sum_over_ranks, sum_vector_over_ranks
from ..inference import Completion
from ..losses.policy_gradient import importance_ratio
from ..losses.value import explained_variance, explained_variance_sums
from ..models import TokenStats, base_model, evaluating, fused_logprobs, hidden_states, output_head
from ..models.critic import Critic, own_critic, shared_critic
from ..models.saving import export_kind
from ..rewards.specs import RewardSpec
from ..rl import GAE, AdaptiveKL, EntropyBonus, ImportanceWeights, PPOLoss, SearchRollouts, ValueFunction
from ..rl.exploration import Explorer
from ..rl.on_policy_module import OnPolicyModule
from ..rl.reward_shaping import missing_eos_penalty as penalise_missing_eos
from ..rl.reward_shaping import token_rewards
from ..rl.rollout_metrics import objective_metrics, sampling_metrics
from ..rl.rollouts import (
    Rollouts,
    attach_token_fields,
    build_trees,
    drawn_logprobs,
    flat_indices,
    token_field,
    tree_sums,
)
from ..rl.shared_tokens import SharedTokens
from ..rl.step_rewards import at_tokens
from ..sequences import Example, SequenceBatch
from ..utils.files import check_replaceable
from ..utils.option_groups import build_group, plain_group
from ..utils.validation import check_not_negative


class PPOModule(OnPolicyModule):
    r"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347) as InstructGPT uses it.

    .. math:: L = \frac{1}{T} \sum_t -\min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_h) A_t\big)
              + \tfrac{c_v}{2} \max\big((V_t - R_t)^2, (V_t^{clip} - R_t)^2\big) - c_e H_t

    Ouyang et al., 2022, arXiv:2203.02155: a completion's reward is given at its last sampled token, minus ``kl_coef``
    times the divergence from the reference at every token; rewards of steps are given where steps end.
    ``rl.advantages`` documents advantages, returns and whitening; the group ``GAE`` computes them.

    Departures: whitening and normalisers use the global batch (those of the losses, the global mini-batch); completions
    that could not be scored are excluded; the gradients of policy and critic are clipped and stepped together.

    Completions may come from searches with the policy (``tree``). Their tokens are the policy's own draws; where a
    search went on is not. So each token counts once for each draw, and the advantage of one that several completions
    share is a mean of theirs that the search has no part in: ``GAE`` has the formula.

    An option group (``loss``, ``value``, ``gae``, ``tree``, ``kl``, ``off_policy``, ``entropy``, ``sampling``) is an
    object of its class, which documents its options, or a mapping of them: ``gae={"lam": 1.0}``.

    Args:
        model: Hugging Face id or folder.
        rewards: see ``OnPolicyModule``.
        num_generations: completions per prompt, at least 1.
        num_updates: passes over the completions of an iteration, at least 1.
        loss: clipping of the policy's loss: ``PPOLoss``, or a subclass with a loss of one's own.
        value: the critic's model, head, learning rate and loss: ``ValueFunction``.
        gae: discount, lambda and whitening of the advantages: ``GAE``.
        tree: what completions in training come from, samples or searches: ``SearchRollouts``.
        kl_coef: weight of the divergence from the reference in the rewards, at least 0; 0 needs no reference.
        kl: estimator of the divergence, and the divergence that ``kl_coef`` adapts to reach: ``AdaptiveKL``.
        missing_eos_penalty: subtracted from the reward of a truncated completion, at least 0; ``None`` is 0.
        off_policy: importance weights for samples of another distribution: ``ImportanceWeights``.
        entropy: weight of an entropy bonus: ``EntropyBonus``.
        kwargs: options of ``OnPolicyModule`` and ``PostTrainingModule``.

    Example::

        module = PPOModule("my-sft-model", rewards=["my_rewards.helpful"], value={"model": "my-reward-model"})
        lightning.Trainer(max_epochs=1).fit(module, PromptDataModule(train="prompts.jsonl", global_batch_size=64))
        module.save_critic("runs/ppo/critic")
    """

    progress_metrics: ClassVar[tuple[str, ...]] = ("reward", "objective/kl", "explained_variance")

    def __init__(
        self,
        model: str,
        *,
        rewards: Sequence[RewardSpec],
        num_generations: int = 1,
        num_updates: int = 4,
        loss: PPOLoss = PPOLoss(),
        value: ValueFunction = ValueFunction(),
        gae: GAE = GAE(),
        tree: SearchRollouts = SearchRollouts(),
        kl_coef: float = 0.05,
        kl: AdaptiveKL = AdaptiveKL(),
        missing_eos_penalty: float | None = None,
        off_policy: ImportanceWeights = ImportanceWeights(),
        entropy: EntropyBonus = EntropyBonus(),
        **kwargs: Any,
    ) -> None:
        # Options are checked before the model is set up, so that errors come first.
        loss, value, gae = build_group(loss, PPOLoss), build_group(value, ValueFunction), build_group(gae, GAE)
        kl, entropy = build_group(kl, AdaptiveKL), build_group(entropy, EntropyBonus)
        tree, off_policy = build_group(tree, SearchRollouts), build_group(off_policy, ImportanceWeights)
        controller = kl.controller(kl_coef)
        if missing_eos_penalty is not None:
            check_not_negative("missing_eos_penalty", missing_eos_penalty, "it is subtracted; 1.0 is usual")

        if kwargs.get("compressor") is not None and tree.searches:
            raise ValueError(
                "compressor is given with searches in tree.rollouts, which keep prompts without their contexts: leave "
                "one out"
            )
        if value.model is not None and kwargs.get("compressor") is not None:
            raise ValueError(
                f"value.model is {value.model!r} with compressor, whose summaries another model cannot read: leave "
                "value.model out"
            )
        super().__init__(model, rewards=rewards, num_generations=num_generations, num_updates=num_updates, **kwargs)
        store_options(
            self,
            loss=plain_group(loss, PPOLoss),
            value=plain_group(value, ValueFunction),
            gae=plain_group(gae, GAE),
            tree=plain_group(tree, SearchRollouts),
            kl=plain_group(kl, AdaptiveKL),
            off_policy=plain_group(off_policy, ImportanceWeights),
            entropy=plain_group(entropy, EntropyBonus),
        )
        self.policy_loss = loss
        self.value = value
        self.gae = gae
        self.kl = kl
        self.controller = controller  # holds kl_coef
        self.explorer = Explorer(self, tree)
        self.missing_eos_penalty = missing_eos_penalty
        self.off_policy = off_policy
        self.entropy = entropy
        self.critic: Critic | None = None

    @property
    def uses_reference(self) -> bool:
        """Whether the divergence from a reference is in the rewards."""
        return self.controller.coef > 0

    @property
    def warming(self) -> bool:
        """Whether the critic is being warmed up, and learns alone."""
        return self.iteration < self.value.warmup_iterations

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
        if self.value.model is None:
            size = int(base_model(self.model).config.get_text_config().hidden_size)
            self.critic = shared_critic(size, kind=self.value.head, seed=self.seed, dtype=dtype)
        else:
            self.critic = own_critic(
                self.value.model,
                kind=self.value.head,
                seed=self.seed,
                dtype=dtype,
                lora=self.lora,
                quantization=self.quantization,
                dropout=self.dropout,
                gradient_checkpointing=self.gradient_checkpointing,
                compile=self.compiles_layers,
                attention=self.attention,
                layout=self._requested_layout,
                longest=longest_sequence(self),
            )
        self.train(self.training)  # the critic, too

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[Any]:
        """Groups the policy's weights, and the critic's own with their relative learning rate."""
        assert self.critic is not None
        lr_ratios_by_id = {id(parameter): self.value.lr_ratio for parameter in self.critic.parameters()}
        return group_parameters(self, parameters, self.lr_ratios, self.layer_lr_decay, lr_ratios_by_id)

    # From rollouts to training trees.

    def rollout(self, prompts: Sequence[Example], stage: str = "train", attempt: int = 0) -> Rollouts:
        """Samples and scores completions; in training, those of the searches in ``tree.rollouts``."""
        self.explorer.begin()
        return super().rollout(prompts, stage, attempt)

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Finds the completions of prompts to train on: samples, or those of the searches in ``tree.rollouts``."""
        return self.explorer(prompts, seeds)

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Builds the training trees and attaches advantages, returns, old log-probs and values, and token weights."""
        scores_S = self.outcome_scores(rollouts.rewards_SK)
        trees = build_trees(rollouts, ~scores_S.isnan(), budget=self.micro_batch_tokens, share_prefix=self.share_prefix)
        completion_index_S, index_N = flat_indices(trees)
        shared = SharedTokens.of(rollouts.completions, completion_index_S, index_N)
        sequences: dict[str, Any] = {"sequence_index_N": index_N, "num_sequences": len(completion_index_S)}
        names = ["old_logprobs", "old_values", *(["ref_logprobs"] if self.has_reference else [])]
        known = {name: value.double() for name, value in self.per_token(trees, names, self._known).items()}

        # Token rewards: the score at the end, the KL penalty everywhere, step rewards where steps end.
        scores_S, ended_S = scores_S[completion_index_S], rollouts.ended_S()[completion_index_S]
        if self.missing_eos_penalty is not None:
            scores_S = penalise_missing_eos(scores_S, has_eos_S=ended_S, penalty=self.missing_eos_penalty)
        kl_N = self.kl.per_token(known["old_logprobs"], known["ref_logprobs"]) if self.has_reference else None
        rewards_N = token_rewards(scores_S, sequence_index_N=index_N, kl_N=kl_N, kl_coef=self.controller.coef)
        if self.has_process_reward:
            lengths_S = torch.bincount(index_N, minlength=len(completion_index_S))
            steps_N = float(self.rewards.weights[-1]) * at_tokens(rollouts.steps, completion_index_S, lengths_S)
            rewards_N, scores_S = rewards_N + steps_N, scores_S.index_add(0, index_N, steps_N)
        advantages_N, returns_N = self.gae(rewards_N, values_N=known["old_values"], shared=shared, **sequences)

        values = self._objective(scores_S, ended_S, known["old_logprobs"], kl_N)
        first_U = shared.first_U
        sums = explained_variance_sums(known["old_values"][first_U], returns_N=returns_N[first_U])
        values["explained_variance"] = explained_variance(sum_vector_over_ranks(sums))
        fixed = {"advantages": advantages_N, "returns": returns_N, "shares": shared.shares_N}
        fixed |= {name: known[name] for name in names[:2]}
        if self.off_policy.correction is not None:
            drawn_N = drawn_logprobs(rollouts, completion_index_S)
            fixed["weights"] = self.off_policy.weights(known["old_logprobs"], drawn_N, **sequences)
            gap_N = known["old_logprobs"] - drawn_N
            values |= sampling_metrics(gap_N[first_U], fixed["weights"][first_U])
        if self.explorer.options.searches:
            values |= self.explorer.metrics(rollouts.completions)
        return attach_token_fields(trees, fixed), {name: value for name, value in values.items() if value.isfinite()}

    def _known(self, batch: SequenceBatch) -> Rows:
        assert self.critic is not None
        with evaluating(self.critic):
            stats, values_N = self._policy_and_values(batch)
        found = {"old_logprobs": stats.logprobs, "old_values": values_N}
        return found | {"ref_logprobs": self.ref_logprobs(batch)} if self.has_reference else found

    def _objective(self, scores_S: Tensor, ended_S: Tensor, logprobs_N: Tensor, kl_N: Tensor | None) -> Metrics:
        """Computes mean scores, entropy and KL penalty per completion, and adapts the weight of the divergence."""
        local_sums = {
            "samples": float(len(scores_S)),
            "tokens": float(len(logprobs_N)),
            "scores": float(scores_S.sum()),
            "entropy": float(-logprobs_N.sum()),
            "num_eos": float(ended_S.sum()),
        }
        if kl_N is not None:
            local_sums["kl"] = float(kl_N.sum())
        sums = sum_over_ranks(local_sums)
        values = objective_metrics(sums, coef=self.controller.coef)
        if "objective/kl" in values:
            self.controller.update(float(values["objective/kl"]), num_samples=int(sums["samples"]))
        return values

    # The update.

    def _policy_and_values(self, batch: SequenceBatch, *, entropy: bool = False) -> tuple[TokenStats, Tensor]:
        """Computes log-probs of the scored tokens, and the critic's values of the states before them."""
        assert self.critic is not None
        if not self.critic.is_shared:
            stats = self.token_stats(batch, temperature=self.temperature, entropy=entropy)
            return stats, self.critic.own_values(batch)
        self.place_contexts(batch)
        hidden = hidden_states(self.model, batch, self.layout)
        hidden_ND = hidden.read(batch.source_index, batch.source_path, batch.source_depth)
        stats = fused_logprobs(
            hidden_ND, output_head(self.model), batch.target_ids, temperature=self.temperature, entropy=entropy
        )
        return stats, self.critic.values(hidden_ND.detach() if self.warming else hidden_ND)

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts tokens, a shared one once for each draw of it."""
        return {"tokens": sum(float(example.fields["shares"].sum()) for example in examples)}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the losses per tree, and sums for metrics."""
        stats, values_N = self._policy_and_values(batch, entropy=True)
        fixed: dict[str, Any] = {}
        for name in ("advantages", "returns", "old_logprobs", "old_values", "shares", "weights"):
            like_N = values_N if name in ("returns", "old_values") else stats.logprobs
            fixed[name] = token_field(self.extra(batch), name, like_N)

        # Both losses take the ratio and the values relative to the policy and critic before the updates.
        sequences: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        advantages_N, old_N = fixed["advantages"], fixed["old_logprobs"]
        policy_N = self.policy_loss(stats.logprobs, old_logprobs_N=old_N, advantages_N=advantages_N, **sequences)
        critic = {"old_values_N": fixed["old_values"], "returns_N": fixed["returns"]}
        value_N = self.value.loss(values_N, **critic)
        if fixed["weights"] is not None:
            policy_N = policy_N * fixed["weights"]

        # For metrics only: the approximate KL is half the mean squared log-ratio.
        with torch.no_grad():
            ratio_N = importance_ratio(stats.logprobs, old_logprobs_N=old_N, **sequences)
            clipped = self.policy_loss.clipped(
                stats.logprobs, old_logprobs_N=old_N, advantages_N=advantages_N, **sequences
            )
            moved_N = (stats.logprobs - old_N).square() / 2
            value_clipped_N = self.value.clipped(values_N, **critic)

        shares_N = fixed["shares"]
        return {
            "policy": batch.sum_per_example(policy_N * shares_N),
            "value": batch.sum_per_example(value_N * shares_N.to(value_N.dtype)),
            "entropy_loss": batch.sum_per_example(self.entropy.loss(stats.entropy) * shares_N),
            "entropy": batch.sum_per_example(stats.entropy.detach() * shares_N),
            "ratio": batch.sum_per_example(ratio_N * shares_N),
            "approxkl": batch.sum_per_example(moved_N * shares_N),
            "clip_low": tree_sums(batch, clipped.low_S),
            "clip_high": tree_sums(batch, clipped.high_S),
            "clip_units": tree_sums(batch, clipped.count_S),
            "value_clipped": batch.sum_per_example(value_clipped_N * shares_N.to(value_N.dtype)),
        }

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Adds the mean losses over the tokens of a mini-batch; during warm-up only the critic's."""
        value = self.value.coef * rows["value"].sum()
        if not self.warming:
            value = value + rows["policy"].sum() + rows["entropy_loss"].sum()
        return value / max(normalizers["tokens"], 1.0)

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes losses, entropy, approximate KL, clipped fractions and ratio over all updates of an iteration."""
        names = [name for name, value in rows.items() if value.is_floating_point()]
        means = {name: rows[name].sum() / max(normalizers["tokens"], 1.0) for name in names}
        units = rows["clip_units"].sum().clamp(min=1)
        low, high = rows["clip_low"].sum() / units, rows["clip_high"].sum() / units
        return {
            "loss/policy_avg": means["policy"],
            "loss/value_avg": means["value"],
            "entropy": means["entropy"],
            "policy/approxkl_avg": means["approxkl"],
            "policy/clip_frac": low + high,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "value/clip_frac": means["value_clipped"],
            "policy/ratio": means["ratio"],
        }

    # Checkpoints and exports.

    def save_critic(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the critic as a value model, which ``ValueScorer(folder)`` loads to search by.

        Args:
            folder: destination; written atomically, replacing an earlier critic.
            merge_adapter: merge an adapter into the weights and write the whole model.
        """
        self.configure_model()
        assert self.critic is not None
        assert self.model is not None
        tokenizer = self._export_tokenizer()
        self.critic.save_pretrained(folder, tokenizer, policy=self.model, merge_adapter=merge_adapter)

    def check_critic_export(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Checks before training that ``save_critic`` will be allowed to replace a folder.

        Raises:
            ValueError: the folder holds something other than a critic.
        """
        self.configure_model()
        assert self.critic is not None
        model: Any = self.model if self.critic.model is None else self.critic.model
        kind = export_kind(model, merge_adapter=merge_adapter, with_head=True)
        check_replaceable(Path(folder).expanduser().resolve(), kind)

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
