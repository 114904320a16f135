"""The front of a policy: a frozen compressor, whose summaries of contexts are all that the policy sees of them.

The compressor has a frozen model of its own, the one that the policy began as, so that summaries stay what they are
while the policy learns. A row's tree follows its context (``Segment.after``). In a packed batch a context has a place
for each entry, and every attention layer is given the entries' keys and values there (``PriorStates``), as the engine
puts them into its cache: gradients reach the policy through what attends to them, and nothing before. The reference has
the same front, so that it agrees with the policy before the first step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.text_tokens import opening_tokens, prompt_tokens
from ..models import CompressedContext, CompressorOptions, ContextCompressor
from ..models.context_compressor import stored_options
from ..models.decoder_identity import difference
from ..models.loading import locate
from ..models.meta_init import skeletons
from ..models.policy_front import first_decoder, front_note
from ..sequences import Example, ExampleBatch, PriorContext, PriorStates, Segment, SequenceBatch
from ..utils.files import on_first_rank
from ..utils.transfer import to_device
from .trainer_checks import trainer_dtype

_MOST_HELD = 1 << 28  # bytes of summaries of the latest contexts that are kept for the next batches


class CompressorFront:
    """Compresses the contexts of a module's rows; the module holds it as ``front``.

    Args:
        module: a ``PostTrainingModule``.
        folder: folder or hub id of a trained compressor.

    Raises:
        ValueError: there is no compressor, or an option does not go with one.
    """

    def __init__(self, module: Any, folder: str) -> None:
        if module._requested_layout == "padded":
            raise ValueError("layout is 'padded', and a policy with a compressor runs packed: use 'auto'")
        if module.quantization is not None:
            raise ValueError(
                f"quantization is {module.quantization!r}, and a compressor knows whole weights: leave one of them out"
            )
        if module.compiles_layers:
            raise ValueError("compile is true, and layers after compressed contexts differ: set compile to false")
        # A name alone is that of a compressor that learns nothing; it is not asked for on the hub.
        is_place = Path(folder).expanduser().is_dir() or "/" in str(folder)
        options = stored_options(locate(folder, what="compressor")) if is_place else None
        if options is None:
            raise ValueError(
                f"compressor is {str(folder)!r}, where no trained compressor is: give the folder that "
                "ContextCompressionModule has written; others, which learn nothing, are for engines alone"
            )
        self.module = module
        self.folder = folder
        self.options = CompressorOptions(**options)
        self._held: OrderedDict[bytes, CompressedContext] = OrderedDict()
        self._bytes = 0
        self._compressor: ContextCompressor | None = None

    def build(self) -> None:
        """Loads the compressor with its model, and checks that the policy began as that model.

        Raises:
            ValueError: it began as another.
        """
        module = self.module
        with skeletons(False):
            found = ContextCompressor.from_pretrained(self.folder, dtype=trainer_dtype(module._trainer))
        found.requires_grad_(False)
        self._compressor = found.eval()

        def check() -> None:
            if reason := difference(found.identity, first_decoder(module.model_source, module.model)):
                raise ValueError(
                    f"the compressor in {str(self.folder)!r} is of another model ({reason}) than "
                    f"{module.model_source!r}: train one for this model, or begin with the one that it was trained for"
                )

        on_first_rank(check)

    @property
    def compressor(self) -> ContextCompressor:
        """The compressor, on the module's device."""
        assert self._compressor is not None
        with torch.inference_mode(False):
            return self._compressor.to(self.module.device)

    # Rows.

    def follow(self, batch: ExampleBatch, on_consumed: Callable[[], None] | None = None) -> ExampleBatch:
        """Returns the rows of a batch as trees that follow their contexts.

        Args:
            batch: rows; they stay as they are where they follow their contexts already.
            on_consumed: called when the returned batch has been used.

        Raises:
            ValueError: a row has no context.
        """
        examples = [self._behind(row, batch.contract) for row in batch.examples]
        return ExampleBatch(examples, on_consumed, batch.contract)

    def _behind(self, example: Example, contract: str | None) -> Example:
        if example.root.after is not None:
            return example
        if contract == "ContextDataModule":
            tokens, [root] = example.root.tokens, example.root.children
        else:
            tokens, root = self._tokens(example), example.root
        weights = root.weights
        if self.options.reads_query and weights is not None and weights.any():
            raise ValueError(
                f"row {example.row_id} learns tokens that the compressor reads (reads_query): give it a prompt and a "
                "completion"
            )
        count = self._num_opening(root)
        if weights is not None:
            # Of a context there is no state to predict the first token from.
            weights = np.concatenate([[0.0], weights[count + 1 :]])
        kept = root.tokens[count:]
        query = kept if self.options.reads_query else kept[:0]
        position = len(tokens) + self.options.num_segments(len(tokens)) * len(query)
        after = PriorContext(tokens, self.options.size(len(tokens)), position, query)
        return Example(example.row_id, replace(root, tokens=kept, weights=weights, after=after), example.fields)

    def _tokens(self, example: Example) -> np.ndarray:
        """Encodes a row's context as a text that begins a sequence."""
        context = example.fields.get("context")
        if context is None or not len(context):
            raise ValueError(
                f"row {example.row_id} has no context, and the policy reads compressed ones: give it a column context"
            )
        return np.asarray(prompt_tokens(self.module.tokenizer, context) if isinstance(context, str) else context)

    def _num_opening(self, root: Segment) -> int:
        """Counts the tokens that open every text, which a text after a context does not begin with."""
        opening = self._opening
        count = len(opening)
        return count if count < len(root.tokens) and root.tokens[:count].tolist() == opening else 0

    @cached_property
    def _opening(self) -> list[int]:
        return opening_tokens(self.module.tokenizer)

    # Summaries.

    def forget(self) -> None:
        """Forgets the summaries that are kept, before a run on another device or in another precision."""
        self._held, self._bytes = OrderedDict(), 0

    def contexts(self, examples: Sequence[Example]) -> list[CompressedContext]:
        """Returns the compressed contexts of rows that follow theirs, for an engine."""
        return self.compressed([example.root.after for example in examples if example.root.after is not None])

    def compressed(self, contexts: Sequence[PriorContext]) -> list[CompressedContext]:
        """Compresses contexts, equal ones once; those of the latest calls are kept, up to 256 MiB."""
        waiting = {context.key: context for context in contexts if context.key not in self._held}
        if waiting:
            new = list(waiting.values())
            tokens, queries = ([each.tolist() for each in arrays] for arrays in zip(*map(_read, new), strict=True))
            # Tensors made in validation's inference mode could not be used outside of it.
            with torch.inference_mode(False):
                made = self.compressor.compress(tokens, queries)
            self._held |= dict(zip(waiting, made, strict=True))
            self._bytes += sum(states.nbytes for states in made)
        found = [self._held[context.key] for context in contexts]
        for context in contexts:
            self._held.move_to_end(context.key)
        while self._bytes > _MOST_HELD:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found

    def attach(self, batch: SequenceBatch) -> None:
        """Gives a packed batch the states of the contexts that its trees follow, unless it has them."""
        if not batch.contexts or batch.geometry.prior is not None:
            return
        found = self.compressed([context for _, context in batch.contexts])
        places = [np.arange(start, start + context.size) for start, context in batch.contexts]
        index = to_device({"index": np.concatenate(places)}, batch.input_ids.device)["index"]
        layers = [
            (torch.cat([keys for keys, _ in parts], dim=1), torch.cat([values for _, values in parts], dim=1))
            for parts in zip(*(context.states for context in found), strict=True)
        ]
        batch.geometry.prior = PriorStates(index, layers)

    # Folders and checkpoints.

    def note(self) -> Callable[[Path], object]:
        """Returns a function that records in the policy's folder which model its compressor belongs to."""
        return front_note(self.compressor)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the compressor and its model."""
        digest = blake2b(digest_size=16)
        for name, tensor in sorted(self.compressor.weights.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return {**self.compressor.identity, "compressor": digest.hexdigest()}


def _read(context: PriorContext) -> tuple[np.ndarray, np.ndarray]:
    return context.tokens, context.query
