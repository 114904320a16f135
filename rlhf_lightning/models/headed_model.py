"""Base of reward models: a decoder with a scalar head, its scoring in micro-batches, and its folder.

Legend: S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.lengths import longest
from ..data.tokenization import RowTokenizer
from ..sequences import (
    AttentionKernel,
    Example,
    Segment,
    SequenceBatch,
    pack,
    plan_micro_batches,
    register_attention,
)
from ..sequences.geometry import Part
from ..utils.keywords import refuse_unknown
from ..utils.transfer import to_host
from ..utils.validation import check_positive
from .backbone import Layout, base_model, check_fits, evaluating, fix_rotary_frequencies, num_positions
from .layout import resolve_layout
from .loading import load_causal_lm, load_tokenizer, locate
from .reward_head import (
    RewardHead,
    freeze_output_projection,
    head_files,
    load_head,
    read_head_options,
    read_head_state,
)
from .saving import save_pretrained
from .scoring import check_length, grouped


@dataclass
class HeadedModelOptions:
    """Options of a reward model that are stored with its head."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether the decoder's output projection is read; if not, it is frozen, and may be missing in the folder."""
        return False

    def head_shape(self) -> dict[str, Any]:
        """Returns the arguments of ``RewardHead``; an empty dictionary builds no head."""
        raise TypeError(f"{type(self).__name__} must define head_shape()")

    def stored(self) -> dict[str, Any]:
        """Returns the contents of ``reward_head.json``, from which ``from_pretrained`` rebuilds the model."""
        return asdict(self)


class HeadedModel(nn.Module):
    """A decoder with a ``RewardHead``, which scores sequences.

    A LightningModule holds it together with the loss, and learned rewards hold it alone. Its weights are ``model.*``
    and ``head.*``.

    Args:
        model: a causal language model, with or without an adapter.
        options: the model's options.
        tokenizer: tokenizer of the texts that are scored; packed batches can be scored without one.
        folder: folder of a model with a stored head, which is loaded if there is one; ``None`` draws the head.
        seed: seed of the head's initial weights.
        dtype: dtype of the head's weights.
        micro_batch_tokens: maximum number of tokens per forward, above 0; affects memory, not scores.
        layout: layout of batches: ``"packed"``, ``"padded"``, or ``"auto"``: packed where the model supports it.
        share_prefix: compute a prompt once for all its completions; does not affect scores.

    Raises:
        ValueError: an option is out of range, or the stored head has another shape.
    """

    method: ClassVar[str]  # name of the method in an exported folder
    trained_by: ClassVar[str]  # name of the module that trains it
    options_type: ClassVar[type[HeadedModelOptions]]

    def __init__(
        self,
        model: nn.Module,
        options: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        folder: str | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        micro_batch_tokens: int = 8192,
        layout: Literal["auto", "packed", "padded"] = "auto",
        share_prefix: bool = True,
    ) -> None:
        check_positive("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
        super().__init__()
        self.options = self.options_type() if options is None else options
        self.model: Any = model
        self.head: Any = None
        self.tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefix = share_prefix
        self._requested_layout = layout
        self._layout: Layout | None = None
        self._rows: RowTokenizer | None = None

        if not self.options.predicts_tokens:
            freeze_output_projection(model)
        if shape := self.options.head_shape():
            hidden_size = base_model(model).config.get_text_config().hidden_size
            self.head = RewardHead(hidden_size, **shape, seed=seed, dtype=dtype)
            if folder is not None:
                load_head(self.head, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        micro_batch_tokens: int = 8192,
        attention: AttentionKernel = "auto",
        layout: Literal["auto", "packed", "padded"] = "auto",
        share_prefix: bool = True,
        **options: Any,
    ) -> Self:
        """Loads an exported model with its head, frozen and in evaluation mode.

        Args:
            folder: folder or hub id of an export; for an outcome reward model also of a sequence classifier of
                transformers whose head is a linear layer ``score`` without bias.
            dtype: dtype of the weights; adapters are kept in at least fp32.
            device: device of the weights; by default the CPU, or torch's default device.
            tokenizer: tokenizer, or its folder or hub id, if not the model's.
            micro_batch_tokens: maximum number of tokens per forward, above 0; affects memory, not scores.
            attention: kernel of the packed layout, as in ``PostTrainingModule``; does not affect scores.
            layout: layout of batches: ``"packed"``, ``"padded"`` or ``"auto"``.
            share_prefix: compute a prompt once for all its completions; does not affect scores.
            options: options of the model that override the stored ones.

        Raises:
            TypeError: an option does not exist; the message suggests another.
            ValueError: there is no such folder, or it holds no head, or the head of another method.
        """
        known = {field.name for field in fields(cls.options_type)}
        refuse_unknown(cls.options_type, [name for name in options if name not in known])
        place = locate(folder, what="reward model")
        chosen = cls.options_type(**{**cls.stored_options(place), **options})
        decoder = load_causal_lm(
            place,
            dtype=dtype,
            attn_implementation=register_attention(attention),
            trainable=False,
            headless=not chosen.predicts_tokens,
        )
        fix_rotary_frequencies(decoder, head=chosen.predicts_tokens)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = load_tokenizer(tokenizer or place)
        model = cls(
            decoder,
            chosen,
            tokenizer=tokenizer,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            layout=layout,
            share_prefix=share_prefix,
        )
        model.load_head_files(place)
        model.requires_grad_(False).eval()
        return model if device is None else model.to(device)

    @classmethod
    def stored_options(cls, folder: str | Path) -> dict[str, Any]:
        """Reads the options that are stored with a model of this kind, or those of a sequence classifier.

        Raises:
            ValueError: the folder holds no head, or the head of another method.
        """
        stored = read_head_options(folder) or _classifier_options(folder)
        if stored.pop("method", None) != cls.method:
            raise ValueError(
                f"{str(folder)!r} holds no model that {cls.trained_by} exported: train one with {cls.trained_by}"
            )
        stored.pop("member_means", None)  # no option: load_head_files reads it
        return stored

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        first: Tensor = next(self.parameters())
        return first.device

    @property
    def layout(self) -> Layout:
        """The layout of batches; decided once, when the model is on its device."""
        if self._layout is None:
            self._layout = resolve_layout(self.model, self._requested_layout)
        return self._layout

    @property
    def rows(self) -> RowTokenizer:
        """Tokenizes texts as in training.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{type(self).__name__} has no tokenizer: give tokenizer=load_tokenizer(folder)")
        if self._rows is None or self._rows.tokenizer is not self.tokenizer:
            self._rows = RowTokenizer(self.tokenizer)
        return self._rows

    # Scoring.

    def sequence_values(self, batch: SequenceBatch, layout: Layout) -> Sequence[Tensor]:
        """Computes one tensor per sequence of a packed batch."""
        raise TypeError(f"{type(self).__name__} must define sequence_values(batch, layout)")

    @torch.no_grad()
    def score_examples(self, examples: Sequence[Example]) -> list[list[Tensor]]:
        """Computes ``sequence_values`` in micro-batches, in evaluation mode.

        Args:
            examples: any number, with any number of sequences.

        Returns:
            For each example the values of its sequences, on the CPU.

        Raises:
            ValueError: an example does not fit the model.
        """
        check_fits(self.model, examples)
        plan = plan_micro_batches(examples, budget=self.micro_batch_tokens, share_prefix=self.share_prefix)
        places: list[int] = []  # the example of each sequence
        values: list[Tensor] = []
        wanted: set[Part] = set()
        with evaluating(self):
            for micro in plan:
                chosen = [examples[n] for n in micro]
                batch = pack(chosen, share_prefix=self.share_prefix, device=self.device, wanted=wanted)
                values += self.sequence_values(batch, self.layout)
                places += [micro[example] for example in batch.host["example_index"].tolist()]

        # One copy of all values, once all are computed.
        found: list[list[Tensor]] = [[] for _ in examples]
        hosted = to_host(dict(enumerate(values)))
        for number, place in enumerate(places):
            found[place].append(hosted[number])
        return found

    def score_trees(self, trees: Sequence[Segment]) -> list[Tensor]:
        """Computes ``sequence_values`` of prompts with one completion each, in order; equal prompts once.

        Args:
            trees: prompts with completions, as ``encode`` makes them.
        """
        examples, numbers = grouped(trees, self.micro_batch_tokens)
        values: list[Tensor] = [torch.empty(0)] * len(trees)
        for places, found in zip(numbers, self.score_examples(examples), strict=True):
            for place, value in zip(places, found, strict=True):
                values[place] = value
        return values

    def check_length(self, tree: Segment) -> None:
        """Checks that a prompt with its completion fits the model's positions.

        Raises:
            ValueError: it has too many tokens.
        """
        check_length(longest(tree), num_positions(self.model))

    # Folders.

    def save_pretrained(
        self, folder: str | Path, *, merge_adapter: bool = False, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Writes the language model or its adapter, with its head in the same folder.

        The head is in ``reward_head.safetensors`` and its options in ``reward_head.json``; ``from_pretrained`` loads
        them.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
            tokenizer: written with the model; by default its own.
        """
        files = self.head_files_writer()
        save_pretrained(
            self.model, tokenizer or self.rows.tokenizer, folder, extra_files=files, merge_adapter=merge_adapter
        )

    def load_head_files(self, folder: str | Path) -> None:
        """Loads the files that ``head_files_writer`` wrote, or the head of a sequence classifier.

        Args:
            folder: folder written by ``save_pretrained`` of a model with the same options.

        Raises:
            ValueError: the folder holds no head, or one of another shape.
        """
        if self.head is not None and not load_head(self.head, folder):
            raise ValueError(f"{str(folder)!r} holds no head: export it again")

    def head_files_writer(self) -> Callable[[Path], None]:
        """Gathers the head on every rank and returns a function that writes it to a folder."""
        return head_files(self.head, {"method": self.method, **self.head_options()})

    def head_options(self) -> Mapping[str, Any]:
        """Returns the contents of ``reward_head.json``, except the method."""
        return self.options.stored()


def _classifier_options(folder: str | Path) -> dict[str, Any]:
    """Returns the options of an outcome reward model that is stored as a sequence classifier."""
    weight = read_head_state(folder).get("weight")
    return {} if weight is None else {"method": "reward", "num_attributes": weight.shape[1]}
