"""ContextCompressor: long contexts as a few learned entries of a decoder's cache.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..sequences import ATTENTION_NAMES, AttentionKernel, SequenceBatch, register_attention
from ..utils.files import check_replaceable, first_rank_says, on_first_rank
from ..utils.folders import replace_folder
from ..utils.keywords import refuse_unknown
from ..utils.transfer import to_device
from .adapters import locate_base
from .backbone import HiddenStates, base_model, evaluating, hidden_states, num_positions, token_stats
from .compressed_context import CompressedContext, LayerStates, check_entries, run_after
from .compressor_options import CompressorOptions
from .compressor_weights import CompressorWeights, Encoded, Encoding
from .decoder_identity import decoder_identity, difference
from .fused_head import TokenStats
from .layout import resolve_layout
from .loading import load_causal_lm, load_tokenizer, locate
from .own_attention import attention_of, using_attention
from .reward_head import stored_file, whole
from .safetensors_io import read_json, read_weights
from .saving import save_pretrained

OPTIONS_FILE, WEIGHTS_FILE = "compressor.json", "compressor.safetensors"


class ContextCompressor(nn.Module):
    """Compresses contexts to learned entries of a decoder's cache: gist tokens and recurrent summaries.

    A context is divided into segments, each with a slot for every ``ratio`` tokens. A slot has an embedding of its own,
    and its keys and values in all layers are what later tokens see of the segment: nothing else of a context is kept
    (gist tokens: Mu et al., 2023, arXiv:2304.08467). Summaries of earlier segments are seen by later ones (recurrent
    summaries: Chevalier et al., 2023, arXiv:2305.14788). ``compress`` runs segment by segment, so that memory does not
    grow with the context's tokens; training runs the same computation as one packed forest, in which segments do not
    show their tokens. A slot has the position of the token before it: what follows a context has the position that it
    has after the whole context (as Zhao et al., 2024, arXiv:2409.14364, propose), so that a context may have as many
    tokens as the decoder has positions.

    Args:
        model: a causal language model whose layers run packed. Adapters on it are off in ``compress``.
        options: the options.
        tokenizer: of the model.
        source: folder or hub id of the model, which the compressor's folder refers to if the model was not trained.
        seed: of the initial weights.

    Raises:
        ValueError: the model cannot be given compressed contexts.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> compressor = ContextCompressor(LlamaForCausalLM(config), CompressorOptions(ratio=4, segment_length=8))
        >>> [compressed] = compressor.compress([list(range(3, 15))])
        >>> compressed.size, compressed.position, compressed.num_tokens
        (3, 12, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompressorOptions | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_entries(model)
        self.options = CompressorOptions() if options is None else options
        self.model: Any = model
        pooled, count = self.options.pooling == "attention", self.options.num_embeddings
        self.weights = CompressorWeights(model, count, self.options.encoder_rank, seed, pooled=pooled)
        self.tokenizer = tokenizer
        self.source = source
        self._identity = decoder_identity(model)
        self._encoding = Encoding(model, self.weights)
        self._runs_packed = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        model: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        attention: AttentionKernel = "auto",
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Loads a stored compressor with its model, or makes a new one for a model; its weights are frozen.

        Args:
            folder: folder or hub id of a compressor, or of a model without one.
            model: the decoder, if it is loaded already.
            dtype: of the weights.
            device: of the weights; by default the CPU, or torch's default device.
            attention: kernel of the packed layout; does not affect results.
            seed: of a new compressor's weights.
            options: fields of ``CompressorOptions``, for a new compressor; a stored one has its own.

        Raises:
            TypeError: an option does not exist; the message suggests another.
            ValueError: nothing can be loaded, the compressor was trained with another model, or with other options.
        """
        known = {field.name for field in fields(CompressorOptions)}
        refuse_unknown(CompressorOptions, [name for name in options if name not in known])
        place = locate(folder, what="compressor")
        stored, source = _stored(place), decoder_source(place)
        of_stored = stored["options"] if stored else {}
        chosen = CompressorOptions(**{**of_stored, **options})
        if stored:
            chosen.check_stored(of_stored, folder)
        if model is None:
            kernel = register_attention(attention)
            model = load_causal_lm(source, dtype=dtype, attn_implementation=kernel, trainable=False)
        if stored and (reason := difference(stored["decoder"], decoder_identity(model))):
            raise ValueError(
                f"the compressor in {str(folder)!r} is of another model ({reason}): use the model that it was trained "
                "with, or train one for this model"
            )
        has_tokenizer = stored_file(place, "tokenizer_config.json") is not None
        tokenizer = load_tokenizer(place if has_tokenizer else source)
        compressor = cls(model, chosen, tokenizer=tokenizer, source=str(source), seed=seed)
        if stored:
            compressor.load_weights(place)
        compressor.weights.to(next(model.parameters()).device)
        compressor.weights.requires_grad_(False)
        compressor.train(model.training)
        return compressor if device is None else compressor.to(device)

    @property
    def identity(self) -> dict[str, Any]:
        """Describes the model that it was made with, see ``decoder_identity``."""
        return self._identity

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights.slots.device

    def check_runs_packed(self) -> None:
        """Checks once, when the model is on its device, that it computes packed forests as it computes sequences.

        Raises:
            ValueError: it does not, so that it cannot have a compressor.
        """
        if not self._runs_packed:
            with self._registered():
                resolve_layout(self.model, "packed")
            self._runs_packed = True

    def _registered(self) -> AbstractContextManager[None]:
        """Runs a model that was loaded with another attention with the registered one, within the context."""
        base = base_model(self.model)
        loaded_so = attention_of(base) in ATTENTION_NAMES.values()
        return nullcontext() if loaded_so else using_attention(base, register_attention())

    @property
    def reads_query(self) -> bool:
        """Whether the prompt that follows a context is read, so that the context is compressed again for each."""
        return self.options.reads_query

    # Training: packed forests.

    def decoding(self) -> AbstractContextManager[None]:
        """Runs the model as it is, within the context and in backward passes through it: nothing is an encoder's."""
        return self._encoding.reading(None)

    def hidden_states(self, batch: SequenceBatch) -> HiddenStates:
        """Runs the decoder over a packed batch whose contexts have slots, as ``options.tree`` makes them."""
        self.check_runs_packed()
        with self._encoding.reading(self._encoded(batch)), self._registered():
            return hidden_states(self.model, batch, "packed", embeds_slots=True)

    def token_stats(self, batch: SequenceBatch, **options: Any) -> TokenStats:
        """Computes log-probabilities of a batch's scored tokens, see ``models.token_stats``."""
        self.check_runs_packed()
        with self._encoding.reading(self._encoded(batch)), self._registered():
            return token_stats(self.model, batch, "packed", embeds_slots=True, **options)

    def _encoded(self, batch: SequenceBatch) -> Encoded | None:
        if batch.slots is None or batch.encoded is None:
            return None
        segments, groups = batch.geometry.segments, []
        if self.options.pooling != "none":
            for start, length, _ in (segments[number] for number in batch.geometry.shown):
                own = batch.host["slots"][start : start + length]
                groups.append(np.stack(self.options.stands_for(own)) + start)
        return Encoded(batch.encoded, batch.slots, self._groups(groups))

    def _groups(self, groups: Sequence[np.ndarray]) -> tuple[Tensor, Tensor] | None:
        """Joins the groups of segments, which are those of ``stands_for``."""
        if not groups:
            return None
        tokens, places = to_device({"groups": np.concatenate(groups, axis=1)}, self.device)["groups"]
        return tokens, places

    # Use: segment by segment.

    @torch.no_grad()
    def compress(
        self, contexts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] | None = None
    ) -> list[CompressedContext]:
        """Compresses contexts segment by segment.

        Args:
            contexts: tokens of each, at least one; of one that is shorter than a segment, ``ceil(n / ratio)`` entries
                are kept.
            queries: tokens that will follow each, at least one; read with ``reads_query``.

        Returns:
            One for each context, in order.

        Raises:
            ValueError: a context has no tokens, tokens that the model lacks, or more than the model has positions; or
                queries are missing.
        """
        self.check_runs_packed()
        read = queries if self.reads_query else [()] * len(contexts)
        if read is None or (self.reads_query and not all(map(len, read))):
            raise ValueError("the compressor reads the prompt that follows each context: give queries, none empty")
        pairs = list(zip(contexts, read, strict=True))
        for number, (context, query) in enumerate(pairs):
            self._check(number, context, query)
        with self._bare(), evaluating(self), self._registered():
            return [self._compressed(*pair) for pair in pairs]

    def _check(self, number: int, context: Sequence[int], query: Sequence[int]) -> None:
        if not len(context):
            raise ValueError(f"context {number} has no tokens: leave it out, or give it one")
        embedding: Any = base_model(self.model).get_input_embeddings()
        vocabulary = int(embedding.weight.shape[0])
        wrong = next((token for token in (*context, *query) if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"context {number} has the token {wrong}: the model's tokens are 0 to {vocabulary - 1}")
        positions = num_positions(self.model)
        taken = len(context) + self.options.num_segments(len(context)) * len(query)
        if positions is not None and taken >= positions:
            raise ValueError(
                f"context {number} of {len(context)} tokens leaves no room in the model's {positions} positions: "
                "shorten it"
            )

    def _compressed(self, context: Sequence[int], query: Sequence[int]) -> CompressedContext:
        seen: LayerStates = []
        depth = 0
        for tokens, numbers, hides in self.options.segments(list(context), list(query)):
            arrays = {"ids": tokens, "slots": numbers, "chosen": np.flatnonzero(numbers >= 0)}
            ids, slots, chosen = to_device(arrays, self.device).values()
            positions = (depth - 1 + (slots < 0).cumsum(0)).clamp(min=0)
            depth += int((numbers < 0).sum())
            groups = [] if self.options.pooling == "none" else [np.stack(self.options.stands_for(numbers))]
            with self._encoding.reading(Encoded(True, slots, self._groups(groups))):
                _, new = run_after(self.model, seen, ids, positions)
            # Of the segment, its summaries stay.
            summaries = [(keys[:, chosen], values[:, chosen]) for keys, values in new]
            if seen and self.options.recurrence == "accumulate":
                kept = seen[0][0].shape[1] - hides
                pairs = zip(((a[:, :kept], b[:, :kept]) for a, b in seen), summaries, strict=True)
                summaries = [(torch.cat((a, c), 1), torch.cat((b, d), 1)) for (a, b), (c, d) in pairs]
            seen = summaries
        return CompressedContext(seen, depth, len(context))

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Runs the model without a policy's adapter: summaries are those of the model that the compressor knows."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    # Folders.

    def save_pretrained(self, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Writes the compressor, with its model in the same folder if that was trained or has no source.

        Options are in ``compressor.json`` and weights in ``compressor.safetensors``. A model that is as it was loaded
        is not written: the folder names its source, which is searched as the base of an adapter is.

        Args:
            folder: destination; written atomically, replacing an earlier compressor of the same kind.
            tokenizer: written with it; by default its own.

        Returns:
            The folder's absolute path.

        Raises:
            ValueError: there is no tokenizer, or the folder holds something else.
        """
        chosen = tokenizer or self.tokenizer
        if chosen is None:
            raise ValueError("the compressor has no tokenizer: give tokenizer=load_tokenizer(folder)")
        target = Path(folder).expanduser().resolve()
        now = decoder_identity(self.model)
        # Ranks other than the first may not have read the weights of a sharded model.
        refers = first_rank_says(self.source is not None and now == self._identity)
        write = self._writer(now, self.source if refers else None)
        if not refers:
            return save_pretrained(self.model, chosen, target, extra_files=write)
        kind = compressor_kind(with_model=False)
        on_first_rank(lambda: check_replaceable(target, kind))
        writers: list[Callable[[Path], object]] = [write, chosen.save_pretrained]
        on_first_rank(lambda: replace_folder(target, kind, lambda place: [each(place) for each in writers]))
        return target

    def _writer(self, identity: dict[str, Any], model: str | None) -> Callable[[Path], object]:
        """Gathers the weights on every rank; returns a function that writes them to a folder."""
        state = {name: whole(tensor).contiguous() for name, tensor in self.weights.state_dict().items()}
        stored = {"options": asdict(self.options), "decoder": identity, "model": model}

        def write(place: Path) -> None:
            (place / OPTIONS_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
            save_file(state, place / WEIGHTS_FILE, metadata={"format": "pt"})

        return write

    def load_weights(self, folder: str | Path) -> None:
        """Loads the weights in a compressor's folder.

        Raises:
            ValueError: they are missing, damaged, or of another shape.
        """
        path = stored_file(folder, WEIGHTS_FILE)
        if path is None:
            raise ValueError(f"{str(folder)!r} holds no {WEIGHTS_FILE}: save the compressor again")
        try:
            self.weights.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} does not fit its options: save the compressor again") from error


def _stored(folder: str | Path) -> dict[str, Any]:
    """Reads what is stored with a compressor; empty where a folder holds none."""
    path = stored_file(folder, OPTIONS_FILE)
    return {} if path is None else read_json(path)


def stored_options(folder: str | Path) -> dict[str, Any] | None:
    """Reads the options of a stored compressor; ``None`` where a folder or hub id holds none."""
    found: dict[str, Any] | None = _stored(folder).get("options")
    return found


def decoder_source(folder: str | Path) -> str:
    """Returns the folder or hub id of the model of a compressor, or of a model without one."""
    base = _stored(folder).get("model")
    return str(folder) if base is None else locate_base(base, folder)


def compressor_kind(*, with_model: bool) -> str:
    """Names the kind of folder that ``ContextCompressor.save_pretrained`` writes; one kind never replaces another."""
    return "model with a head" if with_model else "compressor"
