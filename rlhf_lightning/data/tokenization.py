"""Turns rows in normal form into token trees: prompt and completions separately, chats turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..sequences.branching import WeightedPath, Weights, grow_tree
from ..sequences.example import Segment
from ..utils.packaged_configs import packaged_config
from .cell_checks import end_step
from .chat_template import ChatTemplate, Turn, is_begun, with_turn
from .formats import Row
from .lengths import OnTooLong, TooLongError, fit_to_length, has_equal_sequences, longest
from .messages import Messages, check_no_tools, check_rendered
from .text_tokens import encode, opening_tokens, prompt_tokens

if TYPE_CHECKING:
    TokenizerSource: TypeAlias = str | PreTrainedTokenizerBase
else:
    # Without classes: the command line would parse a file named here as the configuration of such an object.
    TokenizerSource = str

__all__ = [
    "OnTooLong",
    "RowTokenizer",
    "TooLongError",
    "Turns",
    "fit_to_length",
    "has_equal_sequences",
    "load_tokenizer",
    "longest",
]

Turns = Literal["all", "last"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: a folder, a packaged one such as ``configs/models/nano``, or a hub id.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(packaged_config(name) or name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load tokenizer={name!r} ({' '.join(str(error).split())[:160]}): "
            "give a folder that has tokenizer.json, or a hub id"
        ) from error
    return loaded


class RowTokenizer:
    """Makes token trees of rows.

    A prompt and its completions are tokenised separately: joint tokenisation lets a completion change the prompt's
    last token, and generation never sees that token. Tokens that the tokenizer puts before a text (a
    beginning-of-sequence token) go before the prompt, and no space before its continuation; an empty prompt is the
    beginning-of-sequence token, or else the end-of-sequence token. The end-of-sequence token closes every completion
    once and is scored.

    In a chat, each turn of the assistant is scored in the context in which it is generated: after the template's
    rendering of everything before it, generation prompt included. Turns whose contexts extend one another are one
    path; where the template renders earlier turns differently (say, without reasoning), paths fork. A turn ends with
    the first added token of the vocabulary that the template writes after its content; without one, the
    end-of-sequence token is added. Text that the template writes after that is context: it is never generated.

    Args:
        tokenizer: must have an end-of-sequence token, and a chat template if rows hold messages.
        chat_template_kwargs: passed to the chat template; a row's own settings override them by name.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.

    Example:
        ``RowTokenizer(tokenizer).answers(Row("2+2=", ("4",)))`` is a segment of the prompt's tokens with one child, the
        tokens of ``4`` and of the end of the sequence, each of weight 1.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token: set tokenizer.eos_token to the one that ends an answer"
            )
        self.tokenizer = tokenizer
        self.eos = cast(int, tokenizer.eos_token_id)
        self.opening = opening_tokens(tokenizer)
        self.chat = ChatTemplate(tokenizer, chat_template_kwargs)

    @property
    def first_tokens(self) -> list[int]:
        """Opening tokens that a cut should keep: those of the tokenizer, else the beginning-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        return self.opening or ([] if bos is None else [cast(int, bos)])

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end trained answers: those of the chat template, then the end-of-sequence token."""
        return list(dict.fromkeys([*self.chat.end_tokens(), self.eos]))

    def answers(
        self, row: Row, *, assistant_only: bool = True, prompt_loss: bool = False, turns: Turns = "all"
    ) -> Segment:
        """Makes the tree of a prompt with its completions.

        Args:
            row: with at least one completion.
            assistant_only: within a completion of several messages, give weight 0 to all but the assistant's.
            prompt_loss: score the prompt too, from its second token.
            turns: the assistant's turns of a completion to score: ``all``, or the ``last``.

        Returns:
            The prompt with one child per completion; or, where the contexts of a completion's turns do not begin with
            the prompt, their common prefix, with one sequence per completion.

        Raises:
            ValueError: for a completion without a token to learn, and for a template's errors.
        """
        if all(isinstance(completion, str) for completion in row.completions):
            prompt = np.asarray(self.prompt(row))
            children = [self._text_answer(cast(str, completion), bool(row.prompt)) for completion in row.completions]
            return Segment(prompt, _all_but_first(len(prompt)) if prompt_loss else None, children)

        # Chats: the trunk is what the first completion sees before its first scored token.
        history = cast(Messages, row.prompt)
        sequences = [self._completion(row, cast(Messages, c), assistant_only, turns) for c in row.completions]
        trunk = sequences[0][0][0][: _first_scored(sequences[0][0][1])]
        if not history:
            trunk = np.asarray(self.prompt(row))
        # The first token has no prediction. Earlier turns of a completion that are not learnt belong to no prompt.
        if prompt_loss:
            scored = min(len(trunk), len(self.prompt(row)))
            for (_, weights), *_ in sequences:
                weights[1:scored] = 1.0
        return grow_tree(sequences, trunk)

    def whole(self, row: Row, *, assistant_only: bool = True, turns: Turns = "all") -> Segment:
        """Makes the tree of a row that is all text or all conversation.

        Args:
            row: without completions.
            assistant_only: score only the assistant's messages of a conversation; otherwise all but the first token of
                the whole conversation as the template renders it.
            turns: the assistant's turns to score: ``all``, or the ``last``.

        Returns:
            One segment, closed by the end-of-sequence token or that of the template; or a tree, where the contexts of
            turns do not extend one another.

        Raises:
            ValueError: if nothing in it is scored.
        """
        if isinstance(row.prompt, str):
            check_no_tools(row.template)
            tokens = np.asarray(self._closed(prompt_tokens(self.tokenizer, row.prompt)))
            paths = [(tokens, np.ones(len(tokens), np.float32))]
        elif assistant_only:
            spoken = [n for n, message in enumerate(row.prompt) if _is_learnt(message)]
            spoken = spoken[-1:] if turns == "last" else spoken
            paths = self._turns(row.prompt, spoken, row.template, marked=True)
        else:
            paths = [self._rendering(row.prompt, row.template)]
        for _, weights in paths:
            weights[0] = 0.0  # nothing comes before it

        # Turns without a scored token, such as those of weight 0, teach nothing.
        paths = [_trimmed(path) for path in paths if path[1].any()]
        if not paths:
            raise ValueError("no token to learn from: expected a message of role 'assistant' with some content")
        return grow_tree([paths])

    def prompt(self, row: Row) -> list[int]:
        """Returns the tokens of a row's prompt, as fed to a model that answers it."""
        if isinstance(row.prompt, str):
            check_no_tools(row.template)
        if isinstance(row.prompt, str) or not row.prompt:
            return prompt_tokens(self.tokenizer, cast(str, row.prompt or ""))
        text = self.chat.context(row.prompt, row.template)
        check_rendered(row.prompt, self.chat.merged(row.template), text)
        return encode(self.tokenizer, text)

    def steps(self, row: Row, separator: str) -> Segment:
        """Makes the tree of a prompt with a solution in steps.

        Args:
            row: whose completions are the steps, as strings.
            separator: the text that ends each step.

        Returns:
            The prompt with one child, the steps one after the other; the last token of each step has weight 1, all
            others 0, so that the scored tokens match the row's labels in order.
        """
        prompt = self.prompt(row)
        tokens: list[int] = []
        weights: list[float] = []
        for step in row.completions:
            ids = self.continued(end_step(cast(str, step), separator))
            tokens += ids
            weights += [0.0] * (len(ids) - 1) + [1.0]
        return Segment(np.asarray(prompt), None, (Segment(np.asarray(tokens), np.asarray(weights, np.float32)),))

    def step_pair(self, chosen: Row, rejected: Row, separator: str) -> Segment:
        """Makes the tree of a prompt with two solutions in steps, the chosen one first; see :meth:`steps`."""
        trees = [self.steps(row, separator) for row in (chosen, rejected)]
        return Segment(trees[0].tokens, None, [child for tree in trees for child in tree.children])

    def continued(self, text: str) -> list[int]:
        """Tokenizes a text that continues another one."""
        return encode(self.tokenizer, text, continues=True)

    def ended(self, token_ids: Sequence[int], *, chat: bool, template: Mapping[str, Any] | None = None) -> list[int]:
        """Closes sampled tokens once with the end that a trained answer has, whatever ended them.

        Args:
            token_ids: an answer's, with or without the token that ended it.
            chat: whether it answers a chat, so that the template determines its end.
            template: the row's settings for the template.

        Example:
            With a template that ends turns by ``<end_of_turn>``, the tokens of ``4``, ``4<end_of_turn>`` and ``4<eos>``
            all become those of ``4<end_of_turn>``.
        """
        own_ends = set(self.chat.end_tokens()) if chat else set()
        stop = next((n for n, token in enumerate(token_ids) if token in own_ends | {self.eos}), len(token_ids))
        rest = [token for token in token_ids[stop:] if token not in own_ends | {self.eos}]
        if str(self.tokenizer.decode(rest)).strip():  # words follow, so this is not the end
            return self._closed(list(token_ids))

        # Sampled up to the template's own end.
        if stop < len(token_ids) and token_ids[stop] in own_ends - {self.eos}:
            return list(token_ids[: stop + 1])

        # Cut off, or ended by the end-of-sequence token: append the template's end, which may have begun already.
        body, end = list(token_ids[:stop]), self._end(template) if chat else [self.eos]
        if len(end) > 1 and body[1 - len(end) :] == end[:-1]:
            body = body[: 1 - len(end)]
        return body + end

    def _end(self, template: Mapping[str, Any] | None) -> list[int]:
        """Returns the tokens with which the template ends an answer."""
        text, ended = self.chat.cut(self.chat.ending(template) or "", template)
        tokens = self.continued(text) if text else []
        return tokens if ended else [*tokens, self.eos]

    def _closed(self, tokens: list[int]) -> list[int]:
        return tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos]

    def _text_answer(self, completion: str, continues: bool) -> Segment:
        tokens = self._closed(encode(self.tokenizer, completion, continues=continues))
        return Segment(np.asarray(tokens), np.ones(len(tokens), np.float32))

    def _completion(self, row: Row, completion: Messages, assistant_only: bool, turns: Turns) -> list[WeightedPath]:
        """Makes the paths of a completion: one for each turn of the assistant."""
        history, begun = cast(Messages, row.prompt), None
        if is_begun(history) and is_begun(completion[:1]):
            # The prompt ends with the first words of the answer.
            begun = str(history[-1]["content"])
            *history, joined = with_turn(history, completion[0])
            completion = [joined, *completion[1:]]
        messages = [*history, *completion]
        mixed = any(message["role"] != "assistant" for message in completion)
        if mixed and not assistant_only:
            everything = self._behind_prompt(row, messages)
            if everything is not None:
                return [everything]
        spoken = [n for n in range(len(history), len(messages)) if _is_learnt(messages[n])]
        spoken = spoken[-1:] if turns == "last" else spoken
        paths = self._turns(messages, spoken, row.template, marked=mixed, begun=(len(history), begun))
        paths = [path for path in paths if path[1].any()]
        if not paths:
            raise ValueError("no token to learn from: expected a message of role 'assistant' with some content")
        if not history:
            # Without a prompt, the conversation needs a token to be predicted from.
            start = np.asarray(self.prompt(row))
            unscored = np.zeros(len(start), np.float32)
            paths = [(np.concatenate([start, t]), np.concatenate([unscored, w])) for t, w in paths]
        return paths

    def _behind_prompt(self, row: Row, messages: Messages) -> WeightedPath | None:
        """Scores all of a rendered conversation after its prompt; ``None`` if it does not begin with the prompt."""
        prompt = self.prompt(row)
        tokens, weights = self._rendering(messages, row.template)
        if not row.prompt:
            return np.concatenate([prompt, tokens]), np.concatenate([np.zeros(len(prompt), np.float32), weights])
        if tokens[: len(prompt)].tolist() != prompt:
            return None
        weights[: len(prompt)] = 0.0
        return tokens, weights

    def _rendering(self, messages: Messages, template: dict[str, Any]) -> WeightedPath:
        """Tokenizes a conversation as the template renders it; scores all but the messages of weight 0."""
        text, ended = self.chat.cut(self.chat.render(messages, template), template)
        tokens = encode(self.tokenizer, text)
        weights = np.ones(len(tokens), np.float32)

        # A message's tokens are those between two renderings, with and without it.
        for number, message in enumerate(messages):
            if message.get("weight") == 0:
                start = encode(self.tokenizer, self.chat.render(messages[:number], template)) if number else []
                stop = encode(self.tokenizer, self.chat.render(messages[: number + 1], template))
                if tokens[: len(start)] != start or tokens[: len(stop)] != stop[: len(tokens)]:
                    raise ValueError(
                        f"message {number + 1} has weight 0, and the chat template renders it otherwise when others "
                        "follow it, so that its tokens cannot be found: set assistant_only_loss=True"
                    )
                weights[len(start) : len(stop)] = 0.0

        # The end of the last turn is scored as the turn is.
        if not ended and tokens[-1:] != [self.eos]:
            tokens, weights = [*tokens, self.eos], np.append(weights, weights[-1])
        return np.asarray(tokens), weights

    def _turns(
        self,
        messages: Messages,
        spoken: Sequence[int],
        template: dict[str, Any],
        *,
        marked: bool,
        begun: tuple[int, str | None] = (0, None),
    ) -> list[WeightedPath]:
        """Makes the paths of a conversation's turns, each after its context.

        Args:
            messages: the conversation.
            spoken: indices of the messages to learn.
            template: the row's settings.
            marked: whether the template's marks, if it has any, select the scored tokens of a turn.
            begun: the index of a message, and its first words, which belong to its context.
        """
        paths, text = [], None
        for number in spoken:
            so_far = messages[: number + 1]
            turn = self.chat.turn(so_far, template, begun=begun[1] if number == begun[0] else None)
            paths.append(self._path(turn, self.chat.marks(so_far, template) if marked else None))
            text = turn.context + turn.answer

        # Once, on the longest context: it contains all earlier messages.
        if text is not None:
            check_rendered(messages[: spoken[-1] + 1], self.chat.merged(template), text)
        return paths

    def _path(self, turn: Turn, marks: tuple[list[int], list[int]] | None) -> WeightedPath:
        """Tokenizes a turn after its context; marks are the rendering's tokens and the mask of scored ones."""
        context = encode(self.tokenizer, turn.context) if turn.context else []
        tokens = encode(self.tokenizer, turn.context + turn.answer)
        # Tokens may merge across the boundary; generation never does that, so they are tokenized separately.
        if tokens[: len(context)] != context:
            tokens = context + self.continued(turn.answer)
        weights = [0.0] * len(context) + [1.0] * (len(tokens) - len(context))
        if marks is not None and marks[0][: len(tokens)] == tokens:
            weights[len(context) :] = [float(mark) for mark in marks[1][len(context) : len(tokens)]]
            # Templates differ in whether their marks include the token that ends the turn.
            if len(weights) > 1 and turn.ended:
                weights[-1] = max(weights[-1], weights[-2])
        if not turn.ended and tokens[-1:] != [self.eos]:
            tokens, weights = [*tokens, self.eos], [*weights, weights[-1]]
        return np.asarray(tokens), np.asarray(weights, np.float32)


def _is_learnt(message: Mapping[str, Any]) -> bool:
    """Tells whether a message is the assistant's and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _trimmed(path: WeightedPath) -> WeightedPath:
    """Cuts a path after its last scored token: later tokens cannot change a loss."""
    tokens, weights = path
    stop = _last_scored(weights) + 1
    return tokens[:stop], weights[:stop]


def _first_scored(weights: Weights) -> int:
    return int(np.flatnonzero(weights)[0])


def _last_scored(weights: Weights) -> int:
    return int(np.flatnonzero(weights)[-1])


def _all_but_first(length: int) -> Weights:
    weights = np.ones(length, np.float32)
    weights[0] = 0.0
    return weights
