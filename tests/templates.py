"""Chat templates of the structures that models ship with, and tokenizers that spell them: one token a character.

They are written for these tests. Each says, by hand, what the assistant is to write for a content.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "\n" + "".join(map(chr, range(32, 127)))


@dataclass(frozen=True)
class Family:
    """A family's template.

    Args:
        template: in Jinja.
        answer: what the assistant writes for a content without reasoning, its end included.
        tokens: special tokens, the end-of-sequence token first.
        opening: the tokenizer puts ``<bos>`` in front of every text.
        reasoned: what it writes for a content after reasoning; ``None`` where the template knows none.
        roles: roles besides user and assistant that it takes.
        settings: a setting that the template reads, with another value than its default.
    """

    template: str
    answer: str
    tokens: tuple[str, ...]
    opening: bool = False
    reasoned: str | None = None
    roles: tuple[str, ...] = ("system",)
    settings: dict[str, Any] = field(default_factory=dict)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning is shown after the last question alone, and an empty one is opened where none is wanted.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\ntools: ' + (tools | map(attribute='function.name') | join(',')) "
    "+ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set text = m['content'] or '' %}{% set thought = '' %}"
    "{% if m['reasoning_content'] %}{% set thought = m['reasoning_content'] %}"
    "{% elif '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ text }}{% for c in m['tool_calls'] or [] %}{{ '<tool_call>' + c['function']['name'] + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m['content'] "
    "+ '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The generation prompt opens the reasoning, which no finished turn shows.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The generation prompt opens the reasoning, which the last turn alone shows.
NEMOTRON = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[1].strip() %}{% endif %}"
    "{{ '<SPECIAL_10>' + m['role'] + '\n' + text + ('\n<SPECIAL_11>\n' if m['role'] == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<SPECIAL_10>assistant\n<think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' "
    "+ (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Inserts a system message where it is missing, writes the tools into it, and tool results as the user's.
HERMES = (
    "{{ '<|im_start|>system\n' + (messages[0]['content'] if messages[0]['role'] == 'system' else 'Be kind.') }}"
    "{% for t in tools or [] %}{{ '\n' + (t | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>' + m['content'] + '</tool_response><|im_end|>\n' }}"
    "{% elif m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for block in m['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Thoughts of a turn are shown until the turn has its answer; an answer ends otherwise when others follow it.
CHANNELS = (
    "{% set ns = namespace(final=-1) %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' and not m['tool_calls'] %}{% set ns.final = loop.index0 %}{% endif %}{% endfor %}"
    "{{ '<|start|>system<|message|>Use channels.<|end|>' }}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if m['thinking'] and (loop.index0 > ns.final or (loop.last and not add_generation_prompt)) %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' }}{% endif %}"
    "{% if m['tool_calls'] %}{{ '<|start|>assistant to=' + m['tool_calls'][0]['function']['name'] "
    "+ '<|channel|>commentary<|message|>' + (m['tool_calls'][0]['function']['arguments'] | tojson) + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] "
    "+ ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{% endif %}"
    "{% elif m['role'] == 'tool' %}{{ '<|start|>f to=assistant<|message|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Ends turns by words.
VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n### ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

_IM = ("<|im_end|>", "<bos>", "<|im_start|>")
FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, "{}<|im_end|>", _IM),
    "chatml-base": Family(CHATML, "{}<|im_end|>", ("<|endoftext|>", "<bos>", "<|im_start|>", "<|im_end|>")),
    "qwen3": Family(
        QWEN3,
        "<think>\n\n</think>\n\n{}<|im_end|>",
        _IM,
        reasoned="<think>\n{}\n</think>\n\n{}<|im_end|>",
        roles=("system", "tool"),
        settings={"enable_thinking": False},
    ),
    "r1": Family(
        R1, "{}<eos>", ("<eos>", "<bos>", "<|User|>", "<|Assistant|>"), opening=True, reasoned="{}</think>{}<eos>"
    ),
    "nemotron": Family(
        NEMOTRON,
        "{}\n<SPECIAL_11>",
        ("<SPECIAL_11>", "<bos>", "<SPECIAL_10>"),
        opening=False,
        reasoned="{}</think>{}\n<SPECIAL_11>",
    ),
    "llama3": Family(
        LLAMA3,
        "{}<|eot_id|>",
        ("<|end_of_text|>", "<bos>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        opening=True,
        settings={"date_string": "26 Jul 2024"},
    ),
    "gemma": Family(GEMMA, "{}<end_of_turn>", ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), opening=True),
    "phi3": Family(PHI3, "{}<|end|>", ("<|endoftext|>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "mistral": Family(MISTRAL, " {}</s>", ("</s>", "<bos>", "[INST]", "[/INST]"), opening=True),
    "hermes": Family(HERMES, "{}<|im_end|>", _IM, roles=("system", "tool")),
    "blocks": Family(BLOCKS, "{}<eos>", ("<eos>", "<bos>", "<|user|>", "<|assistant|>")),
    "channels": Family(
        CHANNELS,
        "<|channel|>final<|message|>{}<|return|>",
        ("<|return|>", "<bos>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        roles=("system", "tool"),
    ),
    "deepseek": Family(DEEPSEEK, " {}<eos>", ("<eos>", "<bos>"), opening=True),
    "vicuna": Family(VICUNA, "{}\n### <eos>", ("<eos>", "<bos>")),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character, with the special tokens of a family and its chat template."""
    family = FAMILIES[name]
    special = ("<pad>", "<unk>", *family.tokens)
    vocab = {token: index for index, token in enumerate((*special, *LETTERS))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if family.opening:
        pair = [("<bos>", vocab["<bos>"])]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=pair)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=family.tokens[0],
        bos_token="<bos>",
        extra_special_tokens=list(family.tokens[2:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def spell(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    """The text of tokens, special ones included, without anything between them."""
    return "".join(tokenizer.convert_ids_to_tokens(token_ids))
