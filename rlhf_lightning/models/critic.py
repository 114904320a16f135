"""The critic, which predicts returns by a head on the policy's hidden states, or by a separate model.

Legend: N scored tokens, D hidden size, M members of an ensemble, K attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..sequences import AttentionKernel, SequenceBatch, register_attention
from ..utils.transfer import count_index
from .backbone import Layout, base_model, fix_rotary_frequencies, hidden_states
from .layout import resolve_layout
from .loading import load_causal_lm
from .reward_ensemble import MemberMeans
from .reward_head import (
    HeadKind,
    RewardHead,
    freeze_output_projection,
    head_files,
    read_head_options,
    read_head_state,
)
from .reward_model import RewardModel, RewardModelOptions
from .saving import save_pretrained


class ValueModel(RewardModel):
    """A critic outside of training: the value of a solution so far is the return that it expects from there on.

    It is read after the last token, which must not be the one that ends an answer: PPO trains values of states before
    sampled tokens, and nothing is sampled after the end.

    Example::

        model = ValueModel.from_pretrained("runs/ppo/critic")
    """

    method: ClassVar[str] = "value"
    trained_by: ClassVar[str] = "PPOModule"

    @classmethod
    def stored_options(cls, folder: str | Path) -> dict[str, Any]:
        """Reads the options that are stored with a critic.

        Raises:
            ValueError: the folder holds none.
        """
        if read_head_options(folder).get("method") != cls.method:
            raise ValueError(
                f"{str(folder)!r} holds no critic: PPOModule.save_critic writes one, as does ModelExport with "
                "critic_folder"
            )
        return super().stored_options(folder)


class Critic(nn.Module):
    """Predicts values of states from the policy's hidden states, or with a separate model.

    Args:
        head: maps hidden states to one number, or to the outputs of a reward model.
        model: the critic's own model; ``None`` where it reads the policy's hidden states.
        layout: layout of batches in the critic's own model.
        options: options of the reward model that the head is from: weights of its attributes, and the state that a
            value is read from: the ``last`` one, or with the pooling ``mean`` that of the completion's states so far
            (before the first, the state of the prompt).
        means: running means of its members' rewards.
    """

    def __init__(
        self,
        head: RewardHead,
        model: nn.Module | None = None,
        layout: Literal["auto", "packed", "padded"] = "auto",
        *,
        options: RewardModelOptions | None = None,
        means: MemberMeans | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.model = model
        self.options = RewardModelOptions() if options is None else options
        self.means = MemberMeans(*head.weight.shape[:2]) if means is None else means
        self._requested_layout = layout
        self._layout: Layout | None = None

    @property
    def is_shared(self) -> bool:
        """Whether it reads the policy's hidden states."""
        return self.model is None

    def values(self, hidden_ND: Tensor) -> Tensor:
        """Computes values, ``(N, D) -> (N,)``: the mean over members of the weighted attributes, as in a reward."""
        values_NMK: Tensor = self.head(hidden_ND)
        return self.options.combined(self.means.centred(values_NMK)).mean(dim=1)

    def own_values(self, batch: SequenceBatch) -> Tensor:
        """Computes values ``(N,)`` of the states before the scored tokens with the critic's own model."""
        assert self.model is not None
        if self._layout is None:
            self._layout = resolve_layout(self.model, self._requested_layout)
        hidden = hidden_states(self.model, batch, self._layout)
        states_ND = hidden.read(batch.source_index, batch.source_path, batch.source_depth)
        if self.options.pooling == "mean":
            longest = int(batch.host["scored_lengths"].max())
            states_ND = means_so_far(states_ND, batch.sequence_index, batch.num_sequences, longest)
        return self.values(states_ND)

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: nn.Module,
        merge_adapter: bool = False,
    ) -> None:
        """Writes the critic as a folder that ``ValueModel.from_pretrained`` loads.

        Args:
            folder: destination; written atomically, replacing an earlier critic.
            tokenizer: written with it.
            policy: whose hidden states it reads, if it has no model of its own.
            merge_adapter: merge an adapter into the weights and write the whole model.
        """
        means = {"member_means": self.means.value.tolist()} if self.means.weight else {}
        files = head_files(self.head, {"method": ValueModel.method, **self.options.stored(), **means})
        model: Any = policy if self.model is None else self.model
        save_pretrained(model, tokenizer, folder, merge_adapter=merge_adapter, extra_files=files)


def means_so_far(states_ND: Tensor, sequence_index_N: Tensor, num_sequences: int, longest: int) -> Tensor:
    """Computes running means of each sequence's states, without the first: it is the prompt's, and is returned as is.

    Args:
        states_ND: before each scored token of a completion, sequence after sequence.
        sequence_index_N: the sequence of each.
        num_sequences: number of sequences.
        longest: number of states of the longest sequence.

    Returns:
        ``(N, D)``, in at least fp32.

    Example:
        >>> states, index = torch.tensor([[9.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 0, 1])
        >>> means_so_far(states, index, 2, 3).flatten().tolist()
        [9.0, 1.0, 2.0, 5.0]
    """
    states = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
    lengths_S = count_index(sequence_index_N, num_sequences)
    first_N = (lengths_S.cumsum(0) - lengths_S)[sequence_index_N]
    depth_N = torch.arange(len(states), device=states.device) - first_N
    # Sums within each sequence in rows of a padded matrix: differences of sums over all sequences would cancel.
    rows = states.new_zeros(num_sequences, longest, states.shape[1])
    rows[sequence_index_N, depth_N] = torch.where(depth_N[:, None] > 0, states, 0.0)
    sums_ND = rows.cumsum(dim=1)[sequence_index_N, depth_N]
    return torch.where(depth_N[:, None] > 0, sums_ND / depth_N.clamp(min=1)[:, None], states)


def shared_critic(hidden_size: int, *, kind: HeadKind, seed: int, dtype: torch.dtype) -> Critic:
    """Makes a critic with a head on the policy's hidden states; its values start at 0."""
    head = _silent(RewardHead(hidden_size, kind=kind, seed=seed, dtype=dtype))
    return Critic(head, options=RewardModelOptions(head=kind))


def own_critic(
    source: str,
    *,
    kind: HeadKind,
    seed: int,
    dtype: torch.dtype,
    attention: AttentionKernel,
    layout: Literal["auto", "packed", "padded"],
    longest: int | None = None,
    **options: Any,
) -> Critic:
    """Makes a critic with a separate model and its stored head, or a head whose values start at 0.

    Args:
        source: Hugging Face id or folder, possibly of a reward model or critic: values then start as its own.
        kind: of the head, where none is stored.
        seed: of the head's initial inner weights.
        dtype: of the weights.
        attention: kernel of the packed layout.
        layout: layout of batches.
        longest: maximum number of tokens of a sequence, if known, as for ``steady_rotary``.
        options: passed to ``load_causal_lm``.

    Raises:
        ValueError: the folder holds a head that gives no value.
    """
    # A head of another kind is refused before the weights are read.
    stored = read_head_options(source)
    _check_head(source, stored)
    name = register_attention(attention)
    model = load_causal_lm(source, dtype=dtype, attn_implementation=name, headless=True, **options)
    fix_rotary_frequencies(model, longest=longest, head=False)

    if stored or read_head_state(source):
        kind_of = ValueModel if stored.get("method") == ValueModel.method else RewardModel
        reward = kind_of(model, RewardModelOptions(**kind_of.stored_options(source)), dtype=dtype)
        reward.load_head_files(source)
        return Critic(reward.head, model, layout, options=reward.options, means=reward.means)
    freeze_output_projection(model)
    size = int(base_model(model).config.get_text_config().hidden_size)
    head = _silent(RewardHead(size, kind=kind, seed=seed, dtype=dtype))
    return Critic(head, model, layout, options=RewardModelOptions(head=kind))


def _check_head(source: str, stored: Mapping[str, Any]) -> None:
    """Refuses models from which no value can be read."""
    if stored and stored.get("method") not in (RewardModel.method, ValueModel.method):
        raise ValueError(
            f"value.model {source!r} holds a {stored.get('method')} model: give a reward model, or a language model"
        )
    if stored.get("ensemble") == "adapters" and stored.get("num_models", 1) > 1:
        raise ValueError(
            f"value.model {source!r} is an ensemble of {stored['num_models']} adapters, which no critic can be: give "
            "a reward model with ensemble='heads' or num_models=1, or a language model"
        )


def _silent(head: RewardHead) -> RewardHead:
    with torch.no_grad():
        head.weight.zero_()
    return head
