"""One call from a model and prompts to texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from ..data.chat_template import ChatTemplate
from ..data.text_tokens import encode
from .engine import Engine
from .policies import build_policy
from .sampling import SamplingParams
from .specs import build_strategy
from .strategy import Strategy

Prompt = str | Sequence[Mapping[str, Any]]


@overload
def generate(model: Any, prompts: Prompt, **options: Any) -> str: ...
@overload
def generate(model: Any, prompts: Sequence[Prompt], **options: Any) -> list[str]: ...
def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    strategy: Any = None,
    scorer: Any = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> str | list[str]:
    """Generates one answer to each prompt.

    Args:
        model: folder or hub id of a model or adapter, or several as one, as in ``policy_spec``; or an engine or
            strategy. To call this often, make the engine once.
        prompts: a text or a list of chat messages; or a list of these.
        strategy: how to choose an answer: a strategy's class name, or ``class_path`` and ``init_args``; see
            ``build_strategy``.
        scorer: for the strategy: folder of a reward model, or as in ``build_scorer``.
        dtype: of the weights of a model that is loaded.
        device: of a model that is loaded; by default a GPU if there is one.
        chat_template_kwargs: passed to the chat template.
        sampling: options of ``SamplingParams``, such as ``max_new_tokens=64`` or ``temperature=0.0``.

    Returns:
        The text; a list of texts for a list of prompts.

    Raises:
        ValueError: the model does not load, a prompt cannot be encoded, or an option is out of range.

    Example:
        >>> generate("runs/dpo/model", "2+2=", temperature=0.0)  # doctest: +SKIP
        '4'
    """
    engine: Engine = model
    if isinstance(model, str | Path | list | Mapping):
        engine = build_policy(model, dtype=str(dtype).removeprefix("torch."), device=device)
    elif not callable(getattr(model, "generate", None)) or isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a folder, a hub id, or an engine")
    if strategy is not None:
        engine = build_strategy(strategy, engine, scorer=scorer)
    elif scorer is not None:
        raise ValueError("scorer is given without a strategy that chooses by it: give strategy='BestOfN', for instance")
    single = isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], Mapping))
    listed: Any = [prompts] if single else list(prompts)
    rendered = [_rendered(engine, prompt, chat_template_kwargs) for prompt in listed]
    if isinstance(engine, Strategy):
        # Scorers read chats as they were written.
        tokens = [engine.encode(text) if isinstance(text, str) else text for text in rendered]
        groups = engine.generate(listed, 1, SamplingParams(**sampling), encoded=tokens)
    else:
        groups = engine.generate(rendered, 1, SamplingParams(**sampling))
    texts = [group[0].text for group in groups]
    return texts[0] if single else texts


def _rendered(engine: Any, prompt: Prompt, settings: Mapping[str, Any] | None) -> Any:
    """Renders chat messages up to where the answer begins, as token ids."""
    if isinstance(prompt, str):
        return prompt
    tokenizer = getattr(engine, "tokenizer", None)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("the prompt holds chat messages, and the model has no chat template: give a text")
    context = ChatTemplate(tokenizer).context([dict(message) for message in prompt], dict(settings or {}))
    return encode(tokenizer, context)
