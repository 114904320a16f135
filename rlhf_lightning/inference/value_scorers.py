"""Scorers by what the policy's own training and sampling know: the critic, and the policy's certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.unshard import gathered
from ..models import base_model, evaluating, num_positions, output_head, resolve_layout, token_stats
from ..models.critic import ValueModel
from ..models.loading import locate
from ..models.own_attention import attention_of, using_attention
from ..models.scoring import check_length, grouped
from ..sequences import Segment, pack, plan_micro_batches, register_attention
from ..utils.transfer import to_host
from ..utils.validation import check_count
from .scorers import device_of, packed_values
from .strategy import Candidate, Scores
from .text_scorers import Dtype, check_unloaded, computing_in, loading_options, move, same_tokens
from .token_counts import read_once


class ValueScorer:
    """Scores solutions, above all partial ones, by PPO's critic: the return that it expects from there on.

    The critic reads the policy's own tokens, up to the last one that does not end the answer: it has learned values of
    states that something is sampled from. Common prefixes of solutions are computed once.

    Args:
        model: folder or hub id of a critic that ``PPOModule.save_critic`` or ``ModelExport(critic_folder=...)`` wrote;
            or a ``ValueModel``.
        micro_batch_tokens: tokens per forward, at least 1, 8192 by default; changes no score. Only with a folder or hub
            id, as the next one.
        dtype: of the weights, ``float32`` by default.

    Raises:
        ValueError: the folder holds no critic, or an option is out of range, or of no use to a loaded model.

    Example::

        MCTS(engine, scorer=VerifierScorer(check), value=ValueScorer("runs/ppo/critic"))
    """

    def __init__(
        self, model: str | ValueModel, *, micro_batch_tokens: int | None = None, dtype: Dtype | None = None
    ) -> None:
        if isinstance(model, ValueModel):
            check_unloaded(micro_batch_tokens=micro_batch_tokens, dtype=dtype)
        else:
            options = loading_options(micro_batch_tokens, dtype)
            model = ValueModel.from_pretrained(locate(str(model), what="critic"), **options)
        self.model = model
        self._ends: frozenset[int] = frozenset()

    def attach(self, engine: Any) -> None:
        """Moves to an engine's device.

        Raises:
            ValueError: the engine has another tokenizer.
        """
        tokenizer, own = getattr(engine, "tokenizer", None), self.model.tokenizer
        if tokenizer is not None and own is not None and not same_tokens(own, tokenizer):
            raise ValueError(
                "the critic has another tokenizer than the policy, whose tokens it reads: use one that was trained "
                "with this policy, or a RewardScorer, which reads texts"
            )
        self._ends = frozenset(getattr(engine, "end_token_ids", ()))
        move(self.model, device_of(engine, self.model))

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates.

        Raises:
            ValueError: one is too long, or its tokens are not known.
        """
        read = [self._read(candidate) for candidate in candidates]
        # A prompt alone is read at its own last token.
        trees = [Segment(ids[:begun], None, (Segment(ids[begun:], [1.0] * len(ids[begun:])),)) for ids, begun in read]
        for tree in trees:
            self.model.check_length(tree)
        values = [float(value.mean()) for value in packed_values(self.model, trees)]
        return Scores(values, read_once(candidates, [ids for ids, _ in read]))

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        return len(self._read(candidate)[0])

    def _read(self, candidate: Candidate) -> tuple[tuple[int, ...], int]:
        """The tokens up to the one that the value is read at, and how many are the prompt's."""
        prompt, ids = candidate.query.context_ids, candidate.token_ids
        if not prompt or (candidate.text and not ids):
            raise ValueError(
                "a critic reads the tokens of prompts and solutions, which this engine does not report: use a "
                "LocalEngine, or a RewardScorer, which reads texts"
            )
        if candidate.finish_reason == "stop" and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        if not ids and len(prompt) == 1:
            raise ValueError("a critic reads at least two tokens, and the prompt alone has one: give a longer prompt")
        return (*prompt, *ids), len(prompt) if ids else len(prompt) - 1


class SelfCertaintyScorer:
    r"""Scores solutions by how far the policy's distributions are from uniform, on the mean over their tokens.

    Self-certainty (Kang et al., 2025, arXiv:2502.18581): of n tokens with a vocabulary of V,
    :math:`\frac{1}{n} \sum_i KL(U \| p_i) = -\frac{1}{n V} \sum_i \sum_j \log (V p_i(j))`, at temperature 1 with
    nothing filtered. No other model is needed; the policy reads what it has sampled once more.

    Args:
        micro_batch_tokens: tokens per forward, at least 1; changes no score.

    Raises:
        ValueError: the option is out of range; of ``attach``: the engine is not a local one.

    Example::

        BestOfN(engine, scorer=SelfCertaintyScorer(), n=16)
    """

    def __init__(self, *, micro_batch_tokens: int = 8192) -> None:
        check_count("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
        self.micro_batch_tokens = micro_batch_tokens
        self._model: nn.Module | None = None
        self._layout: Any = None
        self._attention = register_attention()

    def attach(self, engine: Any) -> None:
        """Takes the policy of an engine, or of the engine within a strategy."""
        innermost = engine
        while getattr(innermost, "engine", None) is not None:
            innermost = innermost.engine
        model = getattr(innermost, "model", None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"SelfCertaintyScorer reads the policy's distributions, which {type(innermost).__name__} does not "
                "report: use a LocalEngine, or LikelihoodScorer"
            )
        if model is not self._model:
            self._model, self._layout, self._attention = model, None, register_attention()

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates; one without tokens has the score 0.

        Raises:
            ValueError: one is too long, or no engine is attached.
        """
        if self._model is None:
            raise ValueError("SelfCertaintyScorer has no policy yet: give it to a strategy, or call attach(engine)")
        scores, counts = [0.0] * len(candidates), [0] * len(candidates)
        places = [number for number, candidate in enumerate(candidates) if candidate.token_ids]
        if not places:
            return Scores(scores, counts)
        kept = [candidates[number] for number in places]
        limit = num_positions(self._model)
        for candidate in kept:
            check_length(self.cost(candidate), limit)
        trees = [Segment(c.query.context_ids, None, (Segment(c.token_ids, [1.0] * len(c.token_ids)),)) for c in kept]
        read = read_once(kept, [(*c.query.context_ids, *c.token_ids) for c in kept])
        for place, value, count in zip(places, self._certainties(trees), read, strict=True):
            scores[place], counts[place] = value, count
        return Scores(scores, counts)

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        return len(candidate.query.context_ids) + len(candidate.token_ids)

    @torch.no_grad()
    def _certainties(self, trees: Sequence[Segment]) -> list[float]:
        model: Any = self._model
        base = base_model(model)
        device = next(model.parameters()).device
        examples, numbers = grouped(trees, self.micro_batch_tokens)
        found: dict[tuple[int, ...], Tensor] = {}
        with evaluating(model), gathered(model), computing_in(None, device), using_attention(base, self._attention):
            if self._layout is None:
                self._layout = resolve_layout(model, "auto")
                self._attention = str(attention_of(base))
            log_size = math.log(len(output_head(model).weight))
            for micro in plan_micro_batches(examples, budget=self.micro_batch_tokens):
                batch = pack([examples[n] for n in micro], device=device)
                # The mean of log p over the vocabulary is minus the divergence, up to log V.
                means_N = token_stats(model, batch, self._layout, mean=True).mean_logprobs
                certainty_S = -batch.sum_per_sequence(means_N) / batch.scored_lengths - log_size
                found[tuple(place for n in micro for place in numbers[n])] = certainty_S
        values = [0.0] * len(trees)
        for group, certainties in to_host(found).items():
            for place, value in zip(group, certainties.tolist(), strict=True):
                values[place] = value
        return values
