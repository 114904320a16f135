"""Samples completions from a causal language model in this process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..data.chat_template import ChatTemplate
from ..data.text_tokens import prompt_tokens
from ..models import (
    CompressedContext,
    Compressor,
    base_model,
    evaluating,
    load_adapted_lm,
    load_adapted_tokenizer,
    load_causal_lm,
    num_positions,
)
from ..models.own_attention import EAGER, attention_of, avoid_cudnn_attention, is_switchable, using_attention
from ..models.policy_front import compressor_of
from ..sequences import register_attention
from ..utils.validation import check_device
from .completion import Completion, Request
from .contexts import Context, ContextPrompts
from .continuous_batching import ContinuousBatch, Counts
from .cpu_linear import PACKING_STEPS, packed_linears
from .decoder import Decoder
from .hf_generate import generate_plain, loops_exactly
from .next_tokens import next_token_logprobs
from .paged_cache import PagePool
from .prefix_tree import PAGE
from .projection import whole_weights
from .requests import completions_by_prompt, make_requests
from .sampling import SamplingParams
from .speculation import Speculation, SpeculationSpec
from .stores import CACHES, CacheKind, make_store
from .weight_version import weight_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = ("float32", "bfloat16", "float16", "float64")

Prompts = Sequence[str] | Sequence[Sequence[int]]


class Engine(Protocol):
    """Interface of the engines, which sample completions in this process or elsewhere."""

    def generate(
        self,
        prompts: Prompts,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions: one list per prompt, in order; see ``LocalEngine.generate``."""
        ...


class LocalEngine:
    """Samples from a model in this process, with its current weights.

    Every distinct prompt is computed once, whatever the number of its samples, and its keys and values are copied to
    them; finished rows leave the batch and waiting prompts replace them, within ``max_batch_tokens``. A sample is a
    function of the model, its prompt, the settings and its seed: the uniform of each step is hashed from (seed, step),
    so neither neighbours nor budget nor order change it, up to rounding in the model's own products.

    Rows of different length share a batch padded on the left. A probe on a few tokens checks once whether the model
    computes the same scores that way as it does alone; where it does not (recurrent layers, custom caches), prompts of
    one length at a time go through transformers' own loop, with the same samples and one warning. Weights sharded by
    FSDP2 are gathered once per call, so ranks may generate for different times; every rank must call, even without
    prompts.

    Caches of keys and values give the same samples up to rounding (``int8`` up to its own):

    - ``dynamic`` grows with the rows, and runs with every model;
    - ``static`` has fixed shapes for many steps, samples and ends rows on the device, and lets the host look at every
      eighth step only, for GPUs, where launching and waiting costs more than computing;
    - ``paged`` stores what prompts and completions begin with once, in pages of 16 tokens, and finds it again in later
      calls, until the weights change;
    - ``int8`` takes 0.27 to 0.31 of the memory of single precision.

    The last three need layers of plain attention, which a probe checks; other models run with ``dynamic``, with one
    warning.

    Args:
        model: a causal language model of transformers, bare or with adapters around it. Called unchanged: in its
            precision, on its device, and with ``dynamic`` with its attention function. It runs in evaluation mode
            without gradients, and every submodule's mode is restored.
        tokenizer: encodes string prompts like those of rows, decodes tokens, and defines by its chat template which
            tokens end an answer besides the end-of-sequence tokens; without one, prompts are token ids and texts are
            empty.
        max_batch_tokens: tokens of cache held at once, and tokens of one prefill; at least 1. A single row always fits.
        cache: ``dynamic``, ``static``, ``paged`` or ``int8``.
        speculation: several tokens in one forward, where that is faster than one: ``"ngram"`` drafts by lookup in the
            prompt and the completion, ``{"draft": folder or model}`` by a smaller model with the same vocabulary, whose
            cache comes on top of ``max_batch_tokens``, and ``{"early_exit": n}`` by the model's own first n layers.
            Samples, their log-probs included, are those without it, up to rounding (see ``speculation``). Not with
            ``static``, and only with layers of plain attention; other models run without, with one warning.
        compressor: compresses the ``contexts`` of ``generate``; not with ``paged`` or ``speculation``.

    Raises:
        ValueError: an option is not allowed, or a draft model has another vocabulary.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, eos_token_id=2)
        >>> engine = LocalEngine(LlamaForCausalLM(config), None)
        >>> params = SamplingParams(max_new_tokens=3, seed=0)
        >>> samples = engine.generate([[5, 6, 7]], num_samples=4, sampling=params)
        >>> len(samples), len(samples[0]), samples[0][0].finish_reason in ("stop", "length")
        (1, 4, True)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_batch_tokens: int = 65536,
        cache: CacheKind = "dynamic",
        speculation: SpeculationSpec | None = None,
        compressor: Compressor | None = None,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens} is not allowed: it must be at least 1")
        if cache not in CACHES:
            raise ValueError(f"cache={cache!r} is not allowed: use one of {', '.join(CACHES)}")
        if speculation is not None and cache == "static":
            raise ValueError(
                f"speculation={speculation!r} is not allowed with cache='static', whose steps draw one token: use "
                "'dynamic', 'paged' or 'int8'"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.compressor = compressor
        self.max_batch_tokens = max_batch_tokens
        self._template_ends: list[int] | None = None
        self._warned: set[str] = set()
        self._cache_kind = cache
        self._speculation = None if speculation is None else Speculation(speculation, model, tokenizer)
        self._counts = Counts()
        self._attention = ""
        self._pool: PagePool | None = None
        self._pool_version = b""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        adapter: str | Path | None = None,
        cache: CacheKind = "dynamic",
        dtype: str = "auto",
        device: str | torch.device | None = None,
        max_batch_tokens: int = 65536,
        speculation: SpeculationSpec | None = None,
        compressor: str | Path | None = None,
    ) -> LocalEngine:
        """Loads a model and its tokenizer, to sample from.

        Args:
            folder: a folder or hub id of a model, or of an adapter that names its model.
            adapter: a folder or hub id of an adapter to put on the model; its tokenizer is taken if it has one.
            cache: as for the class.
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``; ``auto`` is ``bfloat16`` on a GPU, else
                ``float32``.
            device: where it runs; by default the GPU if there is one.
            max_batch_tokens: as for the class.
            speculation: as for the class.
            compressor: a folder or hub id of a ``ContextCompressor`` that was trained for the model, or that the model
                was trained with; then the model before that training is loaded as well, for the summaries.

        Raises:
            ValueError: nothing can be loaded, or an option is not allowed.

        Example:
            >>> engine = LocalEngine.from_pretrained("runs/sft/model", cache="paged")  # doctest: +SKIP
            >>> engine.generate(["3+4=?"])[0][0].text  # doctest: +SKIP
            '7'
        """
        place = check_device(device)
        name = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
        if name not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not allowed: use auto, {', '.join(_DTYPES)}")
        options: Any = {"dtype": getattr(torch, name), "attn_implementation": register_attention()}
        model: nn.Module = (
            load_causal_lm(folder, trainable=False, **options)
            if adapter is None
            else load_adapted_lm(folder, adapter, **options)
        )
        model = model.to(place)
        made = None
        if compressor is not None:
            made = compressor_of(compressor, model, folder if adapter is None else adapter)
        return cls(
            model,
            load_adapted_tokenizer(folder, adapter),
            max_batch_tokens=max_batch_tokens,
            cache=cache,
            speculation=speculation,
            compressor=made,
        )

    def statistics(self) -> dict[str, Any]:
        """Tells what was done since the engine was made.

        - The fields of ``Counts``;
        - ``cache`` and ``attention``: the cache, and the attention function that the last call ran with;
        - with ``paged`` also ``pages`` held, at most (``pages_peak``) and to be found again (``pages_cached``), and
          ``evictions``: pages given up for others, and ``fragmentation``: the share of rows' places without a token;
        - with speculation, as ``speculation``: its ``kind``, the fields of ``SpeculationCounts`` and the
          ``acceptance_rate``.
        """
        found: dict[str, Any] = {"cache": self._cache_kind, "attention": self._attention, **self._counts.as_dict()}
        if self._pool is not None:
            found |= self._pool.statistics()
        if self._speculation is not None:
            found["speculation"] = self._speculation.statistics()
        return found

    def clear_cache(self) -> None:
        """Forgets keys and values of earlier calls; they are also forgotten when the weights change."""
        self._pool = None

    def generate(
        self,
        prompts: Prompts,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        watch: Callable[[Request], object] | None = None,
        contexts: Sequence[Context] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions of prompts.

        Args:
            prompts: strings, or token ids; an empty string becomes the beginning- or end-of-sequence token.
            num_samples: samples per prompt, at least 1.
            sampling: the settings; by default ``SamplingParams()``.
            seeds: one per prompt and sample, instead of seeds derived from (seed, prompt number, sample number).
            limits: maximum number of new tokens of each prompt, where it is below ``sampling.max_new_tokens``.
            watch: called with a sample whenever it has another token, to show or keep it before all are done; what it
                raises ends the call. Equal greedy samples of a prompt are one, of number 0.
            contexts: that the prompts follow, one each: text or token ids, which the engine's compressor compresses, a
                ``CompressedContext``, or ``None``. A prompt that is a string follows as text that continues one.

        Returns:
            One list per prompt, in order, with ``num_samples`` completions.

        Raises:
            ValueError: a prompt is empty or fills the model's positions, or ``seeds`` does not hold one per sample, or
                ``limits`` one number of at least 1 per prompt, or ``contexts`` one per prompt.
        """
        params = sampling or SamplingParams()
        after = None if contexts is None else self._after_contexts(prompts, contexts)
        encoder = self if after is None else after
        requests, stop_ids = make_requests(encoder, prompts, num_samples, params, seeds, limits, watch)

        # Gathering is a collective, so a rank without prompts has to enter it as well.
        with torch.no_grad(), evaluating(self.model), whole_weights(self.model):
            if requests:
                self._run(requests, params, stop_ids, {} if after is None else after.table)
        return completions_by_prompt(requests, num_samples, params)

    def next_token_logprobs(self, prompts: Prompts) -> Tensor:
        """Computes the log-probabilities of all tokens after each prompt, under the unmodified model.

        Args:
            prompts: strings, or token ids.

        Returns:
            One row per prompt, ``(P, V)``, in fp32.

        Raises:
            ValueError: a prompt is empty, or fills the model's positions.
        """
        numbered_prompts: Any = enumerate(prompts)
        tokens = [self.encode(prompt, number) for number, prompt in numbered_prompts]
        for prompt in tokens:
            self.token_limit(prompt, 1)
        with torch.no_grad(), evaluating(self.model), whole_weights(self.model):
            return next_token_logprobs(Decoder(self.model), tokens, self.max_batch_tokens)

    def _after_contexts(self, prompts: Prompts, contexts: Sequence[Context]) -> ContextPrompts:
        """Compresses the contexts of prompts.

        Raises:
            ValueError: the cache or speculation does not go with contexts, or the model cannot be given them.
        """
        model = base_model(self.model)
        if self._cache_kind == "paged" or self._speculation is not None:
            other = "cache='paged'" if self._cache_kind == "paged" else "speculation"
            raise ValueError(
                f"contexts are given with {other}: use the caches 'dynamic', 'static' or 'int8' without it"
            )
        with torch.no_grad(), evaluating(self.model), using_attention(model, register_attention()):
            if not Decoder(self.model).agrees_in_rows():
                raise ValueError(
                    f"{type(model).__name__} cannot be given compressed contexts: use prompts without them"
                )
        return ContextPrompts(self, prompts, contexts, self.compressor)

    def _run(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        contexts: Mapping[int, CompressedContext],
    ) -> None:
        # Two properties that batched sampling rests on: causality, and keys that do not depend on the layout.
        decoder, model = Decoder(self.model, contexts), base_model(self.model)
        avoid_cudnn_attention(decoder.device)
        decoder.check_sampling()
        rests = self._speculation is not None and self._speculation.rests(len(requests))
        speculation = None if rests else self._speculation
        if self._cache_kind != "dynamic" or speculation is not None or contexts:
            with using_attention(model, register_attention()):
                if decoder.agrees_in_rows():
                    self._run_together(decoder, requests, params, stop_ids, self._cache_kind, speculation)
                    return
            self._warn_once(
                f"{type(model).__name__} does not compute the same with cache={self._cache_kind!r}: running with "
                "cache='dynamic'"
                if speculation is None
                else f"{type(model).__name__} does not compute the same several tokens at a time: running with "
                "cache='dynamic' and without speculation"
            )
        with using_attention(model, generation_attention(model, decoder.device)):
            if decoder.agrees():
                self._run_together(decoder, requests, params, stop_ids, "dynamic")
                return

        # The attention function alone may be the cause: try the model's eager one before the slow loop.
        with using_attention(model, EAGER):
            if decoder.agrees():
                self._run_together(decoder, requests, params, stop_ids, "dynamic")
                return
            self._warn_once(
                f"{type(model).__name__} does not compute rows of different length in one batch as it computes them"
                " alone: generating slowly, one prompt length at a time"
            )
            use_cache = loops_exactly(model, use_cache=True)
            if not use_cache and not loops_exactly(model, use_cache=False):
                raise ValueError(
                    f"{type(model).__name__} cannot be sampled from: transformers' own loop does not give it the "
                    "scores of its forward; use another model"
                )
            if not use_cache:
                self._warn_once(f"{type(model).__name__} does not compute the same with its cache: generating without")
            start = time.perf_counter()
            generate_plain(model, requests, params, stop_ids, self.max_batch_tokens, use_cache=use_cache)
            self._counts.add(requests, time.perf_counter() - start)

    def _run_together(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        cache: CacheKind,
        speculation: Speculation | None = None,
    ) -> None:
        """Generates all samples in one batch of rows of different length."""
        self._attention = str(attention_of(base_model(self.model)))
        pool = self._current_pool() if cache == "paged" else None
        tokens = self.max_batch_tokens
        spare = speculation.longest if speculation else 0
        store = make_store(cache, requests, tokens, pool, spare=spare, own_lengths=bool(decoder.contexts))
        begun = speculation.begin(decoder, requests, params, store.num_rows, tokens) if speculation else nullcontext()
        worth_it = max(request.limit for request in requests) >= PACKING_STEPS
        with packed_linears(self.model) if worth_it else nullcontext(), begun as speculator:
            batch = ContinuousBatch(decoder, requests, params, stop_ids, store, tokens, self._counts, speculator)
            try:
                batch.run()
            except BaseException:
                # Rows that were cut off would hold their pages for ever.
                self._pool = None
                raise

    def _current_pool(self) -> PagePool:
        """The pages of earlier calls, if the same weights computed them."""
        version = weight_version(self.model)
        if self._pool is None or version != self._pool_version:
            self._pool, self._pool_version = PagePool(max(1, self.max_batch_tokens // PAGE)), version
        return self._pool

    def encode(self, prompt: str | Sequence[int], number: int = 0) -> tuple[int, ...]:
        """Encodes a prompt as ``generate`` does, and checks that it is not empty and in the model's vocabulary.

        Args:
            prompt: a string, or token ids, which stay as they are.
            number: the prompt's number, which errors name.

        Raises:
            ValueError: the prompt has no tokens, or one that the model lacks, or is a string without a tokenizer.
        """
        tokens = self._encoded(number, prompt) if isinstance(prompt, str) else tuple(int(token) for token in prompt)
        if not tokens:
            raise ValueError(f"prompt {number} has no tokens: give it one, for instance the tokenizer's first or last")
        vocabulary = base_model(self.model).config.get_text_config().vocab_size
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise ValueError(f"prompt {number} has the token {wrong}: the model's tokens are 0 to {vocabulary - 1}")
        return tokens

    def _encoded(self, number: int, prompt: str) -> tuple[int, ...]:
        """Encodes a string like a row's prompt: a rendered chat does not get a second first token."""
        if self.tokenizer is None:
            raise ValueError(f"prompt {number} is the string {prompt[:40]!r}: without a tokenizer, give token ids")
        return tuple(prompt_tokens(self.tokenizer, prompt))

    def longest_prompt(self, sampling: SamplingParams) -> int | None:
        """Number of tokens that a prompt may have so that one more fits; ``None`` without a limit in the config."""
        positions = self.num_positions()
        return None if positions is None else positions - 1

    def num_positions(self) -> int | None:
        """Maximum number of tokens of a prompt with its completion; ``None`` without a limit in the config."""
        return num_positions(self.model)

    def token_limit(self, prompt: tuple[int, ...], requested: int) -> int:
        """Returns the maximum number of new tokens: the requested one, or what the model's positions leave.

        Raises:
            ValueError: they leave none.
        """
        positions = self.num_positions()
        if positions is None:
            return requested
        if len(prompt) >= positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in the model's {positions} positions: shorten it"
            )
        # Completions end where the model's positions end.
        return min(requested, positions - len(prompt))

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The end-of-sequence tokens of model and tokenizer, and the tokens that end a turn of the chat template."""
        model: Any = base_model(self.model)
        if self._template_ends is None:
            self._template_ends = [] if self.tokenizer is None else ChatTemplate(self.tokenizer).end_tokens()
        found = set(self._template_ends)
        # Configs name end tokens in several places, and none is complete.
        for source in (getattr(model, "generation_config", None), model.config.get_text_config(), self.tokenizer):
            token = getattr(source, "eos_token_id", None)
            found.update([] if token is None else [token] if isinstance(token, int) else token)
        if not found:
            self._warn_once(
                "neither the model nor the tokenizer names an end-of-sequence token: completions end at their limit"
            )
        return frozenset(found)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)


def generation_attention(model: PreTrainedModel, device: torch.device) -> str:
    """Returns the attention that a model generates with: its own, but on a GPU the registered one instead of torch's.

    It computes the same, without reading masks back from the device.
    """
    own = str(attention_of(model))
    return register_attention() if own == "sdpa" and device.type == "cuda" and is_switchable(model) else own
