"""Group-relative policy optimisation and its family.

Legend: E prompts of this rank, S completions of them, K reward functions, B branches, N tokens of trained completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.logging import store_options
from ..distributed.collectives import Metrics, Rows, sum_over_ranks
from ..inference import Completion, derive_seed
from ..rewards.specs import RewardSpec
from ..rl import KLPenalty, OffPolicyCorrection, PolicyLoss, RelativeAdvantage, TokenEntropy, TreeRollouts
from ..rl.exploration import Explorer
from ..rl.on_policy_module import OnPolicyModule
from ..rl.replay_buffer import ReplayBuffer
from ..rl.rollouts import Rollouts, token_field, tree_extremes, tree_sums
from ..rl.step_rewards import steps_differ
from ..rl.training_trees import TrainingTrees
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
        tree: what completions come from, samples or searches, and advantages where they share steps: ``TreeRollouts``.
        beta: weight of the KL divergence from the reference, at least 0; 0 needs no reference.
        kl: estimator of the divergence, and where it is applied: ``KLPenalty``.
        off_policy: importance weights and masks for samples of another distribution, and a buffer of earlier ones:
            ``OffPolicyCorrection``.
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
        tree: TreeRollouts = TreeRollouts(),
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
        off_policy, tree = build_group(off_policy, OffPolicyCorrection), build_group(tree, TreeRollouts)
        tree.check(advantages)
        kl.check(beta)
        if advantages.normalizes_each_reward and kl.in_reward:
            raise ValueError(
                "kl.in_reward is true, but advantages.multi_objective_aggregation 'normalize_then_sum' normalises "
                "each reward individually: leave one of them at its default"
            )

        if kwargs.get("compressor") is not None and (tree.searches or off_policy.replay_capacity):
            raise ValueError(
                "compressor is given with searches in tree.rollouts or with off_policy.replay_capacity, which keep "
                "prompts without their contexts: leave one out"
            )
        super().__init__(model, rewards=rewards, num_generations=num_generations, **kwargs)
        store_options(
            self,
            loss=plain_group(loss, PolicyLoss),
            advantages=plain_group(advantages, RelativeAdvantage),
            tree=plain_group(tree, TreeRollouts),
            kl=plain_group(kl, KLPenalty),
            off_policy=plain_group(off_policy, OffPolicyCorrection),
            entropy=plain_group(entropy, TokenEntropy),
        )
        self.policy_loss = loss
        self.relative_advantage = advantages
        self.tree_advantage = tree
        self.beta = beta
        self.kl = kl
        self.off_policy = off_policy
        self.entropy = entropy
        self.dynamic_sampling = dynamic_sampling
        self.training_trees = TrainingTrees(self)
        self.explorer = Explorer(self, tree)
        self.replay = ReplayBuffer(off_policy, self.seed)
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
        self.explorer.begin()
        rollouts = super().rollout(prompts, stage, attempt)
        if stage != "train":
            return rollouts
        self._replaced = 0.0
        for again in range(1, self.dynamic_sampling + 1):
            signal_E = self.training_trees.has_signal(rollouts)
            if self.has_process_reward:
                signal_E = signal_E | steps_differ(rollouts.steps)
            weak = (~signal_E).nonzero().flatten().tolist() if rollouts.prompts else []
            count = sum_over_ranks({"weak": float(len(weak))})["weak"]
            if not count:
                break
            self._replaced += count
            others = [self._other_prompt(rollouts.prompts[place].row_id, again) for place in weak]
            rollouts.replace(weak, super().rollout(others, stage, again))
        return rollouts

    def explore(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Finds the completions of prompts to train on: samples, or those of the searches in ``tree.rollouts``."""
        return self.explorer(prompts, seeds)

    def _other_prompt(self, row_id: str, again: int) -> Example:
        """Chooses a replacement prompt as a function of the replaced row, independent of the number of ranks."""
        pool: Any = self.trainer.train_dataloader.examples  # type: ignore[union-attr]
        number = derive_seed(self.seed, self.iteration, row_id, again) % len(pool)
        return self.validate_batch(ExampleBatch([pool[number]]))[0]

    # From rollouts to training trees.

    def prepare(self, rollouts: Rollouts) -> tuple[list[Example], Metrics]:
        """Builds the training trees and attaches advantages, old and reference log-probs, and token weights."""
        trees, values = self.training_trees.prepare(rollouts)
        if self.explorer.options.searches:
            values |= self.explorer.metrics(rollouts.completions)
        if self.dynamic_sampling:
            values["dynamic_sampling/replaced"] = torch.tensor(self._replaced)
        return trees, values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the replay buffer."""
        super().on_save_checkpoint(checkpoint)
        if self.off_policy.replay_capacity:
            checkpoint["on_policy"]["replay"] = self.replay.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the replay buffer."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("on_policy", {}).get("replay")
        if state is not None and self.off_policy.replay_capacity:
            self.replay.load_state_dict(state)

    # The update.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts completions, including those excluded from the loss, and tokens in the loss, shared ones once."""
        completions = sum(example.fields["num_completions"] for example in examples)
        tokens = sum(float(example.fields["shares"].sum()) for example in examples)
        return {"completions": float(completions), "tokens": tokens}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the loss per tree, with the loss type's token weights but not divided by a total yet."""
        stats = self.token_stats(batch, temperature=self.temperature, entropy=True)
        sequences: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        names = ("advantages", "shares", "old_logprobs", "ref_logprobs", "sampling_logprobs", "weights")
        fixed: dict[str, Any] = {name: token_field(self.extra(batch), name, stats.logprobs) for name in names}
        shares_N = fixed["shares"]
        loss_N, kl_N = self.token_losses(stats.logprobs, fixed, **sequences)

        # Weights of the loss type's aggregation, to be divided by its global total in `loss`.
        weights_S = self.policy_loss.relative_weights(
            batch.sum_per_sequence(shares_N),
            max_completion_length=self.max_completion_length,
            dtype=stats.logprobs.dtype,
        )

        low_S, high_S, count_S = self.policy_loss.clipped(
            stats.logprobs, old_logprobs_N=fixed["old_logprobs"], advantages_N=fixed["advantages"], **sequences
        )
        share_S = 1 / count_S.clamp(min=1)
        rows = {
            "policy": batch.sum_per_example(loss_N * shares_N * weights_S[batch.sequence_index]),
            "entropy": batch.sum_per_example(stats.entropy.detach() * shares_N),
            "clip_low": tree_sums(batch, low_S),
            "clip_high": tree_sums(batch, high_S),
            "clip_units": tree_sums(batch, count_S),
            "clip_low_min": tree_extremes(batch, low_S * share_S, "amin"),
            "clip_high_max": tree_extremes(batch, high_S * share_S, "amax"),
        }
        if self.entropy.coef:
            rows["entropy_loss"] = batch.sum_per_example(self.entropy.loss(stats.entropy) * shares_N)
        if kl_N is not None:
            rows["kl"] = batch.sum_per_example(kl_N.detach() * shares_N)
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
