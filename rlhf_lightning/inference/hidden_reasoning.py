"""Thinks before it answers, and keeps the thought out of the answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from ..data.text_tokens import continuing, encode
from ..data.thoughts import THINK, check_marks
from ..utils.validation import check_count
from .budget import Account, Budget
from .candidates import Candidate, Query
from .completion import Completion, Thought
from .engine import Engine
from .sampling import SamplingParams, derive_seed
from .strategy import Sample, Search, SearchResult, Strategy


class HiddenReasoning(Strategy):
    r"""Lets the policy think between two marks, and then answer; texts and scorers have the answer alone.

    The opening mark is written unless the prompt ends with it. A thought ends with the closing mark, which is looked
    for in the text of the tokens, however these cut it, or as a token of its own; at ``thinking_tokens``, or where the
    policy ends the sequence instead, the mark is written (budget forcing; Muennighoff et al., 2025, arXiv:2501.19393).
    Written tokens are listed in ``thought.written``: they were not sampled, and are not to be trained.

    Around an engine, every sample is a thought and an answer: ``BestOfN(HiddenReasoning(engine), scorer=...)`` chooses
    among answers of different thoughts. Around a strategy, one thought is sampled from the strategy's engine, and the
    strategy answers after it: ``HiddenReasoning(BeamSearch(engine, scorer=...))``. Scorers that judge solutions read
    prompt and answer; the critic and self-certainty read what the policy reads.

    ``sampling.max_new_tokens`` bounds thought, marks and answer together. Where it, or what a prompt leaves of the
    model's positions, is less than both budgets and the marks, both shrink in proportion; what is more belongs to the
    answer. ``stop`` and ``min_new_tokens`` apply to the answer.

    Over a remote engine (``api="completions"``), the thought is continued as text. Without the engine's tokenizer the
    tokens are not known, and a thought counts as closed by the policy unless it was cut off.

    Args:
        engine: samples from the policy; or a strategy that answers.
        thinking_tokens: of a thought, at least 1.
        answer_tokens: of an answer, at least 1.
        marks: texts that open and close a thought.
        sampling: settings of thought and answer; by default those of the strategy, or both budgets and the marks.
        budget: limits per prompt; by default those of the strategy. One token is kept for the answer.

    Raises:
        ValueError: an option out of range, or an engine that cannot continue a prompt.

    Example:
        >>> strategy = HiddenReasoning(engine, thinking_tokens=256)  # doctest: +SKIP
        >>> result = strategy.search(["3+14+9=?\n"], seeds=[0])[0]  # doctest: +SKIP
        >>> result.text, result.thought.text  # doctest: +SKIP
        ('#26', '3+14=17\n17+9=26')
    """

    # Searches over steps must not wrap it: it would think before every step.
    thinks = True

    samples = False  # marks are written

    def __init__(
        self,
        engine: Engine,
        *,
        thinking_tokens: int = 512,
        answer_tokens: int = 256,
        marks: Sequence[str] = THINK,
        sampling: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> None:
        check_count("thinking_tokens", thinking_tokens, "512 is usual")
        check_count("answer_tokens", answer_tokens, "256 is usual")
        self.marks = check_marks(marks)
        self.thinking_tokens, self.answer_tokens = thinking_tokens, answer_tokens
        self.strategy = engine if isinstance(engine, Strategy) else None
        if getattr(engine, "thinks", False):
            raise ValueError("HiddenReasoning wraps another one: give the engine within, which thinks once")
        policy = engine if self.strategy is None else self.strategy.engine
        if getattr(policy, "api", "completions") != "completions":
            raise ValueError(
                f"{type(policy).__name__} with api={policy.api!r} answers messages, and a thought is continued: use "  # type: ignore[attr-defined]
                "api='completions'"
            )
        scorer = None if self.strategy is None else self.strategy.scorer
        if self.strategy is not None:
            sampling, budget = sampling or self.strategy.sampling, budget or self.strategy.budget
            self.needs_token_ids = self.strategy.needs_token_ids
        super().__init__(policy, scorer=scorer, sampling=sampling, budget=budget)
        if sampling is None:
            room = thinking_tokens + answer_tokens + self._num_marks
            self.sampling = SamplingParams(max_new_tokens=room)

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        if not query.token_ids and not isinstance(query.prompt, str):
            raise ValueError(f"the prompt is {query.prompt!r:.60}, and a thought continues a text: render the chat")
        thinking, answer = self._split(query, sampling)
        thought = yield from self._think(query, sampling, account, thinking)
        own = replace(query, thought=thought, seed=derive_seed(query.seed, "answer"))
        # The same settings for all prompts, so that they share calls of the engine.
        _, most = self._shares(sampling.max_new_tokens - self._num_marks)
        if self.strategy is not None:
            result = yield from self.strategy.start(own, _limited(sampling, min(most, answer)), account)
        else:
            limit = int(min(most, answer, account.left("tokens")))
            found: list[list[Completion]] = yield [Sample(own, (), (own.seed,), _limited(sampling, most), limit)]
            account.expansions += 1
            result = SearchResult([Candidate.of(own, found[0][0])], 0)
        whole = [self._whole(query, thought, candidate) for candidate in result.candidates]
        spent = {name: getattr(account, name) for name in ("tokens", "scorer_tokens", "expansions")}
        return replace(result, candidates=whole, **spent, stopped_by=result.stopped_by or account.exhausted())

    # The thought.

    def _think(
        self, query: Query, sampling: SamplingParams, account: Account, limit: int
    ) -> Generator[Any, Any, Thought]:
        opening = "" if self._is_open(query) else self.marks[0]
        ids = self._ids(opening)
        begun = Thought("", opening, ids, (0.0,) * len(ids), tuple(range(len(ids))))
        limit = int(min(limit, account.left("tokens") - 1))
        if limit < 1:
            return self._ended(begun, Completion([], "", [], "length"))
        most, _ = self._shares(sampling.max_new_tokens - self._num_marks)
        closing = self._ids(self.marks[1])
        params = replace(
            _limited(sampling, max(most, 1)),
            min_new_tokens=0,
            stop=(self.marks[1],),
            # A special token is not part of the text in which stop strings are found.
            stop_token_ids=(*sampling.stop_token_ids, *(closing if len(closing) == 1 else ())),
        )
        seeds = (derive_seed(query.seed, "thought"),)
        found: list[list[Completion]] = yield [Sample(replace(query, thought=begun), (), seeds, params, limit)]
        return self._ended(begun, found[0][0])

    def _ended(self, begun: Thought, completion: Completion) -> Thought:
        """Joins what was sampled to what was written, up to the closing mark, which is written if it is missing."""
        known = self.tokenizer is not None and (bool(completion.token_ids) or not completion.text)
        if not known:
            text = begun.text + completion.text
            return Thought(text, begun.passage + text + self.marks[1], closed=completion.finish_reason == "stop")
        ids, written, closing = list(completion.token_ids), [], self.marks[1]
        text, lead = self._read(ids), ""
        at = text.find(closing)
        if at >= 0:
            count = next(n for n in range(1, len(ids) + 1) if self._read(ids[:n]).find(closing) == at)
            ids, after = ids[:count], self._read(ids[:count])[at + len(closing) :]
            text, lead = text[:at], after.lstrip()
            passage = text + closing + after[: len(after) - len(lead)]
        else:
            ends = self.end_token_ids | set(completion.token_ids[-1:] if completion.finish_reason == "stop" else ())
            while ids and ids[-1] in ends:
                ids.pop()
            text = self._read(ids)
            # The limit may have cut the mark itself.
            cut = next(n for n in range(len(closing) - 1, -1, -1) if text.endswith(closing[:n]))
            tail = self._ids(closing[cut:])
            written = list(range(len(ids), len(ids) + len(tail)))
            text, passage = text[: len(text) - cut], text + closing[cut:]
            ids += tail
        logprobs = list(completion.logprobs[: len(ids) - len(written)])
        complete = len(logprobs) == len(ids) - len(written)
        before = len(begun.token_ids)
        return Thought(
            text,
            begun.passage + passage,
            (*begun.token_ids, *ids),
            (*begun.logprobs, *logprobs, *(0.0 for _ in written)) if complete else (),
            (*begun.written, *(before + place for place in written)),
            at >= 0,
            lead,
        )

    def _whole(self, query: Query, thought: Thought, answer: Candidate) -> Candidate:
        """Puts the thought before an answer."""
        text = answer.text.lstrip()
        blanks = answer.text[: len(answer.text) - len(text)]
        known = bool(thought.token_ids) and (bool(answer.token_ids) or not answer.text)
        complete = len(thought.logprobs) == len(thought.token_ids) and len(answer.logprobs) == len(answer.token_ids)
        return replace(
            answer,
            query=query,
            token_ids=(*thought.token_ids, *answer.token_ids) if known else (),
            text=text,
            logprobs=(*thought.logprobs, *answer.logprobs) if known and complete else (),
            thought=replace(thought, passage=thought.passage + blanks),
        )

    # Marks and budgets.

    @property
    def _num_marks(self) -> int:
        """Number of tokens of both marks; 0 where they are not known."""
        return sum(len(self._ids(mark)) for mark in self.marks)

    def _ids(self, text: str) -> tuple[int, ...]:
        if self.tokenizer is None:
            return ()
        ids = tuple(encode(self.tokenizer, text, continues=True)) if text else ()
        if self._read(ids) != text:
            raise ValueError(
                f"the tokenizer cannot write {text!r}, of the marks {list(self.marks)}: give marks= that it has tokens "
                "for"
            )
        return ids

    def _read(self, ids: Sequence[int]) -> str:
        """Decodes tokens with the special ones among them, which marks may be."""
        plain: Any = continuing(self.tokenizer)
        return str(plain.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _is_open(self, query: Query) -> bool:
        """Whether the prompt ends with the opening mark."""
        if query.token_ids and self.tokenizer is None:
            raise ValueError("HiddenReasoning looks for marks in text: give the engine a tokenizer")
        text = self._read(query.token_ids) if query.token_ids else query.prompt
        return bool(text.rstrip().endswith(self.marks[0]))

    def _shares(self, room: int) -> tuple[int, int]:
        """Splits a number of tokens between thought and answer."""
        whole = self.thinking_tokens + self.answer_tokens
        thinking = min(self.thinking_tokens, room * self.thinking_tokens // whole)
        return thinking, room - thinking

    def _split(self, query: Query, sampling: SamplingParams) -> tuple[int, int]:
        """The tokens of the thought and of the answer of one prompt."""
        marks = self._num_marks
        room = sampling.max_new_tokens - marks
        positions = self.num_positions() if query.token_ids else None
        if positions is not None:
            room = min(room, positions - len(query.token_ids) - marks)
        if room < 1:
            raise ValueError(
                f"nothing is left for an answer: the prompt has {len(query.token_ids)} tokens, the marks {marks}, "
                f"max_new_tokens is {sampling.max_new_tokens}"
                + ("" if positions is None else f", and the model has {positions} positions")
                + ": raise max_new_tokens, or shorten the prompt"
            )
        return self._shares(room)


def _limited(sampling: SamplingParams, most: int) -> SamplingParams:
    return replace(sampling, max_new_tokens=most, min_new_tokens=min(sampling.min_new_tokens, most))
