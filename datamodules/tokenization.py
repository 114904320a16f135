"""Rows in normal form become token trees: prompt and completions apart, chat through the tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import jinja2
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from ..sequences.example import Example, Segment
from .formats import Row
from .messages import Messages
from .values import check_encodable, end_step

if TYPE_CHECKING:
    TokenizerSource: TypeAlias = str | PreTrainedTokenizerBase
else:
    # No class is among them: the command line would open a file named here as the configuration of an object of it.
    TokenizerSource = str

OnTooLong = Literal["drop", "truncate_end", "truncate_start", "error"]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TooLongError(ValueError):
    """A sequence has more tokens than it may have, and that is to be an error."""


class RowTokenizer:
    """Makes token trees of rows.

    A prompt and its completions are tokenised apart: joint tokenisation lets a completion change the prompt's last
    token, and generation never sees that token. Whatever the tokenizer puts in front of a text (a beginning-of-sequence
    token) goes in front of the prompt; an empty prompt is the beginning-of-sequence token, or else the end-of-sequence
    token. The end-of-sequence token closes every completion once and is scored. Of a chat, what the template writes
    behind the last end-of-sequence token (a line's end) is left out: no model is asked to generate it.

    Args:
        tokenizer: with an end-of-sequence token, and with a chat template if rows hold messages.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.

    Example:
        ``RowTokenizer(tokenizer).answers(Row("2+2=", ("4",)))`` is a segment of the prompt's tokens with one child, the
        tokens of ``4`` and of the end of the sequence, each of weight 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token: set tokenizer.eos_token to the one that ends an answer"
            )
        self.tokenizer = tokenizer
        self.eos = cast(int, tokenizer.eos_token_id)
        bare, dressed = self._encode("a"), list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self.opening = dressed[:at]

    @property
    def first_tokens(self) -> list[int]:
        """What a text begins with that a cut should leave: what the tokenizer opens it with, or a template may."""
        bos = self.tokenizer.bos_token_id
        return self.opening or ([] if bos is None else [cast(int, bos)])

    def answers(self, row: Row, *, assistant_only: bool = True, prompt_loss: bool = False) -> Segment:
        """Makes the tree of a prompt with its completions.

        Args:
            row: with at least one completion.
            assistant_only: give weight 0 to what others than the assistant say within a completion of several messages.
            prompt_loss: score the prompt too, from its second token.

        Returns:
            The prompt with one child per completion.

        Raises:
            ValueError: for a chat prompt with which the rendered conversation does not begin, and for a template's
                errors.
        """
        prompt = self.prompt(row)
        children = []
        for completion in row.completions:
            if isinstance(completion, str):
                tokens = self._encode(completion)
                closed = tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos]
                children.append(Segment(_array(closed), np.ones(len(closed), np.float32)))
            else:
                children.append(self._turns(row, prompt, completion, assistant_only))
        weights = _all_but_first(len(prompt)) if prompt_loss else None
        return Segment(_array(prompt), weights, tuple(children))

    def whole(self, row: Row, *, assistant_only: bool = True) -> Segment:
        """Makes the one segment of a row that is all text or all conversation.

        Args:
            row: without completions.
            assistant_only: score only what the assistant says in a conversation; otherwise all but the first token.

        Returns:
            A segment without children, closed by the end-of-sequence token.

        Raises:
            ValueError: if nothing in it is scored.
        """
        if isinstance(row.prompt, str):
            tokens = self._opened(self._encode(row.prompt))
            tokens = tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos]
            mask = [1] * len(tokens)
        else:
            tokens, mask = self._conversation(row.prompt, row.template, assistant_only)
            if row.prompt[-1]["role"] == "assistant" or not assistant_only:
                tokens, mask = self._closed(tokens, mask)
        weights = np.asarray(mask, np.float32)
        weights[0] = 0.0
        if not weights.any():
            raise ValueError("no token to learn from: expected a message of role 'assistant' with some content")
        # What stands behind the last scored token cannot change a loss.
        stop = int(np.flatnonzero(weights)[-1]) + 1
        return Segment(_array(tokens[:stop]), weights[:stop])

    def prompt(self, row: Row) -> list[int]:
        """The tokens of a row's prompt, as they are fed to a model that is to answer it."""
        if isinstance(row.prompt, str) or not row.prompt:
            tokens = self._opened(self._encode(cast(str, row.prompt))) if row.prompt else list(self.opening)
            bos = self.tokenizer.bos_token_id
            return tokens or [self.eos if bos is None else cast(int, bos)]
        return self._encode(self._render_prompt(row.prompt, row.template))

    def steps(self, row: Row, separator: str) -> Segment:
        """Makes the tree of a prompt with a solution in steps.

        Args:
            row: whose completions are the steps, as strings.
            separator: what ends each step.

        Returns:
            The prompt with one child, the steps one after the other; the last token of each step has weight 1, all
            others 0, so that the scored tokens are the places where the row's labels belong, in their order.
        """
        prompt = self.prompt(row)
        tokens: list[int] = []
        weights: list[float] = []
        for step in row.completions:
            ids = self._encode(end_step(cast(str, step), separator))
            tokens += ids
            weights += [0.0] * (len(ids) - 1) + [1.0]
        return Segment(_array(prompt), None, (Segment(_array(tokens), np.asarray(weights, np.float32)),))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(check_encodable(text), add_special_tokens=False, verbose=False)["input_ids"])

    def _opened(self, tokens: list[int]) -> list[int]:
        # A prompt that was rendered by hand may carry its opening already.
        return tokens if tokens[: len(self.opening)] == self.opening else self.opening + tokens

    def _closed(self, tokens: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Ends a chat with a scored end-of-sequence token, its own if nothing but blanks stands behind it."""
        stop = max((i + 1 for i, token in enumerate(tokens) if token == self.eos), default=0)
        if stop and not str(self.tokenizer.decode(tokens[stop:])).strip():
            return tokens[:stop], [*mask[: stop - 1], 1]
        return [*tokens, self.eos], [*mask, 1]

    def _turns(self, row: Row, prompt: list[int], completion: Messages, assistant_only: bool) -> Segment:
        """Tokenises what a template makes of a prompt's continuation."""
        history = cast(Messages, row.prompt)
        text = self._render([*history, *completion], row.template)
        tokens = self._encode(text)
        mixed = assistant_only and any(message["role"] != "assistant" for message in completion)
        if not history:
            # With nothing before it the conversation has to start from a token of its own.
            rest, mask = tokens, [1] * len(tokens)
            if mixed:
                rest, mask = self._conversation(completion, row.template, True)
        elif tokens[: len(prompt)] == prompt:
            rest, mask = tokens[len(prompt) :], [1] * (len(tokens) - len(prompt))
            if mixed:
                mask = self._conversation([*history, *completion], row.template, True)[1][len(prompt) :]
        else:
            rest = self._encode(self._behind_prompt(text, row))
            mask = [1] * len(rest)
            if mixed:
                raise ValueError(
                    "the prompt's tokens are not the first tokens of the whole conversation, so that the assistant's "
                    "later tokens cannot be told from others: write completions of one assistant message"
                )
        rest, mask = self._closed(rest, mask)
        return Segment(_array(rest), np.asarray(mask, np.float32))

    def _behind_prompt(self, text: str, row: Row) -> str:
        prompt = self._render_prompt(cast(Messages, row.prompt), row.template)
        if not text.startswith(prompt):
            at = next(i for i in range(len(prompt)) if text[i : i + 1] != prompt[i])
            raise ValueError(
                "the rendered prompt is not the beginning of the rendered conversation (they part at "
                f"{prompt[at : at + 20]!r} and {text[at : at + 20]!r}): expected a chat template that leaves earlier "
                "messages as they are when later ones follow"
            )
        return text[len(prompt) :]

    def _conversation(
        self, messages: Messages, template: dict[str, Any], assistant_only: bool
    ) -> tuple[list[int], list[int]]:
        """Tokenises a whole conversation and marks what the assistant says."""
        if not assistant_only:
            tokens = self._encode(self._render(messages, template))
            return tokens, [1] * len(tokens)
        if _GENERATION_MARK.search(self._chat_template(template)):
            rendered = self._apply(
                messages, template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            tokens, mask = list(rendered["input_ids"]), list(rendered["assistant_masks"])
        else:
            text = self._render(messages, template)
            encoded = self.tokenizer(
                check_encodable(text), add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            tokens, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
            mask = [0] * len(tokens)
            for begin, end in self._spans(messages, template, text):
                mask = [int(flag or begin <= start < end) for flag, start in zip(mask, starts, strict=True)]
        return tokens, self._mended(tokens, mask)

    def _spans(self, messages: Messages, template: dict[str, Any], text: str) -> list[tuple[int, int]]:
        """Where in the rendering each assistant message stands, found by rendering the conversation up to it."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render_prompt(messages[:index], template, resume=False) if index else ""
            up_to = self._render(messages[: index + 1], template)
            if not (up_to.startswith(before) and text.startswith(up_to)):
                raise ValueError(
                    f"message {index + 1} is rendered otherwise when others follow it, so that what the assistant says "
                    "cannot be told from the rest: put {% generation %} marks into the chat template, or set "
                    "assistant_only_loss=False"
                )
            spans.append((len(before), len(up_to)))
        return spans

    def _mended(self, tokens: Sequence[int], mask: Sequence[int]) -> list[int]:
        """Scores the end-of-sequence token of each turn, and no blanks that the template writes behind it."""
        mended = list(mask)
        for index, token in enumerate(tokens):
            if token == self.eos and index and mended[index - 1]:
                mended[index] = 1
                after = index + 1
                while after < len(tokens) and mended[after] and not str(self.tokenizer.decode([tokens[after]])).strip():
                    mended[after] = 0
                    after += 1
        return mended

    def _render_prompt(self, messages: Messages, template: dict[str, Any], resume: bool = True) -> str:
        # An assistant message at the end of a prompt is the beginning of the answer.
        if resume and messages[-1]["role"] == "assistant":
            return self._render(messages, template, continue_final_message=True)
        return self._render(messages, template, add_generation_prompt=True)

    def _render(self, messages: Messages, template: dict[str, Any], **options: Any) -> str:
        return str(self._apply(messages, template, tokenize=False, **options))

    def _apply(self, messages: Messages, template: dict[str, Any], **options: Any) -> Any:
        self._chat_template(template)
        try:
            return self.tokenizer.apply_chat_template(messages, **options, **template)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the row: {' '.join(str(error).split())}") from error

    def _chat_template(self, template: dict[str, Any]) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the row holds chat messages but the tokenizer has no chat template: give it one "
                "(tokenizer.chat_template, or chat_template.jinja in its folder) or write strings"
            )
        return str(self.tokenizer.get_chat_template(tools=template.get("tools")))


def fit(
    example: Example, max_length: int | None, on_too_long: OnTooLong, opening: Sequence[int] = ()
) -> tuple[Example | None, bool]:
    """Brings an example within a length.

    An example is measured by its longest sequence, so a pair by the longer of prompt+chosen and prompt+rejected.
    Cutting the start takes from the prompt, as much for all completions, behind the tokens that open every text (a
    beginning-of-sequence token); cutting the end takes from the completions, with their end-of-sequence token. What
    loses its last prompt token, all its scored tokens, or what told its completions apart is dropped.

    Args:
        example: a prompt with its completions, or one segment alone.
        max_length: tokens that a sequence may have; ``None`` = any number.
        on_too_long: what to do with a longer one.
        opening: tokens that stay where a prompt begins with them and its start is cut.

    Returns:
        The example to keep (``None`` = drop it), and whether it was cut.

    Raises:
        TooLongError: with ``on_too_long="error"``.

    Example:
        >>> pair = Segment([1, 2, 3], children=(Segment([4, 5], [1, 1]), Segment([6], [1])))
        >>> shorter, cut = fit(Example("rows:1", pair), 4, "truncate_start")
        >>> shorter.root.tokens.tolist(), cut
        ([2, 3], True)
    """
    length = longest(example.root)
    if max_length is None or length <= max_length:
        return example, False
    if on_too_long == "error":
        raise TooLongError(
            f"{length} tokens, expected at most max_length={max_length}: raise it, shorten the row or set on_too_long"
        )
    if on_too_long == "drop":
        return None, False
    cut = (
        _cut_start(example.root, length - max_length, list(opening))
        if on_too_long == "truncate_start"
        else _cut_end(example.root, max_length)
    )
    if cut is None or (_scored(example.root) and not all(any(_scored(part) for part in path) for path in cut.paths())):
        return None, False
    contents = [child.tokens.tobytes() for child in cut.children]
    if len(set(contents)) < len(contents):
        return None, False
    return Example(example.row_id, cut, example.fields), True


def longest(root: Segment) -> int:
    """The tokens of the longest sequence of a tree.

    Example:
        >>> longest(Segment([1, 2], children=(Segment([3]), Segment([4, 5]))))
        4
    """
    return len(root.tokens) + max((longest(child) for child in root.children), default=0)


def _cut_start(root: Segment, excess: int, opening: list[int]) -> Segment | None:
    kept = len(opening) if root.tokens[: len(opening)].tolist() == opening else 0
    if len(root.tokens) - kept <= excess:
        return None
    gone = slice(kept, kept + excess)
    weights = None if root.weights is None else np.delete(root.weights, gone)
    if weights is not None:
        weights[0] = 0.0
    return Segment(np.delete(root.tokens, gone), weights, root.children)


def _cut_end(root: Segment, max_length: int) -> Segment | None:
    room = max_length - len(root.tokens)
    if not root.children:
        return Segment(root.tokens[:max_length], None if root.weights is None else root.weights[:max_length])
    if room <= 0:
        return None
    children = tuple(
        Segment(child.tokens[:room], None if child.weights is None else child.weights[:room]) for child in root.children
    )
    return Segment(root.tokens, root.weights, children)


def _scored(segment: Segment) -> bool:
    own = segment.weights is not None and bool(segment.weights.any())
    return own or any(_scored(child) for child in segment.children)


def _array(tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(tokens, dtype=np.int64)


def _all_but_first(length: int) -> npt.NDArray[np.float32]:
    weights = np.ones(length, np.float32)
    weights[0] = 0.0
    return weights
