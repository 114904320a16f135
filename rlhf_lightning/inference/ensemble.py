"""An engine over several models that combines their distributions of every token.

Legend: M models, N rows, P prompts, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.formats import demonstration
from ..data.row_reader import RowReader
from ..data.sources import open_source
from ..data.tokenization import RowTokenizer
from ..models import base_model, load_tokenizer
from ..models.backbone import check_lengths
from ..models.loading import first_difference
from ..sequences import Example
from ..utils.validation import check_choice, check_count
from .completion import Completion, Request
from .continuous_batching import Counts
from .decoder import Decoder
from .engine import LocalEngine, Prompts
from .pooling import (
    POOLINGS,
    Pooling,
    arithmetic_likelihood,
    geometric_likelihood,
    maximize_on_simplex,
    pooled_scores,
)
from .requests import completions_by_prompt, make_requests
from .sampling import SamplingParams
from .together import decoding, generate_together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EnsemblePolicy:
    r"""Samples from several models as from one: their distributions of the next token are combined at every step.

    An engine: strategies take it, and every command and stage that samples (see ``policies.policy_spec``). Models may
    differ in everything but the vocabulary. Rows are batched as in ``LocalEngine``, each model with a cache of its own;
    a sample is a function of the models, its prompt, the settings and its seed, up to rounding in the models' own
    products. Temperature, filters and penalties apply to the combined distribution, and the samples' log-probs are
    those under it.

    With weights :math:`w_m` that sum to 1, ``combine`` is one of

    - ``arithmetic``: :math:`p = \sum_m w_m p_m`, the mean of probabilities: likely where one model is sure;
    - ``geometric``: :math:`p \propto \prod_m p_m^{w_m}`, the mean of logits: likely where no model objects;
    - ``vote``: the share of models whose most likely token it is; greedy ties go to the token that the mean of
      probabilities prefers. Filters apply to the shares.

    Args:
        models: folders or hub ids of models or adapters, or causal language models of transformers; at least one.
        tokenizer: of models that are given as such; by default that of the first folder. All folders' tokenizers must
            have the same tokens.
        combine: ``arithmetic``, ``geometric`` or ``vote``.
        weights: one per model, at least 0, with a sum above 0, which they are divided by; equal by default. A model of
            weight 0 is not run. ``learn_weights`` finds them from rows.
        dtype: of models that are loaded: ``float32``, ``bfloat16``, ``float16`` or ``float64``; ``auto`` is
            ``bfloat16`` on a GPU, else ``float32``.
        device: of models that are loaded; by default the GPU if there is one.
        max_batch_tokens: tokens of each model's cache, and tokens of one prefill; at least 1. A single row always fits.

    Raises:
        ValueError: vocabularies differ, a model cannot be loaded or batched, or an option is not allowed.

    Example:
        >>> policy = EnsemblePolicy(["runs/a/model", "runs/b/model"], weights=[0.7, 0.3])  # doctest: +SKIP
        >>> policy.learn_weights("rows.jsonl")  # doctest: +SKIP
        [0.62, 0.38]
        >>> policy.generate(["3+4=?"])[0][0].text  # doctest: +SKIP
        '7'
    """

    def __init__(
        self,
        models: Sequence[str | Path | nn.Module],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        combine: Pooling = "arithmetic",
        weights: Sequence[float] | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        max_batch_tokens: int = 65536,
    ) -> None:
        if isinstance(models, str | Path | nn.Module) or not len(models):
            raise ValueError(f"models is {models!r}; it must be a list of at least one folder or model")
        self.combine = combine
        self.weights = check_combination(len(models), combine, weights)
        self.max_batch_tokens = max_batch_tokens
        self._counts = Counts()
        self.names = [str(m) if isinstance(m, str | Path) else f"models[{n}]" for n, m in enumerate(models)]
        self.tokenizer = shared_tokenizer(models, tokenizer)
        # Engines of the members encode prompts and know what ends a completion.
        self._members = [
            LocalEngine(model, self.tokenizer, max_batch_tokens=max_batch_tokens)
            if isinstance(model, nn.Module)
            else LocalEngine.from_pretrained(model, dtype=dtype, device=device, max_batch_tokens=max_batch_tokens)
            for model in models
        ]
        self._check_vocabularies()

    def _check_vocabularies(self) -> None:
        sizes = [base_model(member.model).config.get_text_config().vocab_size for member in self._members]
        for name, size in zip(self.names, sizes, strict=True):
            if size != sizes[0]:
                raise ValueError(
                    f"vocab_size is {sizes[0]} in {self.names[0]} and {size} in {name}: only models of one vocabulary "
                    "can be combined token by token"
                )

    # An engine.

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end a completion of any of the models."""
        return frozenset().union(*(member.end_token_ids for member in self._members))

    def statistics(self) -> dict[str, Any]:
        """Tells what was done since the engine was made: the fields of ``Counts``, a token of all models being one."""
        return self._counts.as_dict()

    def encode(self, prompt: str | Sequence[int], number: int = 0) -> tuple[int, ...]:
        """Encodes a prompt as ``generate`` does: see ``LocalEngine.encode``."""
        return self._members[0].encode(prompt, number)

    def longest_prompt(self, sampling: SamplingParams) -> int | None:
        """Returns the number of tokens that a prompt may have so that one more fits; ``None`` without a limit."""
        positions = self.num_positions()
        return None if positions is None else positions - 1

    def num_positions(self) -> int | None:
        """Returns the maximum number of tokens of a prompt with its completion; ``None`` without a limit."""
        limits = [limit for member in self._members if (limit := member.num_positions()) is not None]
        return min(limits, default=None)

    def token_limit(self, prompt: tuple[int, ...], requested: int) -> int:
        """Returns the maximum number of new tokens: the requested one, or what the fewest positions leave."""
        return min(member.token_limit(prompt, requested) for member in self._members)

    def generate(
        self,
        prompts: Prompts,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        watch: Callable[[Request], object] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions of prompts from the combined distribution.

        ``LocalEngine.generate`` documents the arguments; ``model_logprobs`` are those of the combination.

        Raises:
            ValueError: as ``LocalEngine.generate``; also for ``min_new_tokens`` with votes.
        """
        params = sampling or SamplingParams()
        if self.combine == "vote" and params.min_new_tokens:
            raise ValueError(
                f"min_new_tokens={params.min_new_tokens} is not allowed with combine='vote': where every vote is for "
                "an end token, no other token has a share; use combine='arithmetic'"
            )
        requests, stop_ids = make_requests(self, prompts, num_samples, params, seeds, limits, watch)
        if requests:
            models, weights_M = self._running()
            pool = partial(pooled_scores, weights_M=weights_M, pooling=self.combine, greedy=params.greedy)
            with decoding(models) as decoders:
                generate_together(decoders, pool, requests, params, stop_ids, self.max_batch_tokens, self._counts)
        return completions_by_prompt(requests, num_samples, params)

    def next_token_logprobs(self, prompts: Prompts) -> Tensor:
        """Computes the combined log-probabilities of all tokens after each prompt.

        Args:
            prompts: strings, or token ids.

        Returns:
            One row per prompt, ``(P, V)``, in fp32.

        Raises:
            ValueError: a prompt is empty, or fills a model's positions.
        """
        running = [member for member, weight in zip(self._members, self.weights, strict=True) if weight > 0]
        scores = [member.next_token_logprobs(prompts) for member in running]
        scores_MPV = torch.stack([each.to(scores[0].device) for each in scores])
        weights_M = torch.tensor([weight for weight in self.weights if weight > 0], dtype=torch.float64)
        return pooled_scores(scores_MPV, weights_M, self.combine).log_softmax(-1)

    def _running(self) -> tuple[list[nn.Module], Tensor]:
        """Returns the models with a weight, and these weights."""
        pairs = [(m.model, weight) for m, weight in zip(self._members, self.weights, strict=True) if weight > 0]
        return [model for model, _ in pairs], torch.tensor([weight for _, weight in pairs], dtype=torch.float64)

    # Weights.

    def learn_weights(self, rows: Any, num_rows: int = 256) -> list[float]:
        """Sets the weights to those of greatest likelihood on rows, and returns them.

        The likelihood of the rows' completions is a concave function of the weights; its maximum is found to 1e-11 per
        token. Take rows that the models were not trained on: on its own training rows a model is too sure.

        Args:
            rows: a source of prompts with completions, as ``SFTDataModule`` reads them.
            num_rows: how many, from the first.

        Returns:
            One weight per model, with the sum 1.

        Raises:
            ValueError: votes, which give most tokens no likelihood; no tokenizer; no row that counts; or one that is
                too long for a model.
        """
        if self.combine == "vote":
            raise ValueError(
                "combine is 'vote', under which tokens that no model votes for are impossible: weights of greatest "
                "likelihood need combine='arithmetic' or 'geometric'"
            )
        if self.tokenizer is None:
            raise ValueError("rows are texts, and the models came without a tokenizer: give tokenizer=")
        check_count("num_rows", num_rows, "256 is usual")
        sequences = list(islice(_counted_sequences(rows, self.tokenizer), num_rows))
        check_lengths(self.num_positions(), {n: tokens_L.tolist() for n, (tokens_L, _) in enumerate(sequences)})
        total = sum(float(counts_L.sum()) for _, counts_L in sequences)
        if not total:
            raise ValueError(f"rows {rows!r} has no token of a completion to learn weights from")
        with decoding([member.model for member in self._members]) as decoders:

            def read() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
                for tokens_L, counts_L in sequences:
                    yield _after_each(decoders, tokens_L, counts_L / total)

            if self.combine == "geometric":
                likelihood = geometric_likelihood(read)
            else:
                parts = [
                    (logprobs.gather(-1, tokens.expand(len(logprobs), -1)[..., None]), counts)
                    for logprobs, tokens, counts in read()
                ]
                table_TM = torch.cat([part_ML1[..., 0].T for part_ML1, _ in parts]).double()
                likelihood = arithmetic_likelihood(table_TM, torch.cat([counts for _, counts in parts]))
            self.weights = maximize_on_simplex(likelihood, len(self._members)).tolist()
        return list(self.weights)


def _after_each(decoders: Sequence[Decoder], tokens_L: Tensor, counts_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the models' log-probabilities before every token of a row that counts, on the CPU."""
    places = counts_L.nonzero()[:, 0]
    first = int(places[0])
    inputs = tokens_L[:-1].tolist()
    scores_MLV = torch.stack([decoder.last(inputs, len(inputs) - first + 1).float().cpu() for decoder in decoders])
    chosen_MLV = scores_MLV[:, places - first].log_softmax(-1)
    return chosen_MLV, tokens_L[places], counts_L[places]


def _counted_sequences(rows: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the tokens of each path of the rows, and what each counts, those of earlier paths nothing."""
    tokens_of = RowTokenizer(tokenizer)

    def make(row_id: str, columns: dict[str, Any]) -> list[Example]:
        row = demonstration(columns)
        root = tokens_of.answers(row) if row.completions else tokens_of.whole(row)
        return [Example(row_id, root, row.fields)]

    for example in RowReader(open_source(rows, split="validation"), make).read_all():
        seen: set[int] = set()
        for path in example.root.paths():
            tokens = [torch.from_numpy(segment.tokens) for segment in path]
            counts = [
                torch.zeros(len(segment.tokens), dtype=torch.float64)
                if segment.weights is None or id(segment) in seen
                else torch.from_numpy(segment.weights).double()
                for segment in path
            ]
            seen |= {id(segment) for segment in path}
            counts_L = torch.cat(counts)
            if bool(counts_L.any()):
                yield torch.cat(tokens), counts_L


def check_combination(count: int, combine: str, weights: Sequence[float] | None) -> list[float]:
    """Checks how a number of models are combined; returns their weights with the sum 1.

    Raises:
        ValueError: there is no such combination, or the weights are not one finite number of at least 0 each.

    Example:
        >>> check_combination(2, "geometric", [1, 3])
        [0.25, 0.75]
    """
    check_choice("combine", combine, POOLINGS)
    if weights is None:
        return [1 / count] * count
    if isinstance(weights, str) or not all(isinstance(weight, int | float) for weight in weights):
        raise ValueError(f"weights is {weights!r}; it must be a list of numbers, one for each model")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers for {count} models: give one for each")
    total = math.fsum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not total > 0:
        raise ValueError(f"weights is {list(weights)}; all must be finite, at least 0, and some above 0")
    return [weight / total for weight in weights]


def shared_tokenizer(
    models: Sequence[str | Path | nn.Module], tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of all models.

    Raises:
        ValueError: two of them differ in a token.
    """
    found = [("tokenizer", tokenizer)] if tokenizer is not None else []
    found += [(str(model), load_tokenizer(model)) for model in models if isinstance(model, str | Path)]
    for name, other in found[1:]:
        odd = first_difference(found[0][1].get_vocab(), other.get_vocab())
        if odd is not None:
            raise ValueError(
                f"the tokenizers of {found[0][0]!r} and {name!r} differ: {odd}; only models of one vocabulary can be "
                "combined token by token"
            )
    return found[0][1] if found else None
