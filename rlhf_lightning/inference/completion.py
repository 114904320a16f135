"""Completions: the finished result, and the sample while it grows token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..data import text_tokens
from .sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


def readable(text: str) -> str:
    r"""Makes a text valid UTF-8: JSON may hold lone surrogates, which tokenizers reject.

    Example:
        >>> readable("a\ud83d\ude00b\ud800") == "a\N{GRINNING FACE}b\N{REPLACEMENT CHARACTER}"
        True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Thought:
    """A thought before an answer.

    Attributes:
        text: what stands between the marks.
        passage: what the policy reads before the answer: the thought with its marks, and blanks.
        token_ids: tokens of the thought with its marks, up to the one that ends the closing mark; empty if they are
            not known.
        logprobs: of each of them under the sampling distribution, 0 for written ones; empty if they are not known.
        written: places of tokens that were written and not sampled: the opening mark, and the closing one of a thought
            that was cut off.
        closed: whether the policy has closed the thought itself.
        lead: first characters of the answer, if the token that ends the closing mark holds some.
    """

    text: str
    passage: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    written: tuple[int, ...] = ()
    closed: bool = False
    lead: str = ""

    def __str__(self) -> str:
        """Returns its text."""
        return self.text


@dataclass(frozen=True)
class Completion:
    """A sampled continuation of a prompt.

    Attributes:
        token_ids: the sampled tokens; the end-of-sequence token is the last of them where it was sampled.
        text: the tokens as text without special tokens, cut before a stop string; empty without a tokenizer.
        logprobs: per token, its log-probability under the sampling distribution, temperature and filters included: the
            denominator of importance ratios. 0 for greedy tokens.
        finish_reason: ``"stop"`` after an end-of-sequence token, a stop token or a stop string, ``"length"`` at the
            limit of new tokens or of the model's positions.
        model_logprobs: per token, under the unmodified model; ``None`` unless the sampling settings ask for them.
        thought: of a strategy that thinks: the first tokens are those of the thought, the text is that of the answer.

    Example:
        >>> answer = Completion([52, 0], "4", [-0.5, -0.1], "stop")
        >>> answer.text, sum(answer.logprobs)
        ('4', -0.6)
    """

    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: FinishReason
    model_logprobs: list[float] | None = None
    thought: Thought | None = None

    @property
    def num_sampled(self) -> int:
        """Number of tokens that were sampled, and not written."""
        return len(self.token_ids) - (0 if self.thought is None or not self.token_ids else len(self.thought.written))


def decode(tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]) -> str:
    """Decodes tokens that continue a prompt, without special tokens and with all blanks unchanged."""
    return "" if tokenizer is None else text_tokens.decode(tokenizer, token_ids)


class GrowingText:
    """The text of a completion while it grows.

    A token may be part of a character, and its text may depend on the token before it, so text is taken from the
    difference of two decodings that start at the same earlier token.

    Args:
        tokenizer: decodes the tokens.

    Attributes:
        text: of all tokens so far, whole characters only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self._start = 0
        self._read = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes all tokens so far, at least as many as last time; returns the text that was added."""
        # Only the last tokens are decoded again, since a token can change the text of its neighbours only.
        before = decode(self.tokenizer, token_ids[self._start : self._read])
        after = decode(self.tokenizer, token_ids[self._start :])
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        added = after[len(before) :]
        self.text += added
        self._start, self._read = self._read, len(token_ids)
        return added


class StopFinder:
    """Finds stop strings in a completion while it grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.stop = stop
        self._grown = GrowingText(tokenizer)
        self._reach = max(len(string) for string in stop) - 1

    @property
    def text(self) -> str:
        """The text so far, a stop string included."""
        return self._grown.text

    def push(self, token_ids: Sequence[int]) -> str | None:
        """Takes all tokens so far, one more than last time; returns the text before a stop string once there is one."""
        # A stop string may have begun in earlier tokens.
        searched_from = max(0, len(self.text) - self._reach)
        if not self._grown.push(token_ids):
            return None
        text = self.text
        found = [at for string in self.stop if (at := text.find(string, searched_from)) >= 0]
        return text[: min(found)] if found else None


class Request:
    """One sample while it is generated.

    Args:
        prompt: its prompt's tokens.
        position: the numbers of the prompt and of the sample.
        seed: seed of its uniforms.
        limit: maximum number of new tokens.
        params: the sampling settings.
        stop_ids: tokens that end it.
        tokenizer: decodes tokens; without one the text is empty.
        watch: called with the sample after every token.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        position: tuple[int, int],
        seed: int,
        limit: int,
        params: SamplingParams,
        stop_ids: frozenset[int],
        tokenizer: PreTrainedTokenizerBase | None,
        watch: Callable[[Request], object] | None = None,
    ) -> None:
        self.prompt = prompt
        self.position = position
        self.seed = seed
        self.limit = limit
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._watch = watch
        self._finder = StopFinder(tokenizer, params.stop) if params.stop and tokenizer is not None else None
        self._text: str | None = None

    def push(self, token: int, logprob: float, model_logprob: float | None) -> None:
        """Appends a token, and sets ``finish_reason`` if it is the last."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if model_logprob is not None:
            self.model_logprobs.append(model_logprob)
        early = len(self.token_ids) < self._params.min_new_tokens
        if self._finder is not None:
            text = self._finder.push(self.token_ids)
            if text is not None and not early:
                self._text = text
                self.finish_reason = "stop"

        # A stop token ends the sample even where its text does not show.
        if token in self._stop_ids and not early:
            self.finish_reason = "stop"
        elif self.finish_reason is None and len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self._watch is not None:
            self._watch(self)

    def completion(self) -> Completion:
        """The finished sample."""
        text = self._text if self._text is not None else decode(self._tokenizer, self.token_ids)
        model_logprobs = self.model_logprobs if self._params.model_logprobs else None
        return Completion(self.token_ids, text, self.logprobs, self.finish_reason or "length", model_logprobs)
