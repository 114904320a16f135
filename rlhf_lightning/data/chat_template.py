"""Renders chats as text: the context that a model sees before each of its turns, and the answer it learns to write.

The template decides. The context of a turn is the template's rendering of everything before it, generation prompt
included; the answer is the rest of the rendering of the conversation up to and including the turn.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from .messages import Messages, arguments_of, in_blocks, with_text_arguments
from .text_tokens import shared_prefix

Settings = Mapping[str, Any]

# A character for private use replaces a message's content, to find where the template puts it.
_CONTENT = "\ue0f0"
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_OPENING_TAG = re.compile(r"(<)([^<>/\s]+)(>)\s*\Z|(\[)([^\[\]/\s]+)(\])\s*\Z")


class Turn(NamedTuple):
    """A turn of the assistant.

    Args:
        context: the text that the model is given.
        answer: the text that it should write, its end included.
        ended: whether the answer ends with a token of the template; otherwise an end-of-sequence token must be added.
    """

    context: str
    answer: str
    ended: bool


class ChatTemplate:
    r"""A tokenizer's chat template with the settings of a data set.

    Args:
        tokenizer: must have a chat template to render anything.
        settings: passed to the template; a row's own settings override them by name.

    Example:
        ``ChatTemplate(tokenizer).turn([{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}])`` is
        ``("<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>", True)`` with ChatML.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = dict(settings or {})
        self._endings: dict[str, str | None] = {}
        self._blocks: dict[str, bool] = {}
        self._text_arguments: dict[str, bool] = {}
        self._ends: dict[str, list[int]] = {}
        self._controls: tuple[int, re.Pattern[str]] | None = None
        self._warned = False

    def merged(self, own: Settings | None) -> dict[str, Any]:
        """Merges a row's own settings over those of the data set."""
        return {**self.settings, **(own or {})}

    def render(self, messages: Sequence[Mapping[str, Any]], own: Settings | None = None, **options: Any) -> str:
        """Renders messages with the template.

        Args:
            messages: with string contents.
            own: the row's settings, ``tools`` among them.
            options: passed to ``apply_chat_template``.

        Raises:
            ValueError: the tokenizer has no template, or it refuses the messages.
        """
        return str(self._apply(messages, self.merged(own), tokenize=False, **options))

    def context(self, messages: Sequence[Mapping[str, Any]], own: Settings | None = None) -> str:
        """Renders the text from which a model answers messages, or continues the assistant's last one.

        Args:
            messages: at least one.
            own: the row's settings.
        """
        if not is_begun(messages):
            return self.render(messages, own, add_generation_prompt=True)
        begun = str(messages[-1]["content"])
        # Nothing has been written yet: the answer begins where any other would.
        if not begun.strip():
            return self._before(messages[:-1], own)
        try:
            return self.render(messages, own, continue_final_message=True)
        except ValueError:
            # The template does not render the words verbatim: append them where they would be generated.
            before = self._before(messages[:-1], own)
            return before + _behind(begun, self._opened(before, messages[:-1], own))

    def turn(
        self, messages: Sequence[Mapping[str, Any]], own: Settings | None = None, *, begun: str | None = None
    ) -> Turn:
        """Splits the last message, the assistant's, from the context in which it is generated.

        Args:
            messages: the conversation up to and including it.
            own: the row's settings.
            begun: the words with which its content begins that are given to the model.

        Raises:
            ValueError: the template refuses the conversation, omits the message, or begins it differently from its
                generation prompt.
        """
        *history, message = messages
        whole = self.render(messages, own)

        # A begun answer: the model continues its words, so they belong to the context.
        if begun:
            context = self.context([*history, {**message, "content": begun}], own)
            if whole.startswith(context):
                answer = whole[len(context) :]
            else:
                answer = str(message["content"])[len(begun) :] + (self.ending(own) or "")
            return Turn(context, *self.cut(answer, own))

        # Most templates render the context as a prefix of the whole; otherwise, find where the answer begins.
        context, opened = self._before(history, own, message), ""
        if whole.startswith(context):
            answer = whole[len(context) :]
        else:
            opened = self._opened(context, history, own)
            answer = self._aligned(context, opened, whole, messages, own)
        return Turn(context, *self.cut(self._restored(message, answer, opened, own), own))

    def ending(self, own: Settings | None = None) -> str | None:
        """Returns the text that the template writes after a final answer's content; ``None`` if undetectable."""
        # Tools only change what comes before an answer.
        merged = {name: value for name, value in self.merged(own).items() if name != "tools"}
        key = repr((self._template(merged), sorted(merged.items(), key=lambda item: item[0])))
        if key not in self._endings:
            # A marker in place of the content shows what the template puts after it.
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT}]
            try:
                text = str(self._apply(probe, merged, tokenize=False))
            except ValueError:
                text = ""
            self._endings[key] = text.rpartition(_CONTENT)[2] if _CONTENT in text else None
        return self._endings[key]

    def cut(self, answer: str, own: Settings | None) -> tuple[str, bool]:
        """Cuts an answer or a conversation after the token that ends it; also returns whether there is one."""
        ending = self.ending(own)
        if ending is not None and answer.endswith(ending):
            found = self._control_tokens().search(ending)
            return (answer, False) if found is None else (answer[: len(answer) - len(ending) + found.end()], True)

        # Not the ending of a plain answer (a tool call, say): the last control token, if nothing follows it.
        stripped = answer.rstrip()
        last = list(self._control_tokens().finditer(stripped))[-1:]
        return (stripped, True) if last and last[0].end() == len(stripped) else (answer, False)

    def end_tokens(self) -> list[int]:
        """Returns the tokens with which the template ends answers and tool calls; empty without a template."""
        if self.tokenizer.chat_template is None:
            return []
        key = repr((self.tokenizer.chat_template, len(self.tokenizer)))
        if key in self._ends:
            return self._ends[key]
        found = []
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        user = {"role": "user", "content": "a"}
        # A template may end tool calls by another token than answers.
        for message in ({"content": "b"}, {"content": "", "tool_calls": [call]}):
            try:
                answer, ended = self.cut(self.render([user, {"role": "assistant", **message}]), None)
            except ValueError:
                continue
            last = list(self._control_tokens().finditer(answer))[-1:]
            found += [last[0].group()] if ended and last else []
        tokens: Any = self.tokenizer.convert_tokens_to_ids(list(dict.fromkeys(found)))
        self._ends[key] = [int(token) for token in tokens]
        return self._ends[key]

    def marks(self, messages: Sequence[Mapping[str, Any]], own: Settings | None) -> tuple[list[int], list[int]] | None:
        """Tokenizes the rendering with the template's mask of generated tokens; ``None`` if it marks none."""
        merged = self.merged(own)
        if not _GENERATION_MARK.search(self._template(merged)):
            return None
        rendered = self._apply(messages, merged, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), list(rendered["assistant_masks"])

    def _before(
        self, history: Sequence[Mapping[str, Any]], own: Settings | None, message: Mapping[str, Any] | None = None
    ) -> str:
        """Renders the context of a turn that follows ``history``."""
        if not history:
            return ""
        try:
            return self.render(history, own, add_generation_prompt=True)
        except ValueError:
            # A template may refuse, say, a system message alone, which it renders once an answer follows.
            text = self.render([*history, {"role": "assistant", "content": _CONTENT}], own)
            if message is None or _CONTENT not in text:
                raise
            return text.partition(_CONTENT)[0]

    def _opened(self, context: str, history: Sequence[Mapping[str, Any]], own: Settings | None) -> str:
        """Returns the end of the generation prompt that rendered answers lack, such as an opening reasoning tag."""
        try:
            without = self.render(history, own) if history else ""
            answered = self.render([*history, {"role": "assistant", "content": _CONTENT}], own).partition(_CONTENT)[0]
        except ValueError:
            return ""
        # Text shared by an answered rendering and the generation prompt is not opened by the latter alone.
        shared = shared_prefix(context, answered)
        if shared >= shared_prefix(context, without):
            return context[shared:]
        # The template renders this history differently before an answer: a short chat shows what it opens.
        probe = [{"role": "user", "content": "a"}]
        return "" if list(history) == probe else self._opened(self._before(probe, own), probe, own)

    def _aligned(
        self, context: str, opened: str, whole: str, messages: Sequence[Mapping[str, Any]], own: Settings | None
    ) -> str:
        """Finds the answer, after the assistant's header, in a rendering that does not begin with its context."""
        other = self.render([*messages[:-1], {"role": "assistant", "content": _CONTENT}], own)
        # The answer begins no later than the point where renderings with different answers diverge.
        limit = shared_prefix(whole, other)
        header = context.removesuffix(opened)
        low, high = 0, min(len(header), limit)
        while low < high:  # the longest end of the header that stands before the answer
            middle = (low + high + 1) // 2
            found = header[len(header) - middle :] in whole[:limit]
            low, high = (middle, high) if found else (low, middle - 1)
        if not low:
            raise ValueError(
                f"the chat template's generation prompt ends with {context[-30:]!r}, which is not how it begins an "
                f"answer ({whole[limit : limit + 30]!r}): give the tokenizer another chat template"
            )
        ending = header[len(header) - low :]
        return _behind(whole[whole.rindex(ending, 0, limit) + low :], opened)

    def _restored(self, message: Mapping[str, Any], answer: str, opened: str, own: Settings | None) -> str:
        """Restores the reasoning that a template drops from an answer although the model should write it."""
        ending = self.ending(own)
        body = answer.removesuffix(ending) if ending else answer
        content = message.get("content")
        said, kept = content.strip() if isinstance(content, str) else "", body.strip()
        # An empty answer would be learned silently.
        if not kept and (said or message.get("tool_calls")):
            raise ValueError(
                f"the chat template writes nothing of the assistant's message ({(said or 'tool calls')[:40]!r}): give "
                "the tokenizer a template that does"
            )

        # The template shows the end of the content: it has cut what comes before, a block of thoughts.
        rest = answer[len(body) :]
        if kept != said and said.endswith(kept):
            return _behind(str(content), opened).rstrip() + rest

        # Thoughts in a field of their own that the template does not render are put before the answer.
        closing = _closing(opened)
        reasoning = next((str(message[name]) for name in _REASONING if message.get(name)), "")
        if closing and reasoning and reasoning.strip() not in body:
            return f"{reasoning.strip()}\n{closing}\n\n{answer}"
        if closing and closing not in body and not self._warned:
            self._warned = True
            warnings.warn(
                f"the chat template's generation prompt opens {opened.strip()!r}, and answers do not close it: they "
                f"are learnt as they stand, after the open tag. Write {closing!r} into the answers, or let "
                "chat_template_kwargs turn the tag off where the template can",
                stacklevel=2,
            )
        return answer

    def _control_tokens(self) -> re.Pattern[str]:
        """Compiles a pattern of the control tokens: those added to the vocabulary, except blank ones."""
        if self._controls is None or self._controls[0] != len(self.tokenizer):
            names = {*self.tokenizer.get_added_vocab(), str(self.tokenizer.eos_token)}
            names = {name for name in names if name.strip()}
            # The longest first, so that a token is not taken for another one that it begins with.
            pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
            self._controls = len(self.tokenizer), re.compile(pattern)
        return self._controls[1]

    def _apply(self, messages: Sequence[Mapping[str, Any]], merged: dict[str, Any], **options: Any) -> Any:
        template = self._template(merged)
        # The weight of a message is not part of the chat format.
        written = [{name: value for name, value in m.items() if name != "weight"} for m in messages]
        if self._wants_blocks(template, merged):
            written = [in_blocks(message) for message in written]
        try:
            if self._wants_text_arguments(template, written, merged):
                written = [with_text_arguments(message) for message in written]
            return self.tokenizer.apply_chat_template(written, **options, **merged)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses the row: {' '.join(str(error).split())}") from error

    def _wants_blocks(self, template: str, merged: dict[str, Any]) -> bool:
        """Tells whether the template renders a content only as a list of blocks."""
        if template not in self._blocks:
            # Set before the probe, which asks this method again.
            self._blocks[template] = False
            # Tools could refuse the probe for reasons of their own.
            settings = {name: value for name, value in merged.items() if name != "tools"}
            message = {"role": "user", "content": _CONTENT}
            try:
                as_text = self._apply([message], settings, tokenize=False)
                as_blocks = "" if _CONTENT in as_text else self._apply([in_blocks(message)], settings, tokenize=False)
                self._blocks[template] = _CONTENT in as_blocks
            except ValueError:
                pass
        return self._blocks[template]

    def _wants_text_arguments(self, template: str, messages: Messages, merged: dict[str, Any]) -> bool:
        """Tells whether the template needs a call's arguments as text: else it fails, or prints them as Python does."""
        arguments = [arguments_of(call) for message in messages for call in message.get("tool_calls") or ()]
        given = [each for each in arguments if not isinstance(each, str)]
        if given and template not in self._text_arguments:
            try:
                # A template that prints the dictionary shows it in Python's notation, which models are not trained on.
                text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **merged))
                if telling := [str(each) for each in given if each]:  # Python and JSON agree on {}
                    self._text_arguments[template] = any(each in text for each in telling)
            except TypeError:
                self._text_arguments[template] = True
        return self._text_arguments.get(template, False)

    def _template(self, merged: Settings) -> str:
        if self.tokenizer.chat_template is None and merged.get("chat_template") is None:
            raise ValueError(
                "the row holds chat messages but the tokenizer has no chat template: give it one "
                "(tokenizer.chat_template, or chat_template.jinja in its folder) or write strings"
            )
        return str(self.tokenizer.get_chat_template(merged.get("chat_template"), tools=merged.get("tools")))


def is_begun(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether messages end with the beginning of an answer: words of the assistant, and no calls.

    Example:
        >>> is_begun([{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "It is"}])
        True
    """
    last: Mapping[str, Any] = messages[-1] if messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


def with_turn(history: Sequence[Mapping[str, Any]], turn: Mapping[str, Any]) -> Messages:
    """Appends a turn of the assistant to messages, or continues the answer that they begin.

    Example:
        >>> with_turn([{"role": "assistant", "content": "It is"}], {"role": "assistant", "content": " 4"})
        [{'role': 'assistant', 'content': 'It is 4'}]
    """
    if not (is_begun(history) and is_begun([turn])):
        return [*map(dict, history), dict(turn)]
    begun = history[-1]
    return [*map(dict, history[:-1]), {**begun, **turn, "content": begun["content"] + turn["content"]}]


def _behind(text: str, opened: str) -> str:
    """Strips from a text the tag that the generation prompt has already opened."""
    tag = opened.strip()
    if not tag or not text.lstrip().startswith(tag):
        return text
    # Blanks around the tag differ between templates: strip them where the generation prompt has written them already.
    if text.startswith(opened):
        return text[len(opened) :]
    rest = text.lstrip()[len(tag) :]
    return rest.lstrip() if opened[-1:].isspace() else rest


def _closing(opened: str) -> str:
    r"""Returns the tag that closes an opened one; empty if no tag is open.

    Example:
        >>> _closing("<think>\n"), _closing("[THINK]"), _closing("Answer:")
        ('</think>', '[/THINK]', '')
    """
    found = _OPENING_TAG.search(opened)
    if found is None:
        return ""
    left, name, right = (group for group in found.groups() if group is not None)
    return f"{left}/{name}{right}"
