"""Beam search over tokens: the likeliest completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.validation import check_count, check_not_negative
from .budget import Account, Limit
from .completion import FinishReason, decode, readable
from .engine import Engine
from .sampling import SamplingParams
from .strategy import Candidate, NextTokens, Query, Search, SearchResult, Strategy
from .trees import Node, SearchTree


class TokenBeamSearch(Strategy):
    r"""Finds likely completions by continuing the ``width`` likeliest beginnings, a token at a time.

    The score of a completion of ``n`` tokens is its log-probability under the model (temperature 1, nothing filtered)
    divided by ``n ** length_penalty``. The search ends when no beginning in the beam can reach the best completion's
    score any more. With a width of at least the number of beginnings, the result is the likeliest completion.

    Of the settings, ``max_new_tokens``, ``min_new_tokens``, ``stop`` and ``stop_token_ids`` apply. Each beginning that
    is continued counts as one token of the policy, and as one expansion. Nothing is random.

    Args:
        engine: a local engine.
        width: beginnings that are kept, at least 1.
        length_penalty: at least 0; 1 scores by the mean per token.
        options: ``sampling`` and ``budget``.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> strategy = TokenBeamSearch(engine, width=8)  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"])[0].score  # doctest: +SKIP
        -0.31
    """

    needs_token_ids = True
    samples = False

    def __init__(self, engine: Engine, *, width: int = 4, length_penalty: float = 0.0, **options: Any) -> None:
        super().__init__(engine, **options)
        check_count("width", width, "4 is usual")
        check_not_negative("length_penalty", length_penalty, "0 scores by the log-probability")
        self.width, self.length_penalty = width, float(length_penalty)

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        beams = _Beams(self, query, sampling)
        stopped_by: Limit | None = None
        while beams.open and not beams.settled():
            stopped_by = account.exhausted() if beams.root.children else None
            if stopped_by:
                break
            # Where the budget does not pay for all, it pays for the likeliest.
            paid = int(min(len(beams.open), account.left("tokens"), account.left("expansions")))
            account.expansions += paid
            states = [NextTokens(query, beams.states[node][0]) for node in beams.open[:paid]]
            rows: list[Tensor] = yield states
            beams.advance(rows)
        return beams.result(account, stopped_by)


class _Beams:
    """The beginnings and completions of one search.

    Args:
        search: its options.
        query: the query.
        sampling: its settings.
    """

    def __init__(self, search: TokenBeamSearch, query: Query, sampling: SamplingParams) -> None:
        self.search, self.query, self.sampling = search, query, sampling
        self.root = Node(value=0.0)
        self.open: list[Node] = [self.root]
        self.ended: list[Node] = []
        # The tokens, the text and the log-probability from the prompt's end to each node.
        self.states: dict[Node, tuple[tuple[int, ...], str, float]] = {self.root: ((), query.lead, 0.0)}
        self._ends = search.end_token_ids | set(sampling.stop_token_ids)
        positions = search.num_positions()
        room = sampling.max_new_tokens if positions is None else positions - len(query.context_ids)
        self._longest = max(1, min(sampling.max_new_tokens, room))

    def settled(self) -> bool:
        """Tells whether no beginning can lead to a better completion than the best so far."""
        stopped = [node.value for node in self.ended if node.finish_reason == "stop" and node.value is not None]
        if not stopped:
            return False
        # A log-probability can only fall, and a negative one weighs least over the longest completion.
        bound = max(self.states[node][2] for node in self.open) / self._longest**self.search.length_penalty
        return bool(max(stopped) >= bound)

    def advance(self, rows: Sequence[Tensor]) -> None:
        """Continues the first beginnings by their likeliest tokens, given the log-probabilities after each."""
        parents, self.open = self.open[: len(rows)], []
        table_NV = torch.stack(list(rows)).double().cpu()
        if len(self.states[parents[0]][0]) + 1 < self.sampling.min_new_tokens:
            table_NV[:, [token for token in self._ends if token < table_NV.shape[1]]] = -torch.inf
        sums_NV = table_NV + torch.tensor([self.states[node][2] for node in parents], dtype=torch.float64)[:, None]
        last = len(self.states[parents[0]][0]) + 1 == self._longest
        places = _descending(sums_NV.flatten(), self.search.width + len(parents) * len(self._ends))
        for made, place in enumerate(places):
            row, token = divmod(place, table_NV.shape[1])
            if table_NV[row, token] == -torch.inf or (made if last else len(self.open)) == self.search.width:
                break
            child = self._child(parents[row], token, float(table_NV[row, token]))
            (self.open if child.finish_reason is None else self.ended).append(child)

    def _child(self, parent: Node, token: int, logprob: float) -> Node:
        before, text_before, total = self.states[parent]
        tokens, total = (*before, token), total + logprob
        text = self.query.lead + decode(self.search.tokenizer, tokens)
        child = Node((token,), text[len(text_before) :], (logprob,), self._finish(tokens, text), parent=parent)
        child.value = total / len(tokens) ** self.search.length_penalty
        child.prior = float(torch.tensor(logprob).exp())
        child.visits = 1
        parent.children.append(child)
        self.states[child] = tokens, text, total
        return child

    def _finish(self, tokens: tuple[int, ...], text: str) -> FinishReason | None:
        early = len(tokens) < self.sampling.min_new_tokens
        if not early and (tokens[-1] in self._ends or any(stop in text for stop in self.sampling.stop)):
            return "stop"
        return "length" if len(tokens) >= self._longest else None

    def result(self, account: Account, stopped_by: Limit | None) -> SearchResult:
        """Returns all completions that were found, or the beginnings in the beam if no completion was found."""
        nodes = self.ended or self.open
        best = max(nodes, key=lambda node: (node.finish_reason == "stop", node.value))
        for node in best.line:
            node.chosen = True
        prompt = self.query.prompt
        prompt = prompt if isinstance(prompt, str) else decode(self.search.tokenizer, self.query.token_ids)
        name = type(self.search).__name__
        return SearchResult(
            [self._candidate(node) for node in nodes],
            nodes.index(best),
            tokens=account.tokens,
            expansions=account.expansions,
            stopped_by=stopped_by,
            tree=SearchTree(self.root, readable(prompt), self.query.token_ids, name, self.query.seed),
        )

    def _candidate(self, node: Node) -> Candidate:
        tokens, text, _ = self.states[node]
        found = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
        return Candidate(self.query, tokens, text, node.all_logprobs(), node.finish_reason or "length", node.value)


def _descending(values: Tensor, first: int) -> Iterator[int]:
    """Yields the places of values from the largest down, of equal ones the first; sorts only as far as it is read.

    Example:
        >>> list(_descending(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1))
        [1, 2, 3, 0]
    """
    seen, size = 0, first
    while seen < len(values):
        # All values down to some floor, so that equal ones are never split.
        floor = values.topk(min(size, len(values))).values[-1]
        places = (values >= floor).nonzero().squeeze(-1)
        order = places[values[places].sort(descending=True, stable=True).indices]
        yield from order[seen:].tolist()
        seen, size = len(order), 2 * len(order)
