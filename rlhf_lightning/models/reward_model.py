"""Outcome reward models: one scalar, or several, for a whole completion, by one model or an ensemble.

Legend: S sequences, N scored tokens, D hidden size, M members of an ensemble, K attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.messages import Text
from ..sequences import Segment, SequenceBatch
from ..utils.validation import check_choice, check_count
from .backbone import Layout, hidden_states
from .headed_model import HeadedModel, HeadedModelOptions
from .reward_ensemble import (
    MEMBER_ADAPTERS,
    MemberMeans,
    add_member_adapters,
    load_member_adapters,
    member_state,
    using_member,
)
from .reward_head import (
    HEAD_KINDS,
    HeadKind,
    NoClassifier,
    classifier_from,
    head_files,
    mean_pooled,
    read_head_options,
    whole,
    with_padding_token,
)
from .saving import save_pretrained
from .scoring import TemplateSettings, answered, check_texts, template_of

EnsembleKind = Literal["heads", "adapters"]
Pooling = Literal["last", "mean"]


@dataclass
class RewardModelOptions(HeadedModelOptions):
    """Options of an outcome reward model.

    Args:
        head: ``linear``, or ``mlp`` with one hidden layer.
        num_attributes: K, at least 1; may be left at 1 if ``attributes`` is given.
        pooling: read the ``last`` token's state, or the ``mean`` over the completion's tokens.
        attributes: names of the head's outputs, all different; by default ``reward``, or ``attribute_0`` to
            ``attribute_{K-1}``.
        attribute_weights: weights of the attributes in the reward, finite and not all 0; 1 / K each by default.
        num_models: M, at least 1.
        ensemble: ``heads`` share the decoder and are computed together; ``adapters``: each member has a LoRA adapter
            and a head on one frozen decoder. Members run one after the other, forward and backward, so that the
            activations of only one are in memory; a step takes M times as long.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> options = RewardModelOptions(num_attributes=2)
        >>> options.attributes, options.attribute_weights
        (['attribute_0', 'attribute_1'], [0.5, 0.5])
    """

    head: HeadKind = "linear"
    num_attributes: int = 1
    pooling: Pooling = "last"
    attributes: list[str] | None = None
    attribute_weights: list[float] | None = None
    num_models: int = 1
    ensemble: EnsembleKind = "heads"

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEAD_KINDS)
        check_count("num_attributes", self.num_attributes, "one output of the head per attribute")
        check_choice("pooling", self.pooling, ("last", "mean"))
        check_count("num_models", self.num_models, "1 is no ensemble; 4 is a usual one")
        check_choice("ensemble", self.ensemble, ("heads", "adapters"))
        self.attributes = self._checked_names()
        self.num_attributes = len(self.attributes)
        self.attribute_weights = self._checked_weights(self.attributes)

    def _checked_names(self) -> list[str]:
        if self.attributes is None:
            return ["reward"] if self.num_attributes == 1 else [f"attribute_{k}" for k in range(self.num_attributes)]
        names = list(self.attributes)
        if self.num_attributes not in (1, len(names)) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"attributes is {names} with num_attributes={self.num_attributes}; give as many different names, or "
                "leave num_attributes out"
            )
        return names

    def _checked_weights(self, names: Sequence[str]) -> list[float]:
        given = self.attribute_weights
        weights = [1 / len(names)] * len(names) if given is None else [float(weight) for weight in given]
        if len(weights) != len(names) or not all(map(math.isfinite, weights)) or not any(weights):
            raise ValueError(
                f"attribute_weights is {weights} for the attributes {names}; give one finite number for each, not all 0"
            )
        return weights

    @property
    def names(self) -> list[str]:
        """Names of the K attributes."""
        return list(self.attributes or ())

    @property
    def members_take_turns(self) -> bool:
        """Whether members are computed one after the other."""
        return self.ensemble == "adapters" and self.num_models > 1

    def head_shape(self) -> dict[str, Any]:
        """Returns the shape of M heads with K outputs each."""
        return {"kind": self.head, "num_outputs": self.num_attributes, "num_models": self.num_models}

    def combined(self, rewards: Tensor) -> Tensor:
        """Combines attributes to the scalar reward: ``(..., K) -> (...)``."""
        # Filled on the device: a copy of the list would have to be waited for.
        return rewards @ torch.stack([rewards.new_full((), weight) for weight in self.attribute_weights or ()])


class RewardModel(HeadedModel):
    """A decoder with a scalar head, read at the end of the completion, or an ensemble of them.

    The reward of a completion is r = sum_k w_k r_k over the attributes; that of an ensemble is the mean over its
    members, each minus its running mean over the training rows if it learned from pairs (``RewardModule``).

    Args:
        model: a causal language model; with a LoRA adapter for an ensemble of adapters.
        options: the model's options.
        settings: see ``HeadedModel``; with ``folder``, also the adapters and means of members are loaded.

    Example::

        model = RewardModel.from_pretrained("runs/reward/model", dtype=torch.bfloat16, device="cuda")
        model.score(["2+2="], ["4"])
    """

    method: ClassVar[str] = "reward"
    trained_by: ClassVar[str] = "RewardModule"
    options_type = RewardModelOptions
    options: RewardModelOptions

    def __init__(self, model: nn.Module, options: RewardModelOptions | None = None, **settings: Any) -> None:
        super().__init__(model, options, **settings)
        folder = settings.get("folder")
        if self.options.members_take_turns:
            add_member_adapters(model, self.options.num_models, seed=settings.get("seed", 0), folder=folder)
        self.means = MemberMeans(self.options.num_models, self.options.num_attributes)
        if folder is not None:
            self._load_means(folder)

    def _load_means(self, folder: str | Path) -> None:
        means = read_head_options(folder).get("member_means")
        if means is not None:
            self.means.set(means)

    # Rewards of packed batches.

    def forward(self, batch: SequenceBatch, layout: Layout, member: int | None = None) -> Tensor:
        """Computes the rewards of a packed batch's sequences by member and attribute.

        Args:
            batch: the sequences.
            layout: how to run them.
            member: the only member to compute, if members take turns; the caller activates its adapter with
                ``using_member``, for the backward pass too.

        Returns:
            ``(S, M, K)``, or ``(S, 1, K)`` of one member; not centred.
        """
        if not self.options.members_take_turns:
            return self.head(self._states(batch, layout))  # type: ignore[no-any-return]
        if member is not None:
            return self.head(self._states(batch, layout), member)  # type: ignore[no-any-return]
        outputs = []
        for number in range(self.options.num_models):
            with using_member(self.model, number):
                outputs.append(self.head(self._states(batch, layout), number))
        return torch.cat(outputs, dim=1)

    def _states(self, batch: SequenceBatch, layout: Layout) -> Tensor:
        """Computes the hidden state of each sequence that a head reads: ``(S, D)``."""
        hidden = hidden_states(self.model, batch, layout)
        if self.options.pooling == "mean":
            flat_N, depth_N = batch.scored_positions()
            states_ND = hidden.read(flat_N, batch.source_path, depth_N)
            return mean_pooled(states_ND, batch.sequence_index, batch.num_sequences)
        return hidden.read(batch.last_index, batch.last_path, batch.lengths[batch.last_path] - 1)

    # Scoring.

    def sequence_values(self, batch: SequenceBatch, layout: Layout) -> Sequence[Tensor]:
        """Computes the centred rewards of each sequence by member and attribute: ``(M, K)``."""
        return self.means.centred(self(batch, layout)).unbind()

    def encode(self, prompt: Text, completion: Text, template: Mapping[str, Any] | None = None) -> Segment:
        """Tokenizes a prompt with its completion as ``PreferenceDataModule`` does, its end token included.

        Args:
            prompt: a text, or chat messages.
            completion: a text, or chat messages; a text that answers a chat is an assistant message.
            template: settings of the chat template, such as ``tools``: one row's ``chat_template_kwargs`` of ``score``.

        Raises:
            ValueError: the row cannot be tokenised, or has too many tokens.
        """
        tree = self.rows.answers(answered(prompt, completion, template))
        self.check_length(tree)
        return tree

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        chat_template_kwargs: TemplateSettings = None,
    ) -> list[float]:
        """Computes one reward per completion; completions of one prompt share its computation.

        Args:
            prompts: texts, or lists of chat messages.
            completions: one per prompt; texts, or lists of chat messages.
            chat_template_kwargs: arguments of the chat template, such as ``tools``: for all rows, or a list with one
                per row.

        Raises:
            ValueError: lists of different length, an empty completion, or one that is too long.
        """
        return self.score_with_std(prompts, completions, chat_template_kwargs)[0]

    def score_with_std(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        chat_template_kwargs: TemplateSettings = None,
    ) -> tuple[list[float], list[float]]:
        """Computes rewards and their standard deviation over the members (0 without an ensemble); see ``score``."""
        check_texts(prompts, completions)
        trees = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not completion:
                raise ValueError(f"completion {number} is empty: give at least one character or message")
            try:
                trees.append(self.encode(prompt, completion, template_of(chat_template_kwargs, number)))
            except ValueError as error:
                raise ValueError(f"completion {number}: {error}") from error
        return self.summarized(self.score_trees(trees))

    def summarized(self, values: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Returns the rewards of sequences and their standard deviations over the members.

        Args:
            values: ``(M, K)`` for each sequence.
        """
        members = [self.options.combined(value) for value in values]
        return [float(m.mean()) for m in members], [float(m.std(correction=0)) for m in members]

    # Folders.

    def save_pretrained(
        self, folder: str | Path, *, merge_adapter: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Writes the reward model as a Hugging Face folder.

        A single linear head at the last token of a whole model (without adapter, or with the adapter merged) is written
        as an ``AutoModelForSequenceClassification`` with a label per attribute, which scores rows that end in the
        end-of-sequence token as this model does. Otherwise the language model or its adapter is written, with the head
        in ``reward_head.safetensors`` and its options in ``reward_head.json``. ``from_pretrained`` loads both.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
            tokenizer: written with the model; by default its own.
        """
        options = self.options
        complete = merge_adapter or not hasattr(self.model, "peft_config")
        if complete and options.head == "linear" and options.num_models == 1 and options.pooling == "last":
            padded = with_padding_token(tokenizer or self.rows.tokenizer)
            convert = classifier_from(whole(self.head.weight)[0], options.names, int(padded.pad_token_id))
            files = head_files(None, {"method": self.method, **self.head_options()})
            with suppress(NoClassifier):
                save_pretrained(
                    self.model, padded, folder, merge_adapter=merge_adapter, convert=convert, extra_files=files
                )
                return
        super().save_pretrained(folder, merge_adapter=merge_adapter, tokenizer=tokenizer)

    def load_head_files(self, folder: str | Path) -> None:
        """Loads the head, the members' means, and the adapters of all members except the first."""
        super().load_head_files(folder)
        self._load_means(folder)
        if self.options.members_take_turns:
            load_member_adapters(self.model, folder)

    def head_files_writer(self) -> Callable[[Path], None]:
        """Adds the adapters of all members except the first, which is written as the model's adapter."""
        write_head = super().head_files_writer()
        if not self.options.members_take_turns:
            return write_head
        state = {name: whole(tensor).contiguous() for name, tensor in member_state(self.model).items()}

        def write(place: Path) -> None:
            write_head(place)
            save_file(state, place / MEMBER_ADAPTERS, metadata={"format": "pt"})

        return write

    def head_options(self) -> Mapping[str, Any]:
        """Returns the options, and the members' means where there are any."""
        means = {"member_means": self.means.value.tolist()} if self.means.weight else {}
        return {**super().head_options(), **means}
