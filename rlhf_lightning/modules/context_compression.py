"""Context compression: trains a compressor so that answers given its summaries are those given the whole context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.module import PostTrainingModule
from ..core.reference_policy import ReferencePolicy
from ..distributed.collectives import Metrics, Rows
from ..losses.context_compression import full_context_kl
from ..losses.sft import nll
from ..models import FrozenReference, num_positions, output_head
from ..models.backbone import evaluating, hidden_states, scored_stats
from ..models.compressor_options import CompressorOptions, Pooling
from ..models.context_compressor import (
    ContextCompressor,
    compressor_kind,
    decoder_source,
    stored_options,
)
from ..models.loading import locate
from ..sequences import Example, ExampleBatch, Placement, Recurrence, Segment, SequenceBatch
from ..utils.files import check_replaceable
from ..utils.validation import check_not_negative

_CHUNK = 1 << 24  # logits that exist at once

FULL = "full_context"  # field of an example, and name of the part of a batch: the tree of the whole context


class ContextCompressionModule(PostTrainingModule):
    r"""Trains a ``ContextCompressor``: summaries that later tokens see in place of a context.

    .. math:: L = \frac{1}{T} \sum_i \left(a\, (-\log p_i(y_i)) + b\, KL(q_i \,\|\, p_i)\right)
              + \frac{c}{C} \sum_j -\log p_j(x_j)

    with ``p`` given the summaries and ``q`` given the whole context, T scored tokens of the answers, and C tokens of
    the contexts, which are reconstructed from their summaries. The sums run over the whole global batch.

    A row's ``context`` is divided into segments of ``segment_length`` tokens, with a slot for every ``ratio`` tokens
    (see ``ContextCompressor``), its prompt and completion follow and see the slots alone; a batch is one packed forest.
    The exported folder holds the compressor, with the model if that was trained.

    Args:
        model: Hugging Face id or folder: of a language model, or of a compressor, which is trained further.
        ratio: tokens per slot, at least 1.
        segment_length: tokens of a segment, a multiple of ``ratio``.
        recurrence: ``"accumulate"``: summaries of all segments stay visible; ``"replace"``: the last segment's alone.
        placement: ``"interleaved"``: a slot after every ``ratio`` tokens; ``"end"``: all slots after the segment.
        encoder_rank: rank of changes to the decoder's linear layers that apply to contexts alone; 0: the decoder
            itself reads contexts.
        pooling: added to a slot's embedding: ``"none"``, ``"mean"`` or ``"attention"`` over the tokens it stands for.
        condense_every: after so many whole segments their summaries are compressed by ``ratio`` again; 0: never.
        reads_query: let each segment begin with the row's prompt; a row then has one prompt after its context.
        train_decoder: train the decoder's weights as well; else the summaries and the encoder's changes alone.
        continuation_coef: a, at least 0: weight of the answers' negative log-likelihood.
        kl_coef: b, at least 0: weight of the divergence from the initial model given the whole context.
        autoencoding_coef: c, at least 0: weight of the contexts' negative log-likelihood, token by token after their
            summaries (ICAE, Ge et al., 2023, arXiv:2307.06945).
        seed: of the initial weights.
        kwargs: options of ``PostTrainingModule``; without ``lora``, and layouts other than packed.

    Raises:
        ValueError: an option is out of range, or the model cannot be given compressed contexts.

    Example::

        module = ContextCompressionModule("my-model", ratio=8, segment_length=256, kl_coef=1.0)
        lightning.Trainer(max_epochs=1).fit(module, ContextDataModule(train="rows.jsonl", global_batch_size=16))
    """

    takes_compressor: ClassVar[bool] = False
    default_learning_rate: ClassVar[float] = 1e-4
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "mean_token_accuracy")
    contracts: ClassVar[tuple[str, ...]] = ("ContextDataModule",)

    def __init__(
        self,
        model: str,
        *,
        ratio: int = 4,
        segment_length: int = 128,
        recurrence: Recurrence = "accumulate",
        placement: Placement = "interleaved",
        encoder_rank: int = 16,
        pooling: Pooling = "none",
        condense_every: int = 0,
        reads_query: bool = False,
        train_decoder: bool = False,
        continuation_coef: float = 1.0,
        kl_coef: float = 0.0,
        autoencoding_coef: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = CompressorOptions(
            ratio, segment_length, recurrence, placement, condense_every, reads_query, encoder_rank, pooling
        )
        coefficients = {
            "continuation_coef": continuation_coef,
            "kl_coef": kl_coef,
            "autoencoding_coef": autoencoding_coef,
        }
        for name, value in coefficients.items():
            check_not_negative(name, value, "0 leaves that loss out")
        if not any(coefficients.values()):
            raise ValueError(f"{', '.join(coefficients)} are all 0, so nothing is learnt: set continuation_coef to 1.0")
        if kwargs.get("lora") is not None or kwargs.get("quantization") is not None:
            raise ValueError(
                "lora and quantization are options of a policy: set encoder_rank, and train_decoder to train the model"
            )
        if kwargs.get("layout", "auto") == "padded":
            raise ValueError("layout is 'padded', and contexts are compressed in packed forests: use 'auto'")
        if kwargs.get("compile"):
            raise ValueError("compile is true, and a compressor's encoder changes its layers: set compile to false")
        super().__init__(model, **kwargs)
        self.options = options
        self.train_decoder = train_decoder
        self.continuation_coef = continuation_coef
        self.kl_coef = kl_coef
        self.autoencoding_coef = autoencoding_coef
        self.seed = seed
        self.weights: Any = None
        self.reference = ReferencePolicy(self, "auto")
        self._folder = self.model_source
        self._tokenizer_source = self._tokenizer_source or self._folder

    @property
    def uses_reference(self) -> bool:
        """Whether a copy of the initial model is kept, as the one that sees the whole context."""
        return self.kl_coef > 0 and self.train_decoder

    # The model.

    def configure_model(self) -> None:
        """Builds the decoder and the compressor on it, with the weights of a stored one."""
        if self.is_configured:
            return
        place = locate(self._folder, what="model")
        stored = stored_options(place)
        if stored is not None:
            # The decoder of a compressor may lie elsewhere.
            self.options.check_stored(stored, self._folder)
            self.model_source = decoder_source(place)
        super().configure_model()
        if not self.train_decoder:
            self.model.requires_grad_(False)
        moves = self.train_decoder or self.init == "random"
        source = None if moves else self.model_source
        held = ContextCompressor(self.model, self.options, source=source, seed=self.seed)
        if stored is not None:
            held.load_weights(place)
        # In a list, so that its weights are registered once, as `model` and `weights`.
        self._held, self.weights = [held], held.weights

    @property
    def compressor(self) -> ContextCompressor:
        """The compressor that is trained; built on first access."""
        self.configure_model()
        return self._held[0]

    def decide_layout(self) -> None:
        """Checks once that the model runs packed, when it is on its device."""
        super().decide_layout()
        self.compressor.check_runs_packed()

    # Rows.

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, and puts slots into their contexts."""
        return [self._with_slots(example) for example in super().validate_batch(batch)]

    def _with_slots(self, example: Example) -> Example:
        if "context" not in example.fields:
            raise ValueError(f"row {example.row_id} has no context to compress: give it the column context")
        context, positions = example.root.tokens, num_positions(self.model)
        children = list(example.root.children)
        query = self._query(example) if self.options.reads_query else ()
        if self.autoencoding_coef > 0:
            needed = 2 * len(context) + self.options.num_segments(len(context)) * len(query)
            if positions is not None and needed > positions:
                raise ValueError(
                    f"row {example.row_id} has a context of {len(context)} tokens, and to reconstruct it the model "
                    f"needs {needed} positions, not {positions}: use shorter contexts, or autoencoding_coef=0"
                )
            children.append(self._reconstruction(context))
        fields = {**example.fields, FULL: example.root}
        return Example(example.row_id, self.options.tree(context, children, query), fields)

    def _query(self, example: Example) -> np.ndarray:
        """Returns the prompt that follows a context; each segment reads it, so that it takes further positions."""
        prompts = example.root.children
        if len(prompts) != 1:
            raise ValueError(
                f"row {example.row_id} has {len(prompts)} prompts after its context, and reads_query reads one: make a "
                "row of each"
            )
        [query], positions = [prompt.tokens for prompt in prompts], num_positions(self.model)
        length = max(sum(len(part.tokens) for part in path) for path in example.root.paths())
        length += self.options.num_segments(len(example.root.tokens)) * len(query)
        if positions is not None and length > positions:
            raise ValueError(
                f"row {example.row_id} needs {length} positions with its prompt in every segment, and the model has "
                f"{positions}: use a larger segment_length, or reads_query=False"
            )
        return query

    def _reconstruction(self, context: np.ndarray) -> Segment:
        """A slot of its own asks for the context, whose tokens follow."""
        slots = np.full(len(context) + 1, -1)
        slots[0] = self.options.num_embeddings
        return Segment(np.insert(context, 0, 0), np.append(0.0, np.ones(len(context))), slots=slots)

    def example_parts(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """Makes the trees of whole contexts, where the loss compares with them."""
        if self.kl_coef == 0:
            return {}
        return {FULL: [Example(example.row_id, example.fields[FULL]) for example in examples]}

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts the weighted tokens of answers, and those of contexts that are reconstructed."""
        found = {"tokens": 0.0, "context_tokens": 0.0, "slots": 0.0}
        for example in examples:
            full: Segment = example.fields[FULL]
            weights = Example(example.row_id, full).weights_per_sequence()
            found["tokens"] += sum(float(part.sum()) for part in weights)
            found["context_tokens"] += len(full.tokens)
            found["slots"] += self.options.size(len(full.tokens))
        return found

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes per example the sums of each loss over its tokens, and of correctly predicted ones."""
        target = self._full_states(batch) if self.kl_coef > 0 else None
        hidden = self.compressor.hidden_states(batch)
        stats = scored_stats(self.model, batch, hidden)
        losses = nll(stats.logprobs)
        answers = ~self._reconstructs(batch)
        weights = batch.weights.to(losses.dtype)
        rows = {
            "nll": batch.sum_per_example(losses * weights * answers),
            "correct": batch.sum_per_example(stats.correct * weights * answers),
        }
        if self.autoencoding_coef > 0:
            rows["autoencoding"] = batch.sum_per_example(losses * ~answers)
            rows["reconstructed"] = batch.sum_per_example(stats.correct * ~answers)
        if target is not None:
            places = answers.nonzero().squeeze(1)
            states = hidden.read(*(index[places] for index in _read(batch)))
            kl = losses.new_zeros(len(losses)).index_add(0, places, self._divergence(states, *target))
            rows["kl"] = batch.sum_per_example(kl * weights)
        return rows

    def _reconstructs(self, batch: SequenceBatch) -> Tensor:
        """Tells of each scored token whether it belongs to a reconstruction: the last sequence of its example."""
        if self.autoencoding_coef == 0:
            return torch.zeros_like(batch.target_ids, dtype=torch.bool)
        example = batch.example_index
        last = torch.ones_like(example, dtype=torch.bool)
        last[:-1] = example[1:] != example[:-1]
        return last[batch.sequence_index]

    @torch.no_grad()
    def _full_states(self, batch: SequenceBatch) -> tuple[Tensor, Any]:
        """Computes hidden states given whole contexts, of the answers' tokens in their order, and their head."""
        part = self.micro_batching.part(batch, FULL)
        assert part is not None
        policies = self.references
        model = policies[0].model if policies and isinstance(policies[0], FrozenReference) else self.model
        with self.compressor.decoding(), evaluating(model):
            hidden = hidden_states(model, part, "packed")
        return hidden.read(*_read(part)), output_head(model)

    def _divergence(self, states: Tensor, full_states: Tensor, full_head: Any) -> Tensor:
        """Computes ``full_context_kl`` of rows of states ``(N, D)``; their logits never exist all at once."""
        head = output_head(self.model)

        def divergence(own: Tensor, full: Tensor) -> Tensor:
            wide = torch.promote_types(own.dtype, torch.float32)
            return full_context_kl(head.logits(own).to(wide), full_logits_NV=full_head.logits(full).to(wide))

        size = max(1, _CHUNK // head.weight.shape[0])
        parts = [
            checkpoint(divergence, own, full, use_reentrant=False)
            for own, full in zip(states.split(size), full_states.split(size), strict=True)
        ]
        return torch.cat(parts)

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Divides each loss by the global batch's tokens, and adds them."""
        total = self.continuation_coef * rows["nll"].sum() / _count(normalizers, "tokens")
        if "kl" in rows:
            total = total + self.kl_coef * rows["kl"].sum() / _count(normalizers, "tokens")
        if "autoencoding" in rows:
            share = rows["autoencoding"].sum() / _count(normalizers, "context_tokens")
            total = total + self.autoencoding_coef * share
        return total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes accuracy and likelihood of the answers, the ratio that was reached, and each further loss."""
        tokens, context_tokens = _count(normalizers, "tokens"), _count(normalizers, "context_tokens")
        values = {
            "mean_token_accuracy": rows["correct"].sum() / tokens,
            "nll": rows["nll"].sum() / tokens,
            "compression_ratio": torch.tensor(normalizers["context_tokens"] / _count(normalizers, "slots")),
        }
        if "kl" in rows:
            values["full_context_kl"] = rows["kl"].sum() / tokens
        if "autoencoding" in rows:
            values["autoencoding_nll"] = rows["autoencoding"].sum() / context_tokens
            values["autoencoding_accuracy"] = rows["reconstructed"].sum() / context_tokens
        return values

    # Export.

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the compressor, with its model if that was trained, see ``ContextCompressor.save_pretrained``.

        Args:
            folder: destination; written atomically, replacing an earlier compressor.
            merge_adapter: without effect, as there is no adapter.
        """
        self.compressor.save_pretrained(folder, tokenizer=self._export_tokenizer())

    def check_export(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Checks before training that ``save_pretrained`` will be allowed to replace a folder.

        Args:
            folder: destination.
            merge_adapter: as for ``save_pretrained``.

        Raises:
            ValueError: the folder holds something other than a compressor of the same kind.
        """
        kind = compressor_kind(with_model=self.compressor.source is None)
        check_replaceable(Path(folder).expanduser().resolve(), kind)


def _read(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where the predictions of scored tokens are read."""
    return batch.source_index, batch.source_path, batch.source_depth


def _count(normalizers: dict[str, float], name: str) -> float:
    return max(normalizers[name], 1e-12)  # a batch without a scored token has loss 0
